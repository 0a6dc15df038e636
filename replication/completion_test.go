package replication

import (
	"context"
	"errors"
	"os"
	"sync/atomic"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/dsnode/dsnode/replication/replicationpb"
	"github.com/dsnode/dsnode/storage/jobtable"
	"github.com/dsnode/dsnode/storage/journal"
)

// discard discards the table of a halted node.
func (n *node) discard() {
	n.w.t.Helper()
	if err := jobtable.Discard(n.dir); err != nil {
		n.w.t.Fatal(err)
	}
}

const trimmedJobs = 400

// trimmedWorld makes nodes with the same jobs, all from a1, whose journal has trimmed
// nearly all of them, and halts a1.
func trimmedWorld(t *testing.T, names ...string) (w *world, stream journal.Stream, seq uint64) {
	t.Helper()
	w = newWorld(t, names...)
	w.tune = func(n *node) { n.segment = 64 << 10 }
	w.start()
	a1 := w.nodes["a1"]
	seq = a1.submit(trimmedJobs, 1000)
	w.wantEverywhere(a1.stream, seq)
	eventually(t, "the table has applied everything", func() bool { return a1.table.Applied(a1.stream) == seq })
	eventually(t, "a1 knows that all nodes hold everything", func() bool { return a1.repl.HeldByAll(a1.stream) == seq })
	a1.repl.trim()
	stream = a1.stream
	a1.halt()
	return w, stream, seq
}

// startAndStayPartial starts a node and waits until it has looked for rows several times
// without becoming whole.
func (n *node) startAndStayPartial() {
	n.w.t.Helper()
	var looks atomic.Int64
	n.current = func() bool { looks.Add(1); return true }
	n.start()
	eventually(n.w.t, "it has looked for rows several times", func() bool { return looks.Load() > 3 || !n.table.Partial() })
	if !n.table.Partial() {
		n.w.t.Fatalf("%s is whole with %d jobs", n.name, n.queued())
	}
}

func (n *node) queued() int64 { return n.table.Counts()[journal.Queued] }

func TestDiscardedTableIsFilledFromPeers(t *testing.T) {
	w, stream, _ := trimmedWorld(t, "a1", "b1")
	a1 := w.nodes["a1"]
	w.sever("a1", "b1", true)
	a1.discard()
	a1.start()
	if e, _ := a1.log.End(stream); e.First == 1 {
		t.Fatal("no records were trimmed")
	}
	if n := a1.queued(); n == trimmedJobs || !a1.table.Partial() {
		t.Fatalf("%d jobs without a peer, partial %v", n, a1.table.Partial())
	}
	ctx := metadata.NewIncomingContext(t.Context(), metadata.Pairs("node", "b1"))
	if _, err := (&server{r: a1.repl}).Digests(ctx, &replicationpb.DigestsRequest{}); status.Code(err) != codes.Unavailable {
		t.Errorf("digests of a partial table: %v", err)
	}
	a1.halt() // it stays partial over a restart
	a1.start()
	if !a1.table.Partial() {
		t.Fatal("the table is whole after a restart")
	}
	w.sever("a1", "b1", false)
	eventually(t, "the table is whole", func() bool { return !a1.table.Partial() })
	if n := a1.queued(); n != trimmedJobs {
		t.Errorf("whole with %d jobs of %d", n, trimmedJobs)
	}
	a1.halt()
	a1.start()
	if a1.table.Partial() {
		t.Error("the table is partial again after a restart")
	}
}

// A node that lost its disk gets the rows from a node that has them, not from one whose
// table is partial.
func TestPartialTableSendsNoSnapshot(t *testing.T) {
	w, stream, seq := trimmedWorld(t, "a1", "b1", "c1")
	a1, c1 := w.nodes["a1"], w.nodes["c1"]
	w.sever("a1", "b1", true)
	w.sever("b1", "c1", true)
	c1.halt()
	c1.wipe()
	a1.discard()
	a1.start()
	c1.start()
	for range 2 { // a snapshot would be sent before the second record
		last := a1.submit(1, 100)
		eventually(t, "c1 has a new record", func() bool { return c1.holds(a1.stream) == last })
	}
	if n := testutil.ToFloat64(a1.repl.metrics.snapshots); n != 0 || c1.holds(stream) != 0 {
		t.Fatalf("%v snapshots of a partial table were sent; c1 holds up to %d", n, c1.holds(stream))
	}
	w.sever("a1", "b1", false)
	w.sever("b1", "c1", false)
	w.wantEverywhere(stream, seq)
	eventually(t, "both have all rows", func() bool {
		return !a1.table.Partial() && a1.queued() == trimmedJobs+2 && c1.queued() == trimmedJobs+2
	})
}

// When the tables of all nodes are damaged they become whole with the rows of all nodes
// together, and not before.
func TestRebuildWhenAllTablesAreDamaged(t *testing.T) {
	for name, names := range map[string][]string{"one node": {"a1"}, "two nodes": {"a1", "b1"}} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, names...).start()
			a1 := w.nodes["a1"]
			w.wantEverywhere(a1.stream, a1.submit(20, 100))
			for _, n := range w.nodes {
				n.halt()
				n.discard()
			}
			if len(names) > 1 {
				a1.startAndStayPartial()
				w.nodes["b1"].start()
			} else {
				a1.start()
			}
			for _, n := range w.nodes {
				eventually(t, n.name+" is whole", func() bool { return !n.table.Partial() })
				if got := n.queued(); got != 20 {
					t.Errorf("%s has %d jobs of 20", n.name, got)
				}
			}
		})
	}
}

