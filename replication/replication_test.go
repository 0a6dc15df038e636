package replication

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/dsnode/dsnode/replication/replicationpb"
	"github.com/dsnode/dsnode/storage/journal"
	"github.com/dsnode/dsnode/storage/keyring"
	"github.com/dsnode/dsnode/storage/keyring/keyringtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestRecordsReachEveryNode(t *testing.T) {
	w := newWorld(t, "a1", "a2", "b1", "c1").start()
	for _, name := range w.order {
		n := w.nodes[name]
		seq := n.submit(10, 100)
		for _, level := range []journal.Durability{journal.DurableNode, journal.DurableTwoSites, journal.DurableTwoCities} {
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			if err := n.repl.Await(ctx, n.stream, seq, level); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			cancel()
		}
		w.wantEverywhere(n.stream, seq)
	}
	for _, name := range w.order {
		n := w.nodes[name]
		eventually(t, n.name+" knows that all nodes hold everything", func() bool { return n.repl.HeldByAll(n.stream) == 10 })
	}
	if err := w.nodes["a1"].repl.Possible(journal.DurableSite); err != nil {
		t.Error(err)
	}
	if err := w.nodes["b1"].repl.Possible(journal.DurableSite); err != nil {
		t.Errorf("nodes of other sites stand for a neighbour: %v", err)
	}
}

func await(t testing.TB, n *node, seq uint64, level journal.Durability) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := n.repl.Await(ctx, n.stream, seq, level); err != nil {
		t.Fatalf("%s: %v", n.name, err)
	}
}

// connected waits until a record of each node has reached every other one.
func (w *world) connected() {
	w.t.Helper()
	for _, name := range w.order {
		n := w.nodes[name]
		w.wantEverywhere(n.stream, n.submit(1, 10))
	}
}

func TestRecordsCrossALinkBetweenSitesOnce(t *testing.T) {
	w := newWorld(t, "a1", "a2", "a3", "b1", "b2", "b3").start()
	w.connected()
	a1 := w.nodes["a1"]
	crossed := func() (n int) {
		w.mu.Lock()
		defer w.mu.Unlock()
		for l, bytes := range w.bytes {
			if l[0][:1] == "a" && l[1][:1] == "b" {
				n += bytes
			}
		}
		return n
	}
	before, began := crossed(), time.Now()
	const records, size = 100, 20000
	seq := a1.submit(records, size)
	w.wantEverywhere(a1.stream, seq)
	times := 1
	if time.Since(began) >= stallAfter {
		times = 2 // on a machine that stalls, a second source is correct
	}
	if got := crossed() - before; got < records*size || got > times*records*size*13/10 {
		t.Errorf("%d bytes of records caused %d bytes on the link between the sites", records*size, got)
	}
}

func TestDeadRelayIsReplaced(t *testing.T) {
	w := newWorld(t, "a1", "b1", "b2").start()
	w.connected()
	a1 := w.nodes["a1"]
	relay := rendezvous("a1", []string{"b1", "b2"})
	left := w.nodes[map[string]string{"b1": "b2", "b2": "b1"}[relay]]
	w.nodes[relay].halt()
	began := time.Now()
	seq := a1.submit(10, 100)
	await(t, a1, seq, journal.DurableTwoSites)
	t.Logf("the relay was replaced within %s", time.Since(began))
	eventually(t, "the other node holds the record", func() bool { return left.holds(a1.stream) == seq })
	w.nodes[relay].start()
	seq = a1.submit(10, 100)
	w.wantEverywhere(a1.stream, seq)
}

