package storage

import (
	"bytes"
	"encoding/hex"
	"errors"
	"math"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/raft"
	"pgregory.net/rapid"

	"github.com/dsnode/dsnode/storage/boltfile"
	"github.com/dsnode/dsnode/storage/keyring"
)

func testSealer(t testing.TB, seed byte) keyring.Sealer {
	t.Helper()
	s, err := keyring.NewSealer(bytes.Repeat([]byte{seed}, 32))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// entryGen draws entries as raft stores them; the caller sets the index.
func entryGen() *rapid.Generator[raft.Log] {
	return rapid.Custom(func(t *rapid.T) raft.Log {
		l := raft.Log{
			Term: rapid.Uint64().Draw(t, "term"),
			Type: raft.LogType(rapid.Byte().Draw(t, "type")),
		}
		if b := rapid.SliceOf(rapid.Byte()).Draw(t, "data"); len(b) > 0 {
			l.Data = b
		}
		if b := rapid.SliceOf(rapid.Byte()).Draw(t, "extensions"); len(b) > 0 {
			l.Extensions = b
		}
		if rapid.Bool().Draw(t, "has time") {
			l.AppendedAt = time.Unix(0, rapid.Int64().Draw(t, "appended at"))
		}
		return l
	})
}

func TestEntryRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		want := entryGen().Draw(t, "entry")
		want.Index = rapid.Uint64().Draw(t, "index")
		before := rapid.Uint64().Draw(t, "before")
		b := appendEntry([]byte("x"), &want, before)[1:]
		if len(b) > entrySize(&want) {
			t.Fatalf("%d bytes, but entrySize is %d", len(b), entrySize(&want))
		}
		var got raft.Log
		gotBefore, err := decodeEntry(b, &got)
		if err != nil || gotBefore != before {
			t.Fatalf("previous index %d, err %v", gotBefore, err)
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Fatal(d)
		}
	})
}

func TestEntrySizeIsEnoughForTheLargestNumbers(t *testing.T) {
	l := raft.Log{Index: math.MaxUint64, Term: math.MaxUint64, AppendedAt: time.Unix(1, 0), Data: make([]byte, 1<<20)}
	if got := len(appendEntry(nil, &l, math.MaxUint64)); got > entrySize(&l) {
		t.Fatalf("%d bytes, but entrySize is %d", got, entrySize(&l))
	}
}

func TestUnknownEntryFormat(t *testing.T) {
	b := appendEntry(nil, &raft.Log{Index: 1}, 0)
	for _, at := range []int{0, 1} {
		c := bytes.Clone(b)
		c[at] |= 0x40
		if _, err := decodeEntry(c, new(raft.Log)); !errors.Is(err, ErrNewerFormat) {
			t.Errorf("byte %d: %v", at, err)
		}
	}
}

func TestRecordErrors(t *testing.T) {
	a, b := testSealer(t, 1), testSealer(t, 2)
	place := []byte("place")
	good := appendRecord(nil, a, []byte("plaintext"), place)
	for bit := range len(good) * 8 {
		c := bytes.Clone(good)
		c[bit/8] ^= 1 << (bit % 8)
		if _, err := openRecord(nil, a, c, place); !errors.Is(err, ErrDamaged) {
			t.Errorf("bit %d: %v", bit, err)
		}
	}
	if _, err := openRecord(nil, b, good, place); !errors.Is(err, ErrWrongKey) {
		t.Errorf("another key: %v", err)
	}
	if _, err := openRecord(nil, a, good, []byte("elsewhere")); !errors.Is(err, ErrDamaged) {
		t.Errorf("another place: %v", err)
	}
}

func FuzzDecodeEntry(f *testing.F) {
	f.Add([]byte{})
	f.Add(appendEntry(nil, &raft.Log{Index: 7, Term: 2, Data: []byte("data"), Extensions: []byte("ext"), AppendedAt: time.Unix(3, 4)}, 6))
	f.Add(appendEntry(nil, &raft.Log{Index: 1}, 0))
	f.Fuzz(func(t *testing.T, b []byte) {
		var l raft.Log
		before, err := decodeEntry(b, &l)
		if err != nil {
			if !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrNewerFormat) {
				t.Fatalf("unexpected kind of error: %v", err)
			}
			return
		}
		var again raft.Log
		before2, err := decodeEntry(appendEntry(nil, &l, before), &again)
		if err != nil || before2 != before || !cmp.Equal(l, again) {
			t.Fatalf("%v was encoded and decoded as %v, %v", l, again, err)
		}
	})
}

func FuzzOpenRecord(f *testing.F) {
	s := testSealer(f, 1)
	f.Add([]byte{}, []byte{})
	f.Add(appendRecord(nil, s, []byte("hello"), []byte("place")), []byte("place"))
	f.Fuzz(func(t *testing.T, record, place []byte) {
		plain, err := openRecord(nil, s, record, place)
		if err == nil && len(plain) != len(record)-recordOverhead {
			t.Fatalf("%d bytes of plaintext from %d", len(plain), len(record))
		}
	})
}

// An older or newer version of dsnode reads the same bytes.
func TestRaftMarkBytes(t *testing.T) {
	m := raftMark{
		Mark:       boltfile.Mark{State: boltfile.MarkOpen, Store: [16]byte{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, Txid: 5},
		indexRange: indexRange{1, 9}, stable: 3,
	}
	const want = "44534e524d41524b0101000102030405060708090a0b0c0d0e0f" +
		"0000000000000005" + "0000000000000001" + "0000000000000009" + "00000003" + "ebfaacd3"
	if got := hex.EncodeToString(raftMarkFormat.Append(nil, m.encode())); got != want {
		t.Errorf("raft.mark is\n%s, want\n%s", got, want)
	}
}

func FuzzParseRaftMark(f *testing.F) {
	f.Add([]byte{})
	m := raftMark{Mark: boltfile.Mark{State: boltfile.MarkOpen, Txid: 5}, indexRange: indexRange{1, 9}, stable: 3}
	f.Add(raftMarkFormat.Append(nil, m.encode()))
	f.Fuzz(func(t *testing.T, b []byte) {
		parsed, ok := raftMarkFormat.Parse(b)
		if !ok {
			return
		}
		if m := decodeRaftMark(parsed); !bytes.Equal(raftMarkFormat.Append(nil, m.encode()), b) {
			t.Fatalf("%+v is encoded differently from what it was decoded from", m)
		}
	})
}
