package replication

import (
	"log/slog"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/dsnode/dsnode/storage/journal"
	"github.com/dsnode/dsnode/storage/keyring"
	"github.com/dsnode/dsnode/storage/keyring/keyringtest"
)

// keepsAll is a Retired by which no stream is retired.
func keepsAll(journal.Stream) bool { return false }

func newTestTracker(self string, epoch uint64, members ...string) *tracker {
	l := newTracker(self, epoch, 10, keepsAll, slog.New(slog.DiscardHandler))
	l.setMembers(memberList(members...))
	return l
}

// A node whose disk lost records unnoticed learns it from its peers' watermarks, and
// they then use its new ones.
func TestOwnWatermarksPrevail(t *testing.T) {
	s := journal.Stream{Origin: "b1"}
	for _, c := range []struct {
		name    string
		epoch   uint64 // known to the peers
		seq     uint64
		epochIs uint64 // afterwards
	}{
		{"peers have a lower number", 5, 2, 5},
		{"peers have the same number", 5, 3, 5},
		{"peers have a higher number", 5, 7, 6},
		{"an older epoch", 4, 7, 5},
		{"a newer epoch", 9, 1, 10},
	} {
		a, b := newTestTracker("a1", 5, "a1", "b1"), newTestTracker("b1", 1, "a1", "b1")
		a.setOwn(map[journal.Stream]uint64{s: 3})
		b.merge("a1", Watermarks{"a1": {Epoch: c.epoch, Ends: map[journal.Stream]uint64{s: c.seq}}})
		got := b.subscribe("a1").take()
		a.merge("b1", got)
		if got := a.marks["a1"]; got.Epoch != c.epochIs || got.Ends[s] != 3 {
			t.Errorf("%s: %+v", c.name, got)
		}
		got = a.subscribe("b1").take()
		b.merge("a1", got)
		if got := b.held("a1", s); got != 3 {
			t.Errorf("%s: the peers have %d", c.name, got)
		}
	}
}

// A watermark that a peer sent is not sent back to it, and all others are sent once.
func TestUpdatesAreSentOnceAndNotBack(t *testing.T) {
	s := journal.Stream{Origin: "c1"}
	l := newTestTracker("a1", 1, "a1", "b1", "c1")
	tb, tc := l.subscribe("b1"), l.subscribe("c1")
	l.merge("b1", Watermarks{"b1": {Epoch: 1, Ends: map[journal.Stream]uint64{s: 4}}})
	if got := tb.take(); len(got) > 0 {
		t.Errorf("sent back: %v", got)
	}
	want := Watermarks{"b1": {Epoch: 1, Ends: map[journal.Stream]uint64{s: 4}}}
	if got := tc.take(); !cmp.Equal(got, want) {
		t.Error(cmp.Diff(want, got))
	}
	if got := tc.take(); len(got) > 0 {
		t.Errorf("sent twice: %v", got)
	}
	l.setOwn(map[journal.Stream]uint64{s: 2})
	want = Watermarks{"a1": {Epoch: 1, Ends: map[journal.Stream]uint64{s: 2}}}
	if got := tb.ack([]journal.Stream{s}); !cmp.Equal(got, want) {
		t.Error(cmp.Diff(want, got))
	}
	if got := tb.take(); len(got) > 0 {
		t.Errorf("an acknowledgement was sent again: %v", got)
	}
}

// A node may receive a new member's watermarks before it knows the member.
func TestWatermarksOfAFutureMember(t *testing.T) {
	s := journal.Stream{Origin: "a1"}
	l := newTestTracker("a1", 1, "a1", "b1")
	l.setOwn(map[journal.Stream]uint64{s: 5})
	l.merge("b1", Watermarks{"b1": {Epoch: 1, Ends: map[journal.Stream]uint64{s: 5}}, "c1": {Epoch: 1, Ends: map[journal.Stream]uint64{s: 3}}})
	if got := l.heldByAll(s); got != 5 {
		t.Errorf("held by all members up to %d", got)
	}
	l.setMembers(memberList("a1", "b1", "c1"))
	if got := l.heldByAll(s); got != 3 {
		t.Errorf("held by all members up to %d", got)
	}
	l.setMembers(memberList("a1", "b1"))
	if _, known := l.marks["c1"]; known {
		t.Error("the watermarks of a removed member are kept")
	}
}

func TestHoldersAreBounded(t *testing.T) {
	l := newTestTracker("a1", 1, "a1", "b1")
	for i := range 2 * maxHolders {
		l.merge("b1", Watermarks{string(rune('c' + i)): {Epoch: 1}})
	}
	if n := len(l.marks); n > maxHolders {
		t.Errorf("%d holders are tracked", n)
	}
	l.merge("b1", Watermarks{"b1": {Epoch: 1}})
	if _, known := l.marks["b1"]; !known {
		t.Error("a member is not tracked because of nodes that are not members")
	}
}

// For any input, openable splits it into frames that can be stored and the rest.
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
				t.Fatalf("a record sealed with key %v would be stored: %v", id, err)
			}
			b = after
		}
	})
}

// The watermarks of a stream that was dropped everywhere are forgotten, also when a peer
// that still has them sends them again. Otherwise a node that never held the stream would
// lack its records for ever.
func TestRetiredStreamsAreForgotten(t *testing.T) {
	gone, here := journal.Stream{Origin: "b1"}, journal.Stream{Origin: "c1"}
	l := newTestTracker("a1", 1, "a1", "b1", "c1")
	retired := false
	l.retired = func(s journal.Stream) bool { return retired && s == gone }
	l.setOwn(map[journal.Stream]uint64{gone: 5, here: 5})
	report := func() {
		l.merge("b1", Watermarks{
			"a1": {Epoch: 1, Ends: map[journal.Stream]uint64{gone: 5, here: 5}},
			"b1": {Epoch: 1, Ends: map[journal.Stream]uint64{gone: 7, here: 6}},
		})
	}
	report()
	if n := l.behind([]string{"b1", "c1"}, []string{"c1"}); n != 13 {
		t.Errorf("c1 is %d behind before it is dropped", n)
	}
	retired = true
	l.forget(func(s journal.Stream) bool { return s == here })
	report()
	if n := l.behind([]string{"b1", "c1"}, []string{"c1"}); n != 6 {
		t.Errorf("c1 is %d behind", n)
	}
	if n := l.behind([]string{"b1", "c1"}, []string{"a1"}); n != 1 {
		t.Errorf("a1 is %d behind", n)
	}
	if e := l.epoch("a1"); e != 1 {
		t.Errorf("a1's own epoch rose to %d", e)
	}
}
