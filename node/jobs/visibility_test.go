package jobs

import (
	"context"
	"testing"
	"testing/synctest"

	"github.com/dsnode/dsnode/node/serving"
	"github.com/dsnode/dsnode/storage/journal"
)

// TestShownStaysShown: a result that was shown because its durability could not be reached
// stays shown when the peer is back, in this process and in the next.
func TestShownStaysShown(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		all := journal.DurableTwoCities
		w.start()
		w.copies.say(all, journal.DurableNode, journal.DurableNode)
		id := w.submit(func(r *Request) { r.Durability = "" }).ID
		w.await(id, journal.Succeeded)
		w.copies.say(all, all, journal.DurableNode)
		if got := w.get(id).Status; got != journal.Succeeded {
			t.Errorf("when the peer was back the job went back to %s", got)
		}
		w.restart()
		if got := w.get(id).Status; got != journal.Succeeded {
			t.Errorf("after a restart the job went back to %s", got)
		}
		// A job that ends from now on waits for its durability.
		later := w.submit(func(r *Request) { r.Durability = "" }).ID
		w.until("it has ended", func() bool { return w.counts().Succeeded == 2 })
		if got := w.get(later).Status; got != journal.Running {
			t.Errorf("the job after it is %s", got)
		}
		w.await(later, journal.Succeeded) // after settleWait
	})
}

// TestEarlierResultStaysShown: the adopter of a stream writes the result of the earlier owner
// again, with its own token. Until that record is as durable as the job asked, the first one,
// which is durable enough, stays shown.
func TestEarlierResultStaysShown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := twoNodes(t)
		defer func() { a.stop(); b.stop() }()
		all := journal.DurableTwoCities
		a.copies.say(all, all, journal.DurableTwoSites)
		b.copies.say(all, all, journal.DurableTwoSites)
		finish := make(chan struct{})
		a.server = func(ctx context.Context, r serving.Request, s serving.Sink) error {
			<-finish
			return answering(`{"by":"a"}`)(ctx, r, s)
		}
		b.server = func(ctx context.Context, _ serving.Request, _ serving.Sink) error {
			<-ctx.Done()
			return ctx.Err()
		}
		stream, _, _ := a.streams.current()
		a.until("the stream is agreed on", func() bool { return a.streams.agreed(stream) })
		id := a.submit(func(r *Request) { r.Durability = journal.DurableTwoSites }).ID
		a.await(id, journal.Running)
		deliver(t, a, b)
		a.agreed.give(t, stream, b.node)
		b.until("the adopter runs it", func() bool { return b.get(id).Attempts == 2 })
		close(finish)
		a.await(id, journal.Succeeded)
		deliver(t, a, b)
		b.until("the adopter has written its result", func() bool {
			row, _, err := b.table.Get(id)
			current, ok := row.Current()
			return err == nil && ok && current.Kind == journal.Finished && current.Stream.Origin == b.node
		})
		a.copies.sayOf(b.node, journal.DurableNode)
		deliver(t, b, a)
		if v := a.get(id); v.Status != journal.Succeeded || string(v.Result) != `{"by":"a"}` {
			t.Errorf("a job that was shown as succeeded is %s, %s", v.Status, v.Result)
		}
	})
}
