package node

import (
	"errors"
	"log/slog"
	"slices"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/dsnode/dsnode/node/jobs"
	"github.com/dsnode/dsnode/storage/jobtable"
	"github.com/dsnode/dsnode/storage/journal"
	"github.com/dsnode/dsnode/storage/keyring/keyringtest"
)

// TestATableThatLacksRowsDeniesNothing: what it doesn't have may exist all the same.
func TestATableThatLacksRowsDeniesNothing(t *testing.T) {
	dir := t.TempDir()
	if err := jobtable.Discard(dir); err != nil {
		t.Fatal(err)
	}
	ring, _ := keyringtest.New(t, 1)
	table, err := jobtable.Open(jobtable.Options{
		Dir: dir, Sealer: journal.NewSealer(ring), Ring: ring, Clock: journal.NewHLC(time.Now, time.Minute),
		Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry(),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := table.Close(); err != nil {
			t.Error(err)
		}
	})
	w := &work{table: table}
	door := jobsDoor{w}
	answers := func() map[string]error {
		_, list := door.List(t.Context(), jobs.Caller{}, jobs.Query{})
		_, keyed := door.Submit(t.Context(), &jobs.Request{IdempotencyKey: "k"})
		_, submit := door.Submit(t.Context(), &jobs.Request{})
		return map[string]error{
			"a list": list, "a submission with a key": keyed, "a submission": submit,
			"an operator's question": door.known(true, jobs.ErrNotFound),
			"a client's question":    door.known(false, jobs.ErrNotFound),
			"another refusal":        door.known(true, jobs.ErrNotFinal),
		}
	}
	// No jobs run behind this door, which is what the last ones die of.
	want := map[string]error{
		"a list": jobs.ErrPartial, "a submission with a key": jobs.ErrPartial, "a submission": jobs.ErrNotReady,
		"an operator's question": jobs.ErrPartial, "a client's question": jobs.ErrNotFound, "another refusal": jobs.ErrNotFinal,
	}
	for what, err := range answers() {
		if !errors.Is(err, want[what]) {
			t.Errorf("%s: %v, want %v", what, err, want[what])
		}
	}
	v := well(t)
	v.table = w.partial()
	if s := describe(v); s.Healthy || !slices.Contains(s.Reasons, "node a-1: "+v.table) {
		t.Errorf("healthy %v, reasons %q", s.Healthy, s.Reasons)
	}
	if err := table.SetWhole(); err != nil {
		t.Fatal(err)
	}
	for what, err := range answers() {
		if errors.Is(err, jobs.ErrPartial) {
			t.Errorf("%s of a table that is whole: %v", what, err)
		}
	}
	v.table = w.partial()
	if s := describe(v); !s.Healthy {
		t.Errorf("reasons %q", s.Reasons)
	}
}
