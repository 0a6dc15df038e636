package node

import (
	"log/slog"
	"slices"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/dsnode/dsnode/storage/jobtable"
	"github.com/dsnode/dsnode/storage/journal"
	"github.com/dsnode/dsnode/storage/keyring/keyringtest"
)

func TestStatusNamesATableThatIsRebuilt(t *testing.T) {
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
	v := well(t)
	v.table = w.partial()
	if s := describe(v); s.Healthy || !slices.Contains(s.Reasons, "node a-1: "+v.table) {
		t.Errorf("healthy %v, reasons %q", s.Healthy, s.Reasons)
	}
	if err := table.SetWhole(); err != nil {
		t.Fatal(err)
	}
	v.table = w.partial()
	if s := describe(v); !s.Healthy {
		t.Errorf("reasons %q", s.Reasons)
	}
}