func TestRecordsOfADeadNodeSpread(t *testing.T) {
	w := newWorld(t, "a1", "a2", "b1", "c1").start()
	w.connected()
	a1 := w.nodes["a1"]
	// Only c1 receives the last records.
	w.sever("a1", "a2", true)
	w.sever("a1", "b1", true)
	w.sever("b1", "c1", true)
	w.sever("a2", "c1", true)
	seq := a1.submit(50, 100)
	await(t, a1, seq, journal.DurableTwoCities)
	a1.halt()
	stream := a1.stream
	for _, l := range [][2]string{{"a1", "a2"}, {"a1", "b1"}, {"b1", "c1"}, {"a2", "c1"}} {
		w.sever(l[0], l[1], false)
	}
	a2 := w.nodes["a2"]
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := a2.repl.AwaitCaughtUp(ctx); err != nil {
		t.Fatal(err)
	}
	if got := a2.holds(stream); got != seq {
		t.Errorf("caught up with %d of %d records", got, seq)
	}
	w.wantEverywhere(stream, seq)
}

// A stream has ended for a node when its origin, asked now, no longer writes it, and the
// node holds all of it. Nobody but the origin can say so.
func TestEndedStreams(t *testing.T) {
	w := newWorld(t, "a1", "b1", "c1").start()
	w.connected()
	a1, b1 := w.nodes["a1"], w.nodes["b1"]
	stream := a1.stream
	ended := func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		ended, err := b1.repl.AwaitEnded(ctx)
		if err != nil {
			t.Fatal(err)
		}
		return ended(stream)
	}
	w.wantEverywhere(stream, a1.submit(10, 100))
	if ended() {
		t.Error("it has ended while its origin writes it")
	}
	next := journal.Stream{Origin: "a1", Incarnation: journal.Incarnation{1}}
	if err := a1.log.Create(t.Context(), next); err != nil {
		t.Fatal(err)
	}
	last := a1.submit(200, 1000)
	if err := a1.log.Freeze(stream); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it has ended", ended)
	if got := b1.holds(stream); got != last {
		t.Errorf("it has ended at %d of %d records", got, last)
	}
	w.sever("a1", "b1", true)
	if ended() {
		t.Error("it has ended although its origin can't be asked")
	}
	w.sever("a1", "b1", false)
	a1.halt()
	if ended() {
		t.Error("it has ended by the word of a node that is down")
	}
	a1.start()
	eventually(t, "after a restart it has ended too", ended)
}

func TestCutSiteCatchesUp(t *testing.T) {
	w := newWorld(t, "a1", "a2", "b1", "b2", "c1").start()
	w.connected()
	w.isolate("a", true)
	a1, b1 := w.nodes["a1"], w.nodes["b1"]
	fromA, fromB := a1.submit(300, 200), b1.submit(300, 200)
	await(t, a1, fromA, journal.DurableSite)
	await(t, b1, fromB, journal.DurableTwoCities)
	if a1.repl.Reachable(journal.DurableTwoSites) {
		t.Error("Reachable is true on a site that is cut off")
	}
	eventually(t, "the note contains what a2 has", func() bool { return a1.repl.DurabilityOf(a1.stream, fromA) == journal.DurableSite })
	if got := b1.repl.HeldByAll(b1.stream); got >= fromB {
		t.Errorf("HeldByAll is %d while a site is cut off", got)
	}
	w.isolate("a", false)
	w.wantEverywhere(a1.stream, fromA)
	w.wantEverywhere(b1.stream, fromB)
	await(t, a1, fromA, journal.DurableTwoCities)
}

func TestWipedNodeGetsEverythingAgain(t *testing.T) {
	w := newWorld(t, "a1", "b1", "b2").start()
	w.connected()
	a1, b1 := w.nodes["a1"], w.nodes["b1"]
	fromA, fromB := a1.submit(100, 100), b1.submit(100, 100)
	old := a1.stream
	w.wantEverywhere(old, fromA)
	w.wantEverywhere(b1.stream, fromB)
	eventually(t, "b1 knows that a1 holds everything", func() bool { return b1.repl.HeldByAll(b1.stream) == fromB })
	a1.halt()
	a1.wipe()
	a1.start()
	// Its own records from before the disk was wiped come back too.
	w.wantEverywhere(old, fromA)
	w.wantEverywhere(b1.stream, fromB)
	w.wantEverywhere(a1.stream, a1.submit(10, 100))
	eventually(t, "all nodes know that a1 holds everything", func() bool {
		return b1.repl.HeldByAll(b1.stream) == fromB && b1.repl.HeldByAll(old) == fromA
	})
}

