package replication

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime/pprof"
	"testing"
	"time"

	"github.com/dsnode/dsnode/storage/journal"
)

var (
	chaosSeed  = flag.Uint64("chaos.seed", 0, "repeat the run of this seed; 0: a new one")
	chaosSteps = flag.Int("chaos.steps", 60, "steps of a run")
)

// Records that were acknowledged as durable beyond their node reach every node in the end,
// although links are cut, nodes are stopped and one node is wiped meanwhile. All nodes end
// with the same content.
func TestAcknowledgedRecordsSurvive(t *testing.T) {
	seed := *chaosSeed
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("repeat with -chaos.seed=%d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	w := newWorld(t, "a1", "a2", "b1", "b2", "c1").start()
	victim := w.order[rng.IntN(len(w.order))]
	some := func() *node { return w.nodes[w.order[rng.IntN(len(w.order))]] }
	acked := map[journal.Stream]uint64{}
	durable := map[journal.Durability]int{}
	for range *chaosSteps {
		switch op := rng.IntN(10); {
		case op < 6:
			n, level := some(), levels[1+rng.IntN(3)]
			if n.stop == nil {
				continue
			}
			seq := n.submit(1+rng.IntN(20), rng.IntN(5000))
			ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
			if err := n.repl.Await(ctx, n.stream, seq, level); err == nil {
				acked[n.stream] = seq
				durable[level]++
			}
			cancel()
		case op < 7:
			a, b := some(), some()
			if a != b {
				w.sever(a.name, b.name, rng.IntN(2) == 0)
			}
		case op < 8:
			w.isolate(some().site, rng.IntN(2) == 0)
		default:
			n := some()
			if n.stop == nil {
				n.start()
				continue
			}
			n.halt()
			if n.name == victim && rng.IntN(2) == 0 {
				n.wipe()
			}
		}
	}
	for i, a := range w.order {
		for _, b := range w.order[:i] {
			w.sever(a, b, false)
		}
	}
	for _, name := range w.order {
		if n := w.nodes[name]; n.stop == nil {
			n.start()
		}
	}
	most := func() map[journal.Stream]uint64 {
		out := map[journal.Stream]uint64{}
		for _, n := range w.nodes {
			for s, e := range n.log.Ends() {
				out[s] = max(out[s], e.Durable)
			}
		}
		return out
	}
	defer func() {
		if t.Failed() {
			w.describe()
		}
	}()
	eventually(t, "all nodes hold the same", func() bool {
		for s, end := range most() {
			for _, n := range w.nodes {
				if n.holds(s) != end && !t.Failed() {
					return false
				}
			}
		}
		return true
	})
	got := most()
	for s, seq := range acked {
		if got[s] < seq {
			t.Errorf("stream %s: acknowledged up to %d, but nodes hold %d", s, seq, got[s])
		}
	}
	t.Logf("%d streams, acknowledged: %v", len(got), durable)
	for s, end := range got {
		for _, n := range w.nodes {
			eventually(t, fmt.Sprintf("%s knows that all hold %s to %d", n.name, s, end), func() bool { return n.repl.HeldByAll(s) == end })
		}
		eventually(t, "all tables have applied "+s.String(), func() bool {
			for _, n := range w.nodes {
				if n.table.Applied(s) < end {
					return false
				}
			}
			return true
		})
	}
	first, err := w.nodes["a1"].table.Digests()
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range w.nodes {
		if d, err := n.table.Digests(); err != nil || d != first {
			t.Errorf("the table of %s differs from that of a1 (%v)", n.name, err)
		}
	}
}

// A backlog that is sent slowly does not delay new records.
func TestBacklogDoesNotDelayNewRecords(t *testing.T) {
	w := newWorld(t, "a1", "b1")
	w.tune = func(n *node) { n.limits.BulkBytesPerSecond = 256 << 10 }
	a1, b1 := w.nodes["a1"], w.nodes["b1"]
	a1.start()
	old, backlog := a1.stream, a1.submit(20_000, 1000)
	a1.halt()
	a1.start()
	b1.start()
	eventually(t, "b1 receives the backlog", func() bool { return b1.holds(old) > 0 })
	for range 20 {
		await(t, a1, a1.submit(1, 1000), journal.DurableTwoSites)
	}
	if got := b1.holds(old); got == backlog {
		t.Fatal("the backlog arrived before the new record")
	}
}

// describe logs what each node holds, and from which nodes it pulls.
func (w *world) describe() {
	if err := pprof.Lookup("goroutine").WriteTo(os.Stderr, 1); err != nil {
		w.t.Log(err)
	}
	for _, name := range w.order {
		n := w.nodes[name]
		w.t.Logf("%s pulls from %v", name, n.repl.sources())
		for s, e := range n.log.Ends() {
			w.t.Logf("  holds %s to %d, of %d; applied to %d; known: %v", s, e.Durable, n.repl.tracker.snapshot().MostHeld(s), n.table.Applied(s), n.repl.Holders(s))
		}
	}
}

func (l *tracker) snapshot() Watermarks {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.marks.Clone()
}
