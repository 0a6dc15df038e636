package replication

import (
	"context"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/dsnode/dsnode/storage/journal"
)

// What a site lacks of another one is known at every node, with the age of the copy: while
// all is well, after the link is cut, and after the other site is gone.
func TestWhatASiteLacks(t *testing.T) {
	w := newWorld(t, "a1", "b1", "c1").start()
	w.connected()
	a1, c1 := w.nodes["a1"], w.nodes["c1"]
	ofA := func(s journal.Stream) bool { return s.Origin == "a1" }
	seq := a1.submit(5, 100)
	w.wantEverywhere(a1.stream, seq)
	for _, n := range w.nodes {
		eventually(t, n.name+" knows that b lacks nothing", func() bool {
			c := n.repl.CopyOf("b", "a", ofA, nil)
			return c.Known && c.Lately && len(c.Records) == 0 && c.Age < 5*time.Second && n.repl.EndsKnown("a1")
		})
	}
	if c := c1.repl.CopyOf("b", "a", ofA, map[journal.Stream]uint64{a1.stream: seq + 7}); c.Records["a1"] != 7 {
		t.Errorf("with a known end 7 records later: %+v", c)
	}
	if c := c1.repl.CopyOf("b", "a", func(journal.Stream) bool { return false }, nil); len(c.Records) != 0 {
		t.Errorf("of no stream: %+v", c)
	}
	if c := c1.repl.CopyOf("nowhere", "a", ofA, nil); c.Known {
		t.Errorf("of a site without nodes: %+v", c)
	}

	w.isolate("b", true)
	last := a1.submit(4, 100)
	eventually(t, "c1 knows what b lacks", func() bool {
		c := c1.repl.CopyOf("b", "a", ofA, nil)
		return c.Known && cmp.Equal(c.Records, map[string]int64{"a1": 4}) && !c.Lately && c.Age > knownFor
	})
	a1.halt()
	c := c1.repl.CopyOf("b", "a", ofA, nil)
	if !c.Known || c.Records["a1"] != 4 || c.Age < knownFor {
		t.Errorf("after a is gone: %+v", c)
	}
	eventually(t, "the ends of a1 are out of date", func() bool { return !c1.repl.EndsKnown("a1") })
	w.isolate("b", false)
	eventually(t, "b has all", func() bool { return w.nodes["b1"].holds(a1.stream) == last })
	eventually(t, "c1 knows that b has all", func() bool { return len(c1.repl.CopyOf("b", "a", ofA, nil).Records) == 0 })
}

// Ends and what is lacking are asked from the nodes at this moment.
func TestEndsAndLackingAreAskedNow(t *testing.T) {
	w := newWorld(t, "a1", "b1", "b2", "c1").start()
	w.connected()
	a1, c1 := w.nodes["a1"], w.nodes["c1"]
	ofA := func(s journal.Stream) bool { return s.Origin == "a1" }
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	seq := a1.submit(5, 100)
	for _, n := range []*node{a1, c1} {
		ends, err := n.repl.EndsOf(ctx, []string{"a1"}, ofA)
		if err != nil || ends[a1.stream] != seq || len(ends) != 1 {
			t.Errorf("at %s: %v, %v", n.name, ends, err)
		}
		eventually(t, "b has all", func() bool {
			lacking, err := n.repl.Lacking(ctx, "b", ends)
			return err == nil && len(lacking) == 0
		})
		ends[a1.stream] += 3
		if lacking, err := n.repl.Lacking(ctx, "b", ends); err != nil || !cmp.Equal(lacking, map[string]int64{"a1": 3}) {
			t.Errorf("at %s b lacks %v, %v", n.name, lacking, err)
		}
	}
	w.nodes["b1"].halt()
	if lacking, err := a1.repl.Lacking(ctx, "b", map[journal.Stream]uint64{a1.stream: seq}); err != nil || len(lacking) != 0 {
		t.Errorf("with one node of b: %v, %v", lacking, err)
	}
	w.nodes["b2"].halt()
	if _, err := a1.repl.Lacking(ctx, "b", map[journal.Stream]uint64{a1.stream: seq}); err == nil {
		t.Error("without a node of b it is known what b lacks")
	}
	if _, err := a1.repl.EndsOf(ctx, []string{"a1", "b1"}, ofA); err == nil {
		t.Error("the ends are known although a node does not answer")
	}
}

func TestRetiredStreamsAreNotLacking(t *testing.T) {
	w := newWorld(t, "a1", "b1")
	var retired atomic.Bool
	w.nodes["a1"].retired = func(journal.Stream) bool { return retired.Load() }
	w.start()
	w.connected()
	a1 := w.nodes["a1"]
	w.wantEverywhere(a1.stream, a1.submit(1, 100))
	eventually(t, "the copy is known", func() bool { return a1.repl.CopyOf("b", "a", func(journal.Stream) bool { return true }, nil).Known })
	ends := map[journal.Stream]uint64{a1.stream: 50}
	for _, is := range []bool{false, true} {
		retired.Store(is)
		c := a1.repl.CopyOf("b", "a", func(journal.Stream) bool { return true }, ends)
		lacking, err := a1.repl.Lacking(t.Context(), "b", ends)
		if want := !is; err != nil || (len(c.Records) > 0) != want || (len(lacking) > 0) != want {
			t.Errorf("retired %t: %v, %v, %v", is, c.Records, lacking, err)
		}
	}
}
