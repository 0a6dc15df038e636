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

// TestReturnedStreamIsNoIsland: what a node that lost its disk gets back of its
// own from peers may have another owner by now; it starts none of it, also not
// after its next start.
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

// TestDisowned: a node whose stream has another owner by now, or is done with,
// takes what comes then in a new one, with or without having missed a lease.
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

// TestOwnedAgain: when a stream went to another owner and came back at once, as
// this node sees it, that owner may have executed some of it.
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
			t.Errorf("before it is known what the other owner did the job is %s", got)
		}
		close(gate)
		w.await(id, journal.Succeeded)
	})
}

// TestListensFirst: a node that has just started hears nobody yet, so it can't
// know what the others hold of a stream that others may have executed.
func TestListensFirst(t *testing.T) {
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

// TestAdoptedStreamStays: an adopter is done with a stream only when its origin
// writes to another one.
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
		w.until("it is done with", func() bool { _, agreed := w.agreed.State().Streams[key]; return !agreed })
	})
}

// TestLostDiskIsNotDone: of a stream of an earlier life, whose records the disk has
// lost, there is nothing here; it is done with when what others hold is done.
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
		w.until("it is done with", func() bool { return !agreed() })
	})
}

// TestInheritance: what a node took alone and left behind is nobody's while the node
// may come back; when an operator has removed it, who has a copy executes it, and
// lets go of it in the end.
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
		a.stop() // and then it is gone for good
		a.agreed.lease(true)
		time.Sleep(time.Minute)
		if v := b.get(id); v.Status != journal.Queued || b.streams.agreed(stream) {
			t.Errorf("while its node may come back the job is %s", v.Status)
		}
		b.agreed.at(t, proposal{agreed.CmdNodeRemove, agreed.NodeRemove{Name: a.node}})
		b.await(id, journal.Succeeded)
		b.until("it is done with", func() bool { return slices.Contains(b.agreed.State().DoneStreams, keyOf(stream)) })
	})
}

type proposal struct {
	kind agreed.CommandType
	data any
}

// at makes several changes that are seen as one.
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
