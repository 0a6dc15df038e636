package jobtable

import (
	"errors"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	"github.com/dsnode/dsnode/storage/journal"
	"github.com/dsnode/dsnode/storage/keyring"
)

// stepped is a table without Run: the test calls commit and sweep.
type stepped struct {
	*Table
	t testing.TB
}

func openStepped(t testing.TB, o Options) stepped {
	t.Helper()
	table, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	table.db.NoSync = true // no power failure in this test
	t.Cleanup(func() {
		if err := table.Close(); err != nil {
			t.Error(err)
		}
	})
	return stepped{table, t}
}

// settle sweeps and commits, and checks the file.
func (s stepped) settle() {
	s.t.Helper()
	if err := s.commit(); err != nil {
		s.t.Fatal(err)
	}
	if err := s.sweep(s.t.Context()); err != nil {
		s.t.Fatal(err)
	}
	checkNow(s.t, s.Table)
}

func (s stepped) apply(l *log, r journal.Record) { s.Apply(l.stream, []journal.Record{r}) }

func (s stepped) rowsInFile() int {
	s.t.Helper()
	frames, _, more, err := s.Rows(journal.JobID{}, 1<<30)
	if err != nil || more {
		s.t.Fatal(err, more)
	}
	records, err := parseFrames(frames)
	if err != nil {
		s.t.Fatal(err)
	}
	return len(records)
}

func TestRetention(t *testing.T) {
	w := newWorld(t)
	table := openStepped(t, w.options(t.TempDir()))
	l, late := w.log("a"), w.log("b")
	id, token := w.newID(), journal.Token{Generation: 1}
	expires := w.time().Add(3 * 24 * time.Hour)
	sub := journal.Submission{Tenant: "x", KeyHash: "k", ExpiresAt: expires}
	table.apply(l, l.submit(id, sub))
	copied := late.submit(id, sub)
	w.pass(time.Hour)
	table.apply(l, l.finish(id, token, 1, journal.Outcome{Status: journal.Succeeded, Body: []byte("answer")}))

	w.pass(defaultRetention - time.Second)
	table.settle()
	if row, ok, err := table.Get(id); err != nil || !ok || row.Status() != journal.Succeeded {
		t.Fatalf("within its retention: %v, %v, %v", row, ok, err)
	}
	cut := table.digestsCut()

	w.pass(2 * time.Second)
	table.settle()
	row, ok, err := table.Get(id)
	if err != nil || !ok || !row.Deleted() || row.ID() != id {
		t.Fatalf("after its retention: %v, %v, %v", row, ok, err)
	}
	if n := table.rowsInFile(); n != 0 {
		t.Errorf("the file still has %d records", n)
	}
	if n := table.Counts()[journal.Succeeded]; n != 0 {
		t.Errorf("%d jobs succeeded", n)
	}
	if ids, err := table.FindKey("k"); err != nil || len(ids) != 0 {
		t.Errorf("FindKey: %v, %v", ids, err)
	}
	if slot := slotOf(l.all[1].Clock.Time()); slot >= table.digestsCut() || table.digestsCut() < cut {
		t.Errorf("slot %d is compared (cut %d), but some nodes have forgotten it", slot, table.digestsCut())
	}

	// A late copy does not restore the job, and its id still works as a cursor.
	table.apply(late, copied)
	table.settle()
	if row, _, err := table.Get(id); err != nil || !row.Deleted() {
		t.Fatalf("after a late copy: %v, %v", row, err)
	}
	if _, _, err := table.List(Filter{AllTenants: true, After: id}); err != nil {
		t.Errorf("List after the job: %v", err)
	}
	if _, _, err := table.List(Filter{AllTenants: true, After: w.newID()}); !errors.Is(err, ErrUnknownCursor) {
		t.Errorf("List after an unknown job: %v", err)
	}

	w.pass(expires.Add(idGrace).Sub(w.time()) - time.Second)
	table.settle()
	if row, ok, _ := table.Get(id); !ok || !row.Deleted() {
		t.Fatal("the id was forgotten too early")
	}
	w.pass(2 * time.Second)
	table.settle()
	if row, ok, err := table.Get(id); ok || err != nil {
		t.Fatalf("the id is still known: %v, %v", row, err)
	}
}

func TestQueuedJobIsKept(t *testing.T) {
	w := newWorld(t)
	table := openStepped(t, w.options(t.TempDir()))
	l := w.log("a")
	id := w.newID()
	table.apply(l, l.submit(id, journal.Submission{}))
	w.pass(30 * 24 * time.Hour)
	table.settle()
	if row, ok, err := table.Get(id); err != nil || !ok || row.Status() != journal.Queued {
		t.Fatalf("%v, %v, %v", row, ok, err)
	}
}

