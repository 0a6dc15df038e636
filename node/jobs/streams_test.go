package jobs

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/storage/journal"
)

// TestReturnedStreamIsNoIsland: a node that lost its disk gets its own streams back from
// peers. They may have another owner, so it starts none of their jobs, also not after a
// restart.
func TestReturnedStreamIsNoIsland(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		before := newWorld(t)
		before.spare.Store(0)
		before.start()
		stream, _, _ := before.streams.current()
		before.until("the stream is agreed on", func() bool { return before.streams.agreed(stream) })
		id := before.submit().ID
		before.agreed.give(t, stream, "here-2")

		after := newWorld(t) // the same node with an empty disk
		after.ring, after.agreed = before.ring, before.agreed
		after.start()
		frames, _, err := before.log.Read(stream, 1, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := after.log.Receive(t.Context(), stream, frames); err != nil {
			t.Fatal(err)
		}
		before.stop()
		for range 2 {
			time.Sleep(30 * time.Second)
			if after.streams.island(stream) {
				t.Error("the stream counts as an island")
			}
			if got := after.get(id).Status; got != journal.Queued {
				t.Errorf("a job of another owner is %s", got)
			}
			after.restart()
		}
		after.stop()
	})
}

// TestDisowned: a node whose stream has another owner, or was dropped, accepts new jobs in a
// new stream, whether it lost its lease meanwhile or not.
func TestDisowned(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		w.start()
		for _, done := range []bool{false, true} {
			stream, _, _ := w.streams.current()
			w.until("the stream is agreed on", func() bool { return w.streams.agreed(stream) })
			give := proposal{agreed.CmdStreamOwn, agreed.StreamOwn{
				Stream: keyOf(stream), Owner: "here-2", Expect: w.agreed.State().Streams[keyOf(stream)].Token, Term: 1,
			}}
			drop := proposal{agreed.CmdStreamDrop, agreed.StreamDrop{Owner: "here-2", Streams: []string{keyOf(stream)}}}
			if done {
				w.agreed.at(t, give, drop)
			} else {
				w.agreed.at(t, give)
			}
			w.until("there is a new stream", func() bool { now, _, _ := w.streams.current(); return now != stream })
			w.await(w.submit().ID, journal.Succeeded)
			if _, err := w.log.Append(t.Context(), stream, []journal.Record{{Stream: stream, Kind: journal.CancelAsked, Job: newID(time.Now())}}); err == nil {
				t.Error("the stream of another owner still takes records")
			}
		}
	})
}

// TestOwnedAgain: if a stream went to another owner and came back, that owner may have
// executed jobs, even if this node saw both changes at once.
func TestOwnedAgain(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		w.spare.Store(0)
		w.start()
		stream, _, _ := w.streams.current()
		w.until("the stream is agreed on", func() bool { return w.streams.agreed(stream) })
		id := w.submit().ID
		gate := make(chan struct{})
		w.copies.mu.Lock()
		w.copies.caughtUp = gate
		w.copies.mu.Unlock()
		j := w.agreed.State().Streams[keyOf(stream)]
		w.agreed.mu.Lock()
		between := agreed.FenceToken{Generation: 1, Index: w.agreed.index + 1}
		w.agreed.mu.Unlock()
		w.agreed.at(t,
			proposal{agreed.CmdStreamOwn, agreed.StreamOwn{Stream: j.Key(), Owner: "here-2", Expect: j.Token, Term: 1}},
			proposal{agreed.CmdStreamOwn, agreed.StreamOwn{Stream: j.Key(), Owner: w.node, Expect: between, Term: 1}})
		w.spare.Store(10)
		time.Sleep(10 * time.Second)
		if got := w.get(id).Status; got != journal.Queued {
			t.Errorf("before the other owner's records are here the job is %s", got)
		}
		close(gate)
		w.await(id, journal.Succeeded)
	})
}

// TestWaitsForASteadyLease: a node that has just started hears no peer yet, so it can't know
// which records other nodes hold of a stream that others may have executed.
func TestWaitsForASteadyLease(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		w.spare.Store(0)
		w.start()
		stream, _, _ := w.streams.current()
		w.until("the stream is agreed on", func() bool { return w.streams.agreed(stream) })
		id := w.submit().ID
		w.agreed.lease(false)
		w.restart()
		w.spare.Store(10)
		time.Sleep(10 * time.Second)
		asked := func() int {
			w.copies.mu.Lock()
			defer w.copies.mu.Unlock()
			return w.copies.asked
		}
		if asked() > 0 {
			t.Error("without a lease it took those that it hears for all")
		}
		w.agreed.lease(true)
		w.await(id, journal.Succeeded)
		if asked() == 0 {
			t.Error("it did not ask what the others hold")
		}
	})
}

