package node

import (
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/dsnode/dsnode/storage/jobtable"
	"github.com/dsnode/dsnode/storage/journal"
	"github.com/dsnode/dsnode/storage/keyring/keyringtest"
)

func TestProblemsNameATableThatIsBeingRebuilt(t *testing.T) {
	j := newTestJobs(t, 0)
	if problems := j.Problems(); len(problems) != 1 || !strings.Contains(problems[0], "is being rebuilt") {
		t.Errorf("problems of a table that is being rebuilt: %q", problems)
	}
	if err := j.table.SetWhole(); err != nil {
		t.Fatal(err)
	}
	if problems := j.Problems(); len(problems) != 0 {
		t.Errorf("problems of a complete table: %q", problems)
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