// A table that was never damaged may lack the rows too, if its node is new.
func TestRebuildNeedsATableThatCoversTheTrimmedRecords(t *testing.T) {
	w, _, _ := trimmedWorld(t, "a1", "b1", "c1")
	a1, b1 := w.nodes["a1"], w.nodes["b1"]
	w.isolate("c", true)
	b1.halt()
	b1.wipe()
	b1.start()
	a1.discard()
	a1.startAndStayPartial()
	w.isolate("c", false)
	eventually(t, "the table is whole", func() bool { return !a1.table.Partial() })
	if n := a1.queued(); n != trimmedJobs {
		t.Errorf("whole with %d jobs of %d", n, trimmedJobs)
	}
}

// A node that does not know the present members yet must not assume that it has no peers.
func TestRebuildWaitsForCurrentMembers(t *testing.T) {
	w := newWorld(t, "a1")
	a1 := w.nodes["a1"]
	if err := os.MkdirAll(a1.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	a1.joins = true
	a1.discard()
	var looks atomic.Int64
	var heard atomic.Bool
	a1.current = func() bool { looks.Add(1); return heard.Load() }
	a1.start()
	eventually(t, "it has looked for rows several times", func() bool { return looks.Load() > 2 })
	if !a1.table.Partial() {
		t.Fatal("the table is whole before the members are known")
	}
	heard.Store(true)
	eventually(t, "the table is whole", func() bool { return !a1.table.Partial() })
}

// A node with a partial table is not caught up: it might execute jobs whose end is
// missing in its table.
func TestPartialTableIsNotCaughtUp(t *testing.T) {
	w, _, _ := trimmedWorld(t, "a1", "b1")
	a1 := w.nodes["a1"]
	w.sever("a1", "b1", true)
	a1.discard()
	a1.start()
	ctx, stop := context.WithTimeout(t.Context(), 2*holdsAgain)
	defer stop()
	if err := a1.repl.AwaitCaughtUp(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("caught up without a peer: %v", err)
	}
	w.sever("a1", "b1", false)
	if err := a1.repl.AwaitCaughtUp(t.Context()); err != nil || a1.table.Partial() || a1.queued() != trimmedJobs {
		t.Errorf("caught up with %d jobs of %d, partial %v: %v", a1.queued(), trimmedJobs, a1.table.Partial(), err)
	}
}

// While a node was cut off, others have got records, and may have dropped streams. When it
// hears them again it has everything only after it has compared itself with them again.
func TestNodeIsBehindAfterACut(t *testing.T) {
	w := newWorld(t, "a1", "b1").start()
	a1, b1 := w.nodes["a1"], w.nodes["b1"]
	eventually(t, "both have everything", w.healthy)
	w.sever("a1", "b1", true)
	seq := b1.submit(50, 1000)
	eventually(t, "a1 has noticed the cut", func() bool { return !a1.repl.completion.isCompared("b1") })
	if st := a1.repl.Standing(); !st.CaughtUp {
		t.Errorf("a node that hears nobody is not behind anybody: %+v", st)
	}
	w.sever("a1", "b1", false)
	eventually(t, "a1 has everything", func() bool { return a1.repl.Standing().CaughtUp })
	if got := a1.table.Visible(b1.stream); got < seq {
		t.Errorf("it says so with %d records of %d", got, seq)
	}
}

// The age of a copy does not count from when the copy's node, or its relay, dropped a
// retired stream: the source that it asks may still hold that one.
func TestCopyStaysYoungAfterAStreamWasRetired(t *testing.T) {
	w, e := endingWorld(t, "a1", "a2", "b1", "b2")
	w.connected()
	a1 := w.nodes["a1"]
	stream, seq := a1.stream, a1.submit(5, 100)
	w.wantEverywhere(stream, seq)
	a1.restart()
	w.wantEverywhere(a1.stream, a1.submit(5, 100))
	for _, name := range []string{"b1", "b2"} {
		eventually(t, name+" has heard what a1 has", func() bool { _, known := w.nodes[name].repl.Lag("a"); return known })
	}
	// The copies at b drop the stream before its source does.
	e.end(stream)
	for _, name := range []string{"b1", "b2", "a2"} {
		n := w.nodes[name]
		eventually(t, name+" drops the retired stream", func() bool { n.repl.trim(); return n.holds(stream) == 0 })
	}
	dropped := a1.repl.opts.Boottime()
	for _, name := range []string{"b1", "b2"} {
		n := w.nodes[name]
		eventually(t, name+" has heard of all a1's records since", func() bool {
			lag, known := n.repl.Lag("a")
			return known && lag < (n.repl.opts.Boottime()-dropped).Seconds()
		})
	}
}

// A table that lacked rows of another node at the last comparison is not complete because
// that node does not answer the next one.
func TestATableIsNotCompleteWhileNobodyAnswers(t *testing.T) {
	w, _, _ := trimmedWorld(t, "a1", "b1")
	a1 := w.nodes["a1"]
	w.sever("a1", "b1", true)
	a1.discard()
	a1.start()
	f := newCompletion(a1.repl)
	f.from, f.lacked["b1"] = "b1", 1
	if err := f.complete(t.Context(), []string{"b1"}, map[string]standing{}); err != nil || !a1.table.Partial() {
		t.Errorf("complete with %d jobs of %d, err %v", a1.queued(), trimmedJobs, err)
	}
}