// TestAdoptedStreamStays: an adopter drops a stream only when its origin writes to a later
// one.
func TestAdoptedStreamStays(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		w.start()
		open := func(digit string) string {
			i := strings.Repeat(digit, 32)
			w.agreed.at(t, proposal{agreed.CmdStreamOpen, agreed.StreamOpen{Origin: "there-1", Incarnation: i}})
			return agreed.StreamKey("there-1", i)
		}
		key := open("a")
		w.agreed.at(t, proposal{agreed.CmdStreamOwn, agreed.StreamOwn{Stream: key, Owner: w.node, Expect: w.agreed.State().Streams[key].Token, Term: 1}})
		time.Sleep(time.Minute)
		if _, agreed := w.agreed.State().Streams[key]; !agreed {
			t.Error("the stream is done with while its origin writes to it")
		}
		open("b")
		w.until("the stream is dropped", func() bool { _, agreed := w.agreed.State().Streams[key]; return !agreed })
	})
}

// TestLostDiskIsNotDone: a stream whose records this node's disk has lost has no jobs here. It
// is dropped only when the jobs that other nodes hold have ended.
func TestLostDiskIsNotDone(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		gate := make(chan struct{})
		w.copies.mu.Lock()
		w.copies.caughtUp = gate
		w.copies.mu.Unlock()
		earlier := strings.Repeat("c", 32)
		w.agreed.at(t, proposal{agreed.CmdStreamOpen, agreed.StreamOpen{Origin: w.node, Incarnation: earlier}})
		w.start()
		agreed := func() bool {
			_, agreed := w.agreed.State().Streams[agreed.StreamKey(w.node, earlier)]
			return agreed
		}
		time.Sleep(time.Minute)
		if !agreed() {
			t.Error("it is done with before anybody was asked")
		}
		close(gate)
		w.until("the stream is dropped", func() bool { return !agreed() })
	})
}

// TestDisownedAgainAndAgain: a leader that takes a living node for gone adopts each stream that
// the node opens. The node opens few of them, runs its jobs all the time, and says what is
// wrong. When the leader stops doing that, all is as before.
func TestDisownedAgainAndAgain(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		w.start()
		silent := 0
		for began := time.Now(); time.Since(began) < 10*time.Minute; time.Sleep(250 * time.Millisecond) {
			adopts := time.Since(began) < 5*time.Minute
			for _, j := range w.agreed.State().StreamsOf(w.node) {
				if st, _ := streamOf(j); adopts {
					w.agreed.give(t, st, "here-2")
				}
			}
			w.until("it writes a stream of its own", func() bool { s, _, _ := w.streams.current(); return !w.streams.lost(s) })
			w.await(w.submit().ID, journal.Succeeded)
			// It says nothing for the moment in which a stream is agreed on.
			if adopts && !strings.Contains(w.Problem(), "times in a row") {
				silent++
			}
		}
		if silent > 30 {
			t.Errorf("in five minutes it said %d times that nothing is wrong", silent)
		}
		if n := len(w.agreed.State().Streams); n > 12 {
			t.Errorf("in five minutes it opened %d streams", n)
		}
		if p := w.Problem(); p != "" {
			t.Errorf("in the end: %s", p)
		}
		if current, _, _ := w.streams.current(); !w.streams.agreed(current) {
			t.Error("its stream is not agreed on")
		}
	})
}

// TestDisownedWhileAway: a node that lost its stream while it had no lease was away. It opens
// the next one at once, each time.
func TestDisownedWhileAway(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		w.start()
		for range 4 {
			stream, _, _ := w.streams.current()
			w.until("the stream is agreed on", func() bool { return w.streams.agreed(stream) })
			time.Sleep(time.Minute)
			w.agreed.lease(false)
			time.Sleep(time.Second)
			w.agreed.give(t, stream, "here-2")
			time.Sleep(500 * time.Millisecond)
			w.agreed.lease(true)
			began := time.Now()
			w.until("the next stream is agreed on", func() bool { s, _, _ := w.streams.current(); return w.streams.agreed(s) && s != stream })
			if took := time.Since(began); took > 2*time.Second {
				t.Errorf("it proposed its next stream after %s", took)
			}
		}
	})
}