func TestLargeRecordsAreSentInPieces(t *testing.T) {
	w := newWorld(t, "a1", "b1").start()
	w.connected()
	a1 := w.nodes["a1"]
	seq := uint64(0)
	for _, size := range []int{100, 5 << 20, 20 << 20, 100, 3 << 20} {
		r := a1.submission(size)
		var err error
		if seq, err = a1.log.Append(t.Context(), a1.stream, []journal.Record{r}); err != nil {
			t.Fatal(err)
		}
	}
	w.wantEverywhere(a1.stream, seq)
}

func TestTrimmedRecordsArriveAsSnapshot(t *testing.T) {
	w := newWorld(t, "a1", "b1")
	w.tune = func(n *node) { n.segment, n.budget = 64<<10, 128<<10 }
	a1, b1 := w.nodes["a1"], w.nodes["b1"]
	a1.start()
	const jobs = 400
	seq := a1.submit(jobs, 1000)
	eventually(t, "the table has applied everything", func() bool { return a1.table.Applied(a1.stream) == seq })
	a1.repl.trim()
	stream := a1.stream
	a1.halt() // so that no records are cached in memory
	a1.start()
	if e, _ := a1.log.End(stream); e.First == 1 {
		t.Fatal("no records were trimmed")
	}
	b1.start()
	w.wantEverywhere(stream, seq)
	if e, _ := b1.log.End(stream); e.First == 1 {
		t.Error("the records arrived although they are trimmed")
	}
	eventually(t, "b1 has the rows", func() bool { return b1.table.Counts()[journal.Queued] == jobs })
	w.wantEverywhere(a1.stream, a1.submit(10, 100))
	eventually(t, "b1 has the new rows", func() bool { return b1.table.Counts()[journal.Queued] == jobs+10 })
	w.wantEverywhere(b1.stream, b1.submit(10, 100))
}

func TestNodeWithoutPeersKeepsItsJournals(t *testing.T) {
	w := newWorld(t, "a1")
	w.tune = func(n *node) { n.segment = 64 << 10 }
	w.start()
	a1 := w.nodes["a1"]
	seq := a1.submit(400, 1000)
	eventually(t, "the table has applied everything", func() bool { return a1.table.Applied(a1.stream) == seq })
	a1.repl.trim()
	if e, _ := a1.log.End(a1.stream); e.First != 1 {
		t.Errorf("trimmed to %d, although no other node has the records", e.First)
	}
}

func TestTrimmingWaitsForAllMembers(t *testing.T) {
	w := newWorld(t, "a1", "b1", "c1")
	w.tune = func(n *node) { n.segment = 64 << 10 }
	w.start().connected()
	a1 := w.nodes["a1"]
	w.nodes["c1"].halt()
	seq := a1.submit(400, 1000)
	await(t, a1, seq, journal.DurableTwoSites)
	eventually(t, "the table has applied everything", func() bool { return a1.table.Applied(a1.stream) == seq })
	a1.repl.trim()
	if e, _ := a1.log.End(a1.stream); e.First > 2 { // all nodes have the first record
		t.Fatalf("trimmed to %d, but c1 lacks the records", e.First)
	}
	w.nodes["c1"].start()
	eventually(t, "all nodes hold everything", func() bool { return a1.repl.HeldByAll(a1.stream) == seq })
	a1.repl.trim()
	if e, _ := a1.log.End(a1.stream); e.First <= 2 {
		t.Error("records that all nodes hold were not trimmed")
	}
}

