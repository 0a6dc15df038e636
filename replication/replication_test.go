package replication

import (
	"context"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/dsnode/dsnode/storage/journal"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestRecordsReachEveryNode(t *testing.T) {
	w := newWorld(t, "a1", "a2", "b1", "c1").start()
	for _, name := range w.order {
		n := w.nodes[name]
		seq := n.submit(10, 100)
		for _, level := range []journal.Durability{journal.DurableNode, journal.DurableTwoSites, journal.DurableTwoCities} {
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			if err := n.repl.Await(ctx, n.stream, seq, level); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			cancel()
		}
		w.wantEverywhere(n.stream, seq)
	}
	for _, name := range w.order {
		n := w.nodes[name]
		eventually(t, "everybody knows that all hold all", func() bool { return n.repl.HeldByAll(n.stream) == 10 })
	}
	if err := w.nodes["a1"].repl.Possible(journal.DurableSite); err != nil {
		t.Error(err)
	}
	if err := w.nodes["b1"].repl.Possible(journal.DurableSite); err == nil {
		t.Error("one node is enough for two of a site")
	}
}
