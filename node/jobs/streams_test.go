package jobs

import (
	"encoding/json"
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
				t.Error("the stream counts as known to nobody else")
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
