package replication

import (
	"log/slog"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/dsnode/dsnode/storage/journal"
	"github.com/dsnode/dsnode/storage/keyring"
	"github.com/dsnode/dsnode/storage/keyring/keyringtest"
)

func newTestLedger(self string, epoch uint64, members ...string) *ledger {
	l := newLedger(self, epoch, 10, slog.New(slog.DiscardHandler))
	l.setMembers(memberList(members...))
	return l
}

// A node whose disk lost records without its knowing learns it from the others,
// and they take its word.
func TestOwnMarksAreTheNodesOwnWord(t *testing.T) {
	s := journal.Stream{Origin: "b1"}
	for _, c := range []struct {
		name    string
		epoch   uint64 // that others remember
		seq     uint64
		epochIs uint64 // afterwards
	}{
		{"less is remembered", 5, 2, 5},
		{"the same is remembered", 5, 3, 5},
		{"more is remembered", 5, 7, 6},
		{"an older epoch", 4, 7, 5},
		{"a newer epoch", 9, 1, 10},
	} {
		a, b := newTestLedger("a1", 5, "a1", "b1"), newTestLedger("b1", 1, "a1", "b1")
		a.setOwn(map[journal.Stream]uint64{s: 3})
		b.hear("a1", Marks{"a1": {Epoch: c.epoch, Ends: map[journal.Stream]uint64{s: c.seq}}})
		told, _ := b.subscribe("a1").take()
		a.hear("b1", told)
		if got := a.marks["a1"]; got.Epoch != c.epochIs || got.Ends[s] != 3 {
			t.Errorf("%s: %+v", c.name, got)
		}
		told, _ = a.subscribe("b1").take()
		b.hear("a1", told)
		if got := b.held("a1", s); got != 3 {
			t.Errorf("%s: others believe in %d", c.name, got)
		}
	}
}

// What a peer told is not told back to it, and all else is told once.
func TestTellsAreNoEcho(t *testing.T) {
	s := journal.Stream{Origin: "c1"}
	l := newTestLedger("a1", 1, "a1", "b1", "c1")
	tb, tc := l.subscribe("b1"), l.subscribe("c1")
	l.hear("b1", Marks{"b1": {Epoch: 1, Ends: map[journal.Stream]uint64{s: 4}}})
	if told, more := tb.take(); len(told) > 0 || more {
		t.Errorf("told back: %v", told)
	}
	want := Marks{"b1": {Epoch: 1, Ends: map[journal.Stream]uint64{s: 4}}}
	if told, _ := tc.take(); !cmp.Equal(told, want) {
		t.Error(cmp.Diff(want, told))
	}
	if told, _ := tc.take(); len(told) > 0 {
		t.Errorf("told twice: %v", told)
	}
	l.setOwn(map[journal.Stream]uint64{s: 2})
	want = Marks{"a1": {Epoch: 1, Ends: map[journal.Stream]uint64{s: 2}}}
	if told := tb.ack([]journal.Stream{s}); !cmp.Equal(told, want) {
		t.Error(cmp.Diff(want, told))
	}
	if told, _ := tb.take(); len(told) > 0 {
		t.Errorf("told again what was acknowledged: %v", told)
	}
}

// A node may hear of a new member's marks before it knows the member.
func TestMarksOfAMemberToBe(t *testing.T) {
	s := journal.Stream{Origin: "a1"}
	l := newTestLedger("a1", 1, "a1", "b1")
	l.setOwn(map[journal.Stream]uint64{s: 5})
	l.hear("b1", Marks{"b1": {Epoch: 1, Ends: map[journal.Stream]uint64{s: 5}}, "c1": {Epoch: 1, Ends: map[journal.Stream]uint64{s: 3}}})
	if got := l.heldByAll(s); got != 5 {
		t.Errorf("held by all members to %d", got)
	}
	l.setMembers(memberList("a1", "b1", "c1"))
	if got := l.heldByAll(s); got != 3 {
		t.Errorf("held by all members to %d", got)
	}
	l.setMembers(memberList("a1", "b1"))
	if _, known := l.marks["c1"]; known {
		t.Error("a removed member's marks are kept")
	}
}

func TestHoldersAreBounded(t *testing.T) {
	l := newTestLedger("a1", 1, "a1", "b1")
	for i := range 2 * maxHolders {
		l.hear("b1", Marks{string(rune('c' + i)): {Epoch: 1}})
	}
	if n := len(l.marks); n > maxHolders {
		t.Errorf("%d holders are known", n)
	}
	l.hear("b1", Marks{"b1": {Epoch: 1}})
	if _, known := l.marks["b1"]; !known {
		t.Error("strangers keep out a member")
	}
}

// Whatever comes, what can be stored and what waits are the frames that came.
func FuzzOpenable(f *testing.F) {
	ring, keys := keyringtest.New(f, 1)
	r := &Replication{opts: Options{Ring: ring}}
	frame := func(payload []byte) []byte {
		b, err := journal.AppendFrame(nil, &journal.Record{
			Stream: journal.Stream{Origin: "a1"}, Seq: 1, Kind: journal.Started, Attempt: 1, Payload: payload,
		})
		if err != nil {
			f.Fatal(err)
		}
		return b
	}
	sealed, err := ring.Scope("test v1").Seal(nil, []byte("x"), nil)
	if err != nil {
		f.Fatal(err)
	}
	other, _ := keyringtest.New(f, 1)
	foreign, err := other.Scope("test v1").Seal(nil, []byte("x"), nil)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(frame(nil))
	f.Add(append(frame(sealed), frame(foreign)...))
	f.Add(frame([]byte("not sealed")))
	f.Add(frame(sealed)[:20])
	f.Fuzz(func(t *testing.T, frames []byte) {
		can, rest, err := r.openable(frames)
		if err != nil {
			return
		}
		if len(can)+len(rest) != len(frames) {
			t.Fatalf("%d and %d of %d bytes", len(can), len(rest), len(frames))
		}
		for b := can; len(b) > 0; {
			rec, after, err := journal.NextFrame(b)
			if err != nil {
				t.Fatal(err)
			}
			if id, err := keyring.SealedWith(rec.Payload); len(rec.Payload) > 0 && (err != nil || id != keys[1].ID()) {
				t.Fatalf("a record of key %v is to be stored: %v", id, err)
			}
			b = after
		}
	})
}