func TestUnknownKeyIsNotAcknowledged(t *testing.T) {
	w := newWorld(t, "a1", "b1", "c1")
	theirs := keyring.NewRing()
	if err := theirs.Set(w.keys[1].ID(), w.keys...); err != nil {
		t.Fatal(err)
	}
	w.tune = func(n *node) {
		if n.name == "c1" {
			n.ring = theirs
		}
	}
	w.start().connected()
	a1, c1 := w.nodes["a1"], w.nodes["c1"]
	known := a1.submit(5, 100)
	keys := keyringtest.Rotate(t, w.ring, w.keys)
	sealed := a1.submit(5, 100)
	await(t, a1, sealed, journal.DurableTwoSites)
	eventually(t, "c1 has the records that it can open", func() bool { return c1.holds(a1.stream) == known })
	eventually(t, "the note contains what b1 has", func() bool { return a1.repl.DurabilityOf(a1.stream, sealed) == journal.DurableTwoSites })
	eventually(t, "c1 counts a waiting stream", func() bool { return testutil.ToFloat64(c1.repl.metrics.keyWaits) == 1 })
	if got := c1.holds(a1.stream); got != known {
		t.Errorf("c1 stored records up to %d, but can open them only up to %d", got, known)
	}
	if err := theirs.Set(keys[2].ID(), keys...); err != nil {
		t.Fatal(err)
	}
	await(t, a1, sealed, journal.DurableTwoCities)
	eventually(t, "no stream waits", func() bool { return testutil.ToFloat64(c1.repl.metrics.keyWaits) == 0 })
}

// Rows of a snapshot are not acknowledged either by a node that can't open them.
func TestUnknownKeyOfRows(t *testing.T) {
	w := newWorld(t, "a1", "b1")
	theirs := keyring.NewRing()
	if err := theirs.Set(w.keys[1].ID(), w.keys...); err != nil {
		t.Fatal(err)
	}
	w.tune = func(n *node) {
		n.segment, n.budget = 64<<10, 128<<10
		if n.name == "b1" {
			n.ring = theirs
		}
	}
	keys := keyringtest.Rotate(t, w.ring, w.keys)
	a1, b1 := w.nodes["a1"], w.nodes["b1"]
	a1.start()
	seq := a1.submit(400, 1000)
	eventually(t, "the table has applied everything", func() bool { return a1.table.Applied(a1.stream) == seq })
	a1.repl.trim()
	stream := a1.stream
	a1.halt()
	a1.start()
	b1.start()
	eventually(t, "a stream of b1 waits", func() bool { return testutil.ToFloat64(b1.repl.metrics.keyWaits) >= 1 })
	if got := b1.holds(stream); got != 0 {
		t.Errorf("b1 acknowledged up to %d records that it can't open", got)
	}
	if err := theirs.Set(keys[2].ID(), keys...); err != nil {
		t.Fatal(err)
	}
	w.wantEverywhere(stream, seq)
}