// TestStreamThatIsNotAgreedOn: jobs in a stream that was proposed and is not agreed on can't
// start. After a few seconds the node refuses more of them, and says so. It takes jobs again
// when the cluster has agreed.
func TestStreamThatIsNotAgreedOn(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		w.agreed.refuseAll(fmt.Errorf("%w: job streams", agreed.ErrStateFull))
		w.start()
		w.until("the stream was proposed", func() bool { s, _, _ := w.streams.current(); return !w.streams.island(s) })
		id := w.submit().ID
		_, err := w.Submit(t.Context(), request())
		for began := time.Now(); err == nil; _, err = w.Submit(t.Context(), request()) {
			if time.Since(began) > 10*time.Second {
				t.Fatal("it still accepts jobs that it can't start")
			}
			time.Sleep(100 * time.Millisecond)
		}
		if !errors.Is(err, ErrNoStream) {
			t.Errorf("refused with %v", err)
		}
		if p := w.Problem(); !strings.Contains(p, "job streams") || !strings.Contains(p, "wait") || !strings.Contains(p, "refuses new jobs") {
			t.Errorf("the problem is said to be %q", p)
		}
		time.Sleep(time.Minute)
		if got := w.get(id).Status; got != journal.Queued {
			t.Errorf("the job is %s", got)
		}
		w.agreed.refuseAll(nil)
		w.await(id, journal.Succeeded)
		w.await(w.submit().ID, journal.Succeeded)
		if p := w.Problem(); p != "" {
			t.Errorf("in the end: %s", p)
		}
	})
}

// A node with many streams stays with its island, whose jobs it can run, and leaves room for
// streams that it proposed before.
func TestManyStreamsLeaveRoom(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		w.open()
		fill(t, w, maxOpen, "there-1")
		w.launch()
		time.Sleep(time.Minute)
		w.await(w.submit().ID, journal.Succeeded)
		if n := len(w.agreed.State().Streams); n != maxOpen {
			t.Errorf("%d streams are agreed on, want the %d of before", n, maxOpen)
		}
		if p := w.Problem(); !strings.Contains(p, "runs new jobs alone") {
			t.Errorf("the problem is said to be %q", p)
		}
		gone := w.agreed.State().StreamsOf("there-1")[0]
		w.agreed.at(t, proposal{agreed.CmdStreamDrop, agreed.StreamDrop{Owner: "there-1", Streams: []string{gone.Key()}}})
		w.until("its stream is agreed on", func() bool { s, _, _ := w.streams.current(); return w.streams.agreed(s) })
		w.until("it says so", func() bool { return w.Problem() == "" })
	})
}

// fill gives another node streams of this one, as after many adoptions.
func fill(t *testing.T, w *world, count int, owner string) {
	t.Helper()
	for n := range count {
		i := fmt.Sprintf("%032x", n+1)
		key := agreed.StreamKey(w.node, i)
		w.agreed.at(t, proposal{agreed.CmdStreamOpen, agreed.StreamOpen{Origin: w.node, Incarnation: i}})
		w.agreed.at(t, proposal{agreed.CmdStreamOwn, agreed.StreamOwn{Stream: key, Owner: owner, Expect: w.agreed.State().Streams[key].Token, Term: 1}})
	}
}

// TestEndedIslandsAreDropped: islands of earlier processes whose jobs have ended would stay in
// every node's journal for ever. They are agreed on and dropped like other streams.
func TestEndedIslandsAreDropped(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		w.agreed.lease(false)
		w.start()
		var islands []string
		for range 3 {
			w.await(w.submit().ID, journal.Succeeded)
			stream, _, _ := w.streams.current()
			islands = append(islands, keyOf(stream))
			w.restart()
		}
		w.agreed.lease(true)
		for _, key := range islands {
			w.until("the island is dropped", func() bool { return slices.Contains(w.agreed.State().DoneStreams, key) })
		}
	})
}

