package node

import (
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/dsnode/dsnode/replication"
	"github.com/dsnode/dsnode/storage/jobtable"
	"github.com/dsnode/dsnode/storage/journal"
	"github.com/dsnode/dsnode/storage/keyring/keyringtest"
)

func TestMissingSaysWhatIsMissing(t *testing.T) {
	since := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for name, tc := range map[string]struct {
		st   replication.Standing
		says []string // nil: nothing is missing
	}{
		"complete":       {replication.Standing{CaughtUp: true}, nil},
		"hears nobody":   {replication.Standing{}, nil}, // other reasons say that
		"a node waits":   {replication.Standing{Partial: true, Since: since}, []string{"2026-01-02T03:04:05Z", "no node whose table is complete", "don't stop, wipe or remove"}},
		"rows arrive":    {replication.Standing{Partial: true, Since: since, Jobs: 12, Of: 3456, From: "b-1"}, []string{"it has 12 jobs and gets the 3456 jobs of node b-1"}},
		"unknown since":  {replication.Standing{Partial: true}, []string{"lacks jobs (no node"}},
		"has just begun": {replication.Standing{Behind: []string{"b-1", "c-1"}}, []string{"not yet received all jobs of b-1, c-1"}},
	} {
		got := missing(tc.st)
		if (got == "") != (tc.says == nil) {
			t.Errorf("%s: %q", name, got)
		}
		for _, part := range tc.says {
			if !strings.Contains(got, part) {
				t.Errorf("%s: %q does not say %q", name, got, part)
			}
		}
	}
}

func TestProblemsNameADiskBelowItsReserve(t *testing.T) {
	j := newTestJobs(t, 1<<50)
	if err := j.table.SetWhole(); err != nil {
		t.Fatal(err)
	}
	if problems := j.Problems(); len(problems) != 1 || !strings.Contains(problems[0], "less than its reserve of 1073741824 MiB") {
		t.Errorf("problems with a disk below its reserve: %q", problems)
	}
}

// newTestJobs has journals, with a reserve of free space (0: the default), and a table
// that is being rebuilt.
func newTestJobs(t *testing.T, reserve int64) *asyncJobs {
	t.Helper()
	dir := t.TempDir()
	if err := jobtable.Discard(dir); err != nil {
		t.Fatal(err)
	}
	ring, _ := keyringtest.New(t, 1)
	clock, logger := journal.NewHLC(time.Now, time.Minute), slog.New(slog.DiscardHandler)
	table, err := jobtable.Open(jobtable.Options{
		Dir: dir, Sealer: journal.NewSealer(ring), Ring: ring, Clock: clock, Logger: logger, Registerer: prometheus.NewRegistry(),
	})
	if err != nil {
		t.Fatal(err)
	}
	log, err := journal.Open(journal.Options{Dir: t.TempDir(), FreeFloor: reserve, Clock: clock, Logger: logger, Registerer: prometheus.NewRegistry(), Durable: table.Apply})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, closed := range []error{log.Close(), table.Close()} {
			if closed != nil {
				t.Error(closed)
			}
		}
	})
	return &asyncJobs{n: &Node{cfg: DefaultConfig()}, log: log, table: table}
}