func TestLag(t *testing.T) {
	w := newWorld(t, "a1", "b1", "b2", "c1")
	b1, b2 := w.nodes["b1"], w.nodes["b2"]
	b1.start()
	if _, known := b1.repl.Lag("a"); known {
		t.Error("Lag is known for a site that has never answered")
	}
	if _, known := b1.repl.Behind("a"); known {
		t.Error("Behind is known for a site that has never answered")
	}
	if c := b1.repl.Copy("b"); c.LagSeconds != nil || c.RecordsBehind != nil {
		t.Errorf("Copy is known before any answer: %+v", c)
	}
	for _, name := range []string{"a1", "b2", "c1"} {
		w.nodes[name].start()
	}
	w.connected()
	small := func(n *node, site string) func() bool {
		return func() bool {
			lag, known := n.repl.Lag(site)
			behind, also := n.repl.Behind(site)
			return known && also && lag < 1.5 && behind == 0
		}
	}
	// Directly and through a relay.
	for _, n := range []*node{b1, b2} {
		for _, site := range []string{"a", "c"} {
			eventually(t, n.name+" knows its lag behind "+site, small(n, site))
		}
	}
	eventually(t, "c1 knows the copies of the other sites", func() bool {
		for _, site := range []string{"a", "b", "c"} {
			c := w.nodes["c1"].repl.Copy(site)
			if c.LagSeconds == nil || *c.LagSeconds > 5 || c.RecordsBehind == nil || *c.RecordsBehind != 0 {
				return false
			}
		}
		return true
	})
	w.isolate("a", true)
	seq := w.nodes["a1"].submit(7, 100)
	eventually(t, "the lag grows", func() bool { lag, known := b1.repl.Lag("a"); return known && lag > 3 })
	eventually(t, "Behind of a is unknown", func() bool { _, known := b1.repl.Behind("a"); return !known })
	w.isolate("a", false)
	w.wantEverywhere(w.nodes["a1"].stream, seq)
	eventually(t, "the lag is small again", small(b1, "a"))
}

func TestOnlyMembersAreServed(t *testing.T) {
	w := newWorld(t, "a1", "b1").start()
	a1 := w.nodes["a1"]
	ctx := metadata.NewIncomingContext(t.Context(), metadata.Pairs("node", "stranger"))
	s := &server{r: a1.repl}
	for name, call := range map[string]func() error{
		"Holds":   func() error { _, err := s.Holds(ctx, &replicationpb.HoldsRequest{}); return err },
		"Digests": func() error { _, err := s.Digests(ctx, &replicationpb.DigestsRequest{}); return err },
	} {
		if err := call(); status.Code(err) != codes.PermissionDenied {
			t.Errorf("%s by a node that is not a member: %v", name, err)
		}
	}
	ctx = metadata.NewIncomingContext(t.Context(), metadata.Pairs("node", "b1"))
	if _, err := s.Holds(ctx, &replicationpb.HoldsRequest{Format: wireFormat + 1}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("a newer format: %v", err)
	}
}

func TestDifferingTablesAreRepaired(t *testing.T) {
	w := newWorld(t, "a1", "b1").start()
	w.connected()
	a1, b1 := w.nodes["a1"], w.nodes["b1"]
	w.wantEverywhere(a1.stream, a1.submit(20, 100))
	// A row that only one of the tables has, as if the other had lost it.
	lost := b1.submission(3 << 20)
	lost.Stream, lost.Seq, lost.Clock = journal.Stream{Origin: "z9"}, 1, journal.ClockAt(time.Now())
	frames, err := journal.AppendFrame(nil, &lost)
	if err != nil {
		t.Fatal(err)
	}
	if err := b1.table.Merge(t.Context(), frames); err != nil {
		t.Fatal(err)
	}
	var differ [buckets]bool
	eventually(t, "the tables are compared", func() bool {
		var ok bool
		differ, ok = a1.repl.compare(t.Context(), "b1")
		return ok
	})
	n := 0
	for _, d := range differ {
		n += boolean(d)
	}
	if n != 1 {
		t.Fatalf("%d buckets differ", n)
	}
	a1.repl.repair(t.Context(), "b1", differ, [buckets]bool{})
	if _, found, err := a1.table.Get(lost.Job); found || err != nil {
		t.Fatalf("repaired after the first comparison: %v %v", found, err)
	}
	a1.repl.repair(t.Context(), "b1", differ, differ)
	if _, found, err := a1.table.Get(lost.Job); !found || err != nil {
		t.Errorf("found %v %v", found, err)
	}
	eventually(t, "the tables are equal", func() bool {
		differ, ok := b1.repl.compare(t.Context(), "a1")
		return ok && differ == [buckets]bool{}
	})
}