// TestDamagedIslandWaits: the end of an island's job may be among the records that a damaged
// journal lost. The job does not run again before the records of other nodes are here. Jobs of
// the new stream run.
func TestDamagedIslandWaits(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		w.agreed.lease(false)
		w.spare.Store(0)
		w.start()
		island, _, _ := w.streams.current()
		id := w.submit().ID
		w.restart()
		w.spare.Store(10)
		w.await(id, journal.Succeeded) // its end is in the second stream
		second, _, _ := w.streams.current()
		w.stop()
		if err := os.RemoveAll(filepath.Join(w.dir, "table")); err != nil {
			t.Fatal(err)
		}
		corrupt(t, w.dir, second)
		gate := make(chan struct{})
		w.copies.caughtUp = gate
		w.start()
		if end, _ := w.log.End(second); end.Damaged == 0 {
			t.Fatal("the journal is not damaged")
		}
		w.agreed.lease(true)
		fresh := w.submit(func(r *Request) { r.Body = marked("fresh") }).ID
		w.await(fresh, journal.Succeeded)
		time.Sleep(time.Minute)
		if v := w.get(id); v.Status.Final() || v.Attempts > 1 {
			t.Errorf("without the lost records the job of %s is %s after %d attempts", island, v.Status, v.Attempts)
		}
		close(gate)
		w.await(id, journal.Succeeded)
	})
}

// corrupt changes a byte in the middle of a stream's first record.
func corrupt(t *testing.T, dir string, s journal.Stream) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "journal", "*", s.Incarnation.String()+"*", "*"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no files of %s: %v", s, err)
	}
	text, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	end := len(bytes.TrimRight(text, "\x00"))
	text[end/2] ^= 0xff
	if err := os.WriteFile(files[0], text, 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestChangesSurviveANewStream: the node begins a new stream while a change is written.
func TestChangesSurviveANewStream(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		w.spare.Store(0)
		w.open()
		w.o.Journal = &freezing{Log: w.log, begin: func() {
			if err := w.streams.begin(t.Context(), w.exec); err != nil {
				t.Error(err)
			}
		}}
		w.launch()
		id := w.submit().ID
		if v, err := w.Cancel(t.Context(), ann, id); err != nil {
			t.Fatalf("cancel: %v (%v)", err, v)
		}
		w.await(id, journal.Cancelled)
		if err := w.Delete(t.Context(), ann, id); err != nil {
			t.Fatalf("delete: %v", err)
		}
	})
}

// freezing begins a new stream before each submission or change is appended.
type freezing struct {
	*journal.Log
	begin func()
}

func (f *freezing) Append(ctx context.Context, s journal.Stream, records []journal.Record) (uint64, error) {
	switch records[0].Kind {
	case journal.Submitted, journal.CancelAsked, journal.Deleted:
		if end, _ := f.End(s); end.Durable > 0 || records[0].Kind == journal.Submitted && len(f.Ends()) == 1 {
			f.begin()
		}
	}
	return f.Log.Append(ctx, s, records)
}

// TestInheritance: the island jobs of a node are executed by no other node while it may come
// back. When an operator has removed it, a node that has a copy executes them, and drops the
// stream in the end.
func TestInheritance(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newWorld(t), newWorld(t)
		b.node, b.ring, b.agreed = "here-2", a.ring, a.agreed
		defer func() { a.stop(); b.stop() }()
		a.agreed.lease(false)
		a.spare.Store(0)
		a.start()
		stream, _, _ := a.streams.current()
		id := a.submit().ID
		b.start()
		deliver(t, a, b)
		a.stop() // and it does not come back
		a.agreed.lease(true)
		time.Sleep(time.Minute)
		if v := b.get(id); v.Status != journal.Queued || b.streams.agreed(stream) {
			t.Errorf("while the node may come back the job is %s", v.Status)
		}
		b.agreed.at(t, proposal{agreed.CmdNodeRemove, agreed.NodeRemove{Name: a.node}})
		b.await(id, journal.Succeeded)
		b.until("the stream is dropped", func() bool { return slices.Contains(b.agreed.State().DoneStreams, keyOf(stream)) })
	})
}

type proposal struct {
	kind agreed.CommandType
	data any
}

// at makes several changes that are seen at once.
func (a *agreement) at(t *testing.T, changes ...proposal) {
	t.Helper()
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, p := range changes {
		text, err := json.Marshal(p.data)
		if err != nil {
			t.Fatal(err)
		}
		a.index++
		next, err := agreed.Apply(a.state, agreed.Command{Format: 1, Type: p.kind, At: time.Now(), Data: text, Term: 1, Index: a.index})
		if err != nil {
			t.Fatal(err)
		}
		next.Parsed = a.state.Parsed
		a.state = next
	}
	close(a.changed)
	a.changed = make(chan struct{})
}
