package jobs

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/storage/journal"
)

// trio is three nodes that share one agreed state, and that get each other's records.
type trio struct {
	t     *testing.T
	nodes []*world
	ids   []journal.JobID
}

func newTrio(t *testing.T) *trio {
	g := &trio{t: t}
	for i, name := range []string{"here-1", "here-2", "there-1"} {
		w := newWorld(t)
		w.node, w.limit, w.poll = name, time.Hour, 50*time.Millisecond
		if i > 0 {
			w.ring, w.agreed = g.nodes[0].ring, g.nodes[0].agreed
		}
		w.copies.ended = g.ended
		g.nodes = append(g.nodes, w)
	}
	return g
}

func (g *trio) stop() {
	for _, w := range g.nodes {
		w.stop()
	}
}

// ended is what the origin of a stream says about it.
func (g *trio) ended(s journal.Stream) bool {
	for _, w := range g.nodes {
		if w.node == s.Origin {
			end, _ := w.log.End(s)
			return !end.Writing
		}
	}
	return false
}

// pass lets time pass, and the records spread.
func (g *trio) pass(d time.Duration) {
	for until := time.Now().Add(d); time.Now().Before(until); time.Sleep(100 * time.Millisecond) {
		for _, from := range g.nodes {
			for _, to := range g.nodes {
				if from != to {
					deliver(g.t, from, to)
				}
			}
		}
	}
}

// unwell says what is not as it should be in the end; empty: all is well.
func (g *trio) unwell() string {
	streams := g.nodes[0].agreed.State().Streams
	for _, w := range g.nodes {
		current, _, _ := w.streams.current()
		if j, known := streams[keyOf(current)]; !known || j.Owner != w.node {
			return fmt.Sprintf("the stream of %s is not agreed on as its own (%d are agreed on)", w.node, len(streams))
		}
		if p := w.Problem(); p != "" {
			return w.node + " says: " + p
		}
		for _, id := range g.ids {
			v, err := w.Get(g.t.Context(), ann, id)
			if err != nil || v.Status != journal.Succeeded {
				return fmt.Sprintf("%s has job %s as %+v (%v)", w.node, id, v, err)
			}
		}
	}
	if len(streams) != len(g.nodes) {
		return fmt.Sprintf("%d streams are agreed on: %v", len(streams), slices.Sorted(maps.Keys(streams)))
	}
	return ""
}

// ordeal is what the nodes go through.
type ordeal struct {
	filled [3]int // agreed streams of each node at first, all owned by another one
	owners [3]int
	faults []fault
}

type fault struct {
	kind, node, adopter int
	lasts, rest         time.Duration
}

const (
	adopted   = iota // a leader takes a living node for gone
	restarted        // of one node
	noLease          // of all nodes
	refused          // all proposals are
	submitted        // no fault: a job
	faultKinds
)

func drawOrdeal(t *rapid.T) (o ordeal) {
	for i := range o.filled {
		o.filled[i] = rapid.SampledFrom([]int{0, 3, maxOpen - 1, maxOpen, agreed.MaxStreamsPerNode}).Draw(t, "streams")
		o.owners[i] = (i + rapid.IntRange(1, 2).Draw(t, "owner")) % 3
	}
	for range rapid.IntRange(1, 12).Draw(t, "faults") {
		o.faults = append(o.faults, fault{
			kind: rapid.IntRange(0, faultKinds-1).Draw(t, "kind"), node: rapid.IntRange(0, 2).Draw(t, "node"),
			adopter: rapid.IntRange(0, 2).Draw(t, "adopter"), lasts: time.Duration(rapid.IntRange(0, 8).Draw(t, "lasts")) * time.Second,
			rest: time.Duration(rapid.IntRange(0, 3).Draw(t, "rest")) * time.Second,
		})
	}
	return o
}

func (g *trio) cause(f fault) {
	w, state := g.nodes[f.node], g.nodes[0].agreed
	switch f.kind {
	case adopted:
		for _, j := range state.State().StreamsOf(w.node) {
			if f.adopter == f.node {
				break
			}
			d := agreed.StreamOwn{Stream: j.Key(), Owner: g.nodes[f.adopter].node, Expect: j.Token, Term: 1}
			// Its owner may have dropped it meanwhile.
			if _, err := state.Propose(g.t.Context(), agreed.CmdStreamOwn, d); err != nil && !errors.Is(err, agreed.ErrUnknownStream) {
				g.t.Fatal(err)
			}
		}
	case restarted:
		w.restart()
	case noLease:
		state.lease(false)
		g.pass(f.lasts)
		state.lease(true)
	case refused:
		state.refuseAll(agreed.ErrStateFull)
		g.pass(f.lasts)
		state.refuseAll(nil)
	case submitted:
		v, err := w.Submit(g.t.Context(), request(func(r *Request) { r.Body = marked(fmt.Sprint(len(g.ids))) }))
		if err == nil { // else it was refused, and nothing was promised
			g.ids = append(g.ids, v.ID)
		}
	}
	g.pass(f.rest)
}

// TestStreamsComeBack: from any state of the agreed streams, also one that is full of streams
// that others own, and after any adoptions, restarts, refusals and losses of the lease, each
// node has one agreed stream of its own within a minute of the last fault, no other stream is
// left, and every job that was accepted has run.
func TestStreamsComeBack(t *testing.T) {
	checks := 0
	rapid.Check(t, func(rt *rapid.T) {
		if checks++; checks > 25 && os.Getenv("DSNODE_TEST_FULL") == "" {
			return
		}
		o, wrong := drawOrdeal(rt), ""
		synctest.Test(t, func(t *testing.T) {
			g := newTrio(t)
			defer g.stop()
			for i, w := range g.nodes {
				w.open()
				fill(t, w, o.filled[i], g.nodes[o.owners[i]].node)
			}
			for _, w := range g.nodes {
				w.launch()
			}
			for _, f := range o.faults {
				g.cause(f)
			}
			g.pass(time.Minute)
			wrong = g.unwell()
		})
		if wrong != "" {
			rt.Fatalf("after %+v: %s", o, wrong)
		}
	})
}