// A row can arrive, in a snapshot or a repair, before the stream of its records does.
// Such a stream is not a retired one.
func TestRowArrivesBeforeItsStream(t *testing.T) {
	w := newWorld(t, "a1", "b1")
	b := w.nodes["b1"]
	gone := map[journal.Stream]bool{}
	b.retired = func(s journal.Stream) bool { return gone[s] }
	b.start()
	s, done := journal.Stream{Origin: "a1", Incarnation: journal.Incarnation{1}}, journal.Stream{Origin: "a1", Incarnation: journal.Incarnation{2}}
	gone[done] = true
	b.repl.tracker.merge("a1", Watermarks{"a1": {Epoch: 1, Ends: map[journal.Stream]uint64{s: 9, done: 9}}})
	if got := b.repl.DurabilityOf(s, 3); got != "" {
		t.Errorf("a record that only one other node has is shown as %s", got)
	}
	if got := b.repl.DurabilityOf(done, 3); got != journal.DurableTwoCities {
		t.Errorf("a record of a retired stream is shown as %q", got)
	}
}

// A stream that is new on a source while the puller's call runs is sent from where the
// puller has it. Watermarks of the puller from before it lost its disk must not prevent
// that permanently.
func TestStaleWatermarksOfAPuller(t *testing.T) {
	w := newWorld(t, "a1", "b1", "b2")
	a1, b2 := w.nodes["a1"], w.nodes["b2"]
	a1.start()
	b2.start()
	s, end := a1.stream, a1.submit(5, 100)
	old := Watermarks{"b1": {Epoch: 1, Ends: map[journal.Stream]uint64{s: end}}}
	b2.repl.tracker.merge("a1", old.Clone())
	c := &sender{
		r: b2.repl, peer: "b1", wake: make(chan struct{}, 1), queue: newSendQueue(),
		wanted: map[string]bool{}, unreported: map[journal.Stream]struct{}{},
	}
	take := func(q *replicationpb.PullRequest) {
		t.Helper()
		if err := c.handle(q); err != nil {
			t.Fatal(err)
		}
	}
	take(&replicationpb.PullRequest{Want: &replicationpb.Want{Origins: []string{"c1"}}})
	eventually(t, "the source has the stream", func() bool { return b2.holds(s) == end })
	c.mu.Lock()
	c.wanted["a1"] = true
	c.follow(s)
	c.mu.Unlock()
	own := journal.Stream{Origin: "b1", Incarnation: journal.Incarnation{1}}
	take(&replicationpb.PullRequest{Marks: wireMarks(Watermarks{"b1": {Epoch: 2, Ends: map[journal.Stream]uint64{own: 0}}})})
	c.mu.Lock()
	defer c.mu.Unlock()
	if cur := c.queue.cursors[s]; cur.next != 1 || !cur.queued {
		t.Errorf("the next record to send is %d", cur.next)
	}
}

func TestAwaitEnds(t *testing.T) {
	w := newWorld(t, "a1", "b1")
	w.tune = func(n *node) { n.limits.Waiting = 1 }
	a1 := w.nodes["a1"]
	a1.start()
	seq := a1.submit(1, 10)
	await(t, a1, seq, journal.DurableNode)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- a1.repl.Await(ctx, a1.stream, seq, journal.DurableTwoSites) }()
	eventually(t, "the calls wait", func() bool {
		a1.repl.tracker.mu.Lock()
		defer a1.repl.tracker.mu.Unlock()
		return a1.repl.tracker.waiters == 1
	})
	if err := a1.repl.Await(ctx, a1.stream, seq, journal.DurableTwoSites); !errors.Is(err, ErrTooManyWaiting) {
		t.Errorf("one call too many: %v", err)
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if n := len(a1.repl.tracker.waits); n != 0 || a1.repl.tracker.waiters != 0 {
		t.Errorf("calls wait for %d streams, %d calls are counted", n, a1.repl.tracker.waiters)
	}
}