// A result that replaces another one moves the end of the job, by which it is swept.
func TestRetentionBeginsAtTheCurrentResult(t *testing.T) {
	w := newWorld(t)
	table := openStepped(t, w.options(t.TempDir()))
	l := w.log("a")
	id := w.newID()
	table.apply(l, l.submit(id, journal.Submission{}))
	table.apply(l, l.finish(id, journal.Token{Generation: 1, Index: 1}, 1, journal.Outcome{Status: journal.Failed}))
	w.pass(defaultRetention - time.Minute)
	table.settle()
	table.apply(l, l.finish(id, journal.Token{Generation: 1, Index: 2}, 1, journal.Outcome{Status: journal.Succeeded}))
	w.pass(2 * time.Minute)
	table.settle()
	if row, _, err := table.Get(id); err != nil || row.Status() != journal.Succeeded || len(row.Late()) != 1 {
		t.Fatalf("%v, %v", row, err)
	}
}

func TestDeletionIsForgotten(t *testing.T) {
	w := newWorld(t)
	table := openStepped(t, w.options(t.TempDir()))
	l := w.log("a")
	id := w.newID()
	table.apply(l, l.submit(id, journal.Submission{}))
	table.apply(l, l.write(journal.Record{Kind: journal.Deleted, Job: id}))
	w.pass(maxExpiry + idGrace - time.Second)
	table.settle()
	if n := table.rowsInFile(); n != 1 {
		t.Fatalf("%d records, want the deletion: other nodes need it", n)
	}
	if _, _, err := table.List(Filter{AllTenants: true, After: id}); err != nil {
		t.Errorf("List after the job: %v", err)
	}
	w.pass(2 * time.Second)
	table.settle()
	if _, ok, err := table.Get(id); ok || err != nil {
		t.Fatal("the id is still known", err)
	}
}

func TestRecordsWithoutSubmissionAreRemoved(t *testing.T) {
	w := newWorld(t)
	table := openStepped(t, w.options(t.TempDir()))
	home, executor := w.log("a"), w.log("b")
	gone, found := w.newID(), w.newID()
	sub := home.submit(found, journal.Submission{})
	for _, id := range []journal.JobID{gone, found} {
		table.apply(executor, executor.start(id, journal.Token{Generation: 1}, 1))
		if _, ok, err := table.Get(id); ok || err != nil {
			t.Fatalf("a job without submission is shown (%v)", err)
		}
	}
	w.pass(orphanFor - time.Second)
	table.settle()
	table.apply(home, sub)
	w.pass(2 * time.Second)
	table.settle()
	if row, ok, err := table.Get(found); err != nil || !ok || row.Status() != journal.Running {
		t.Fatalf("after the submission arrived: %v, %v, %v", row, ok, err)
	}
	if n := table.rowsInFile(); n != 2 {
		t.Errorf("%d records, want 2", n)
	}
}

// When the key of a submission arrives later, the job is then added to its tenant's
// list.
func TestSubmissionIsOpenedWhenItsKeyArrives(t *testing.T) {
	w := newWorld(t)
	table := openStepped(t, w.options(t.TempDir()))
	l := w.log("a")
	id := w.newID()
	r := fromDisk(t, l.submit(id, journal.Submission{Tenant: "x"}))
	other := keyring.NewDataKey(keyring.KindSeal)
	if err := w.ring.Set(other.ID(), w.keys[0], other); err != nil { // without the key that it was sealed with
		t.Fatal(err)
	}
	table.apply(l, r)
	table.settle()
	if err := table.sweepHeads(t.Context()); err != nil {
		t.Fatal(err)
	}
	of := func() int {
		t.Helper()
		rows, _, err := table.List(Filter{Tenant: "x"})
		if err != nil {
			t.Fatal(err)
		}
		return len(rows)
	}
	if row, ok, err := table.Get(id); err != nil || !ok || row.Status() != journal.Queued || of() != 0 {
		t.Fatalf("a submission without its key: %v, %v, %v", row, ok, err)
	}
	if err := w.ring.Set(other.ID(), w.keys[0], w.keys[1], other); err != nil {
		t.Fatal(err)
	}
	if err := table.sweepHeads(t.Context()); err != nil {
		t.Fatal(err)
	}
	if of() != 1 {
		t.Error("the job is not in its tenant's list although its key is known")
	}
	table.settle()
	if of() != 1 {
		t.Error("not in its tenant's list in the file")
	}
}

// Digest slots are removed with their jobs.
func TestOldDigestSlotsAreRemoved(t *testing.T) {
	w := newWorld(t)
	table := openStepped(t, w.options(t.TempDir()))
	l := w.log("a")
	for range 24 * 7 {
		id := w.newID()
		table.apply(l, l.submit(id, journal.Submission{}))
		table.apply(l, l.finish(id, journal.Token{Generation: 1}, 1, journal.Outcome{Status: journal.Succeeded}))
		w.pass(slotLength)
		table.settle()
	}
	slots := 0
	if err := table.view(func(tx *bbolt.Tx) error {
		return bucket(tx, tableDigests).ForEach(func(_, _ []byte) error { slots++; return nil })
	}); err != nil {
		t.Fatal(err)
	}
	if most := int(defaultRetention/slotLength) + 5; slots > most || slots < 20 {
		t.Errorf("%d slots, want at most %d", slots, most)
	}
}
