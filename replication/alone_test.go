package replication

import (
	"testing"
	"time"

	"github.com/dsnode/dsnode/storage/journal"
)

// Only what a node has reported counts, only members count as others, and streams that no
// node needs don't.
func TestWhatOnlyOneNodeHas(t *testing.T) {
	own, relayed, done := journal.Stream{Origin: "b1"}, journal.Stream{Origin: "c1"}, journal.Stream{Origin: "b1", Incarnation: journal.Incarnation{1}}
	l := newTestTracker("a1", 1, "a1", "b1", "c1")
	none := func(journal.Stream) bool { return false }
	if n, known := l.onlyOn("b1", none); known {
		t.Errorf("before a report: %d records, want unknown", n)
	}
	l.setOwn(map[journal.Stream]uint64{own: 3, relayed: 5})
	l.merge("c1", Watermarks{
		"b1":   {Epoch: 1, Ends: map[journal.Stream]uint64{own: 13, relayed: 5, done: 7}},
		"c1":   {Epoch: 1, Ends: map[journal.Stream]uint64{own: 4, relayed: 9}},
		"gone": {Epoch: 1, Ends: map[journal.Stream]uint64{own: 13}},
	})
	if n, known := l.onlyOn("b1", none); !known || n != 9+7 {
		t.Errorf("%d records (known: %t), want 9 of its stream and 7 of the other", n, known)
	}
	if n, known := l.onlyOn("b1", func(s journal.Stream) bool { return s == done }); !known || n != 9 {
		t.Errorf("%d records (known: %t), want 9 without the retired stream", n, known)
	}
	if n, known := l.onlyOn("c1", none); !known || n != 4 {
		t.Errorf("%d records of c1 (known: %t), want 4", n, known)
	}
}

func TestWhenANodeLastReported(t *testing.T) {
	now := 10 * time.Second
	f := &freshness{now: func() time.Duration { return now }, own: map[string]*originCopy{}, copies: map[siteCopyKey]siteCopyAge{}}
	if _, known := f.reported("b1"); known {
		t.Error("a node that never answered has reported")
	}
	f.answered("b1", 9*time.Second, nil, func(journal.Stream) uint64 { return 0 })
	now = 40 * time.Second
	if ago, known := f.reported("b1"); !known || ago != 31*time.Second {
		t.Errorf("reported %s ago (known: %t), want 31 s", ago, known)
	}
}
