package jobtable

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	"github.com/dsnode/dsnode/storage/journal"
	"github.com/dsnode/dsnode/storage/notify"
)

// memoryJournals are the journals of a few streams.
type memoryJournals []*log

func (j memoryJournals) Ends() map[journal.Stream]journal.End {
	ends := map[journal.Stream]journal.End{}
	for _, l := range j {
		ends[l.stream] = journal.End{First: 1, Durable: l.seq}
	}
	return ends
}

func (j memoryJournals) End(s journal.Stream) (journal.End, bool) {
	end, held := j.Ends()[s]
	return end, held
}

func (j memoryJournals) Replay(s journal.Stream, from uint64, fn func([]journal.Record) error) error {
	for _, l := range j {
		if l.stream == s {
			return fn(l.all[from-1:])
		}
	}
	return journal.ErrNoStream
}

// startFilled is start, with KeepFilled.
func startFilled(t testing.TB, o Options, from Journals) *running {
	t.Helper()
	table := start(t, o)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- table.KeepFilled(ctx, from) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("KeepFilled: %v", err)
		}
	})
	return table
}

// spoilRow flips three bytes in the middle of a row's value, as found in a closed file.
func spoilRow(t testing.TB, dir string, id journal.JobID) {
	t.Helper()
	path := filepath.Join(dir, File)
	db, err := openBolt(path)
	if err != nil {
		t.Fatal(err)
	}
	var value []byte
	err = db.View(func(tx *bbolt.Tx) error { value = bytes.Clone(bucket(tx, tableRows).Get(id[:])); return nil })
	if err := errors.Join(err, db.Close()); err != nil || len(value) == 0 {
		t.Fatal(err, len(value))
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	spoiled := bytes.Clone(value)
	for i := range 3 {
		spoiled[len(spoiled)/2+i] ^= 0x10
	}
	// Free pages may have older copies of the row: those are damaged too.
	if !bytes.Contains(b, value) {
		t.Fatal("the row is not in the file")
	}
	if err := os.WriteFile(path, bytes.ReplaceAll(b, value, spoiled), 0o600); err != nil {
		t.Fatal(err)
	}
}

// Whatever finds a damaged row first, the table goes on: the call succeeds, the table says
// that rows may be missing, and has all rows again when the journals have been read.
func TestADamagedRowIsRebuiltWhileTheTableRuns(t *testing.T) {
	for _, finds := range []struct {
		name string
		by   func(t *testing.T, table *running, l *log, id journal.JobID) error
	}{
		{"get", func(_ *testing.T, table *running, _ *log, id journal.JobID) error {
			_, _, err := table.Get(id)
			return err
		}},
		{"list", func(_ *testing.T, table *running, _ *log, id journal.JobID) error {
			for after := (journal.JobID{}); ; {
				rows, more, err := table.List(Filter{AllTenants: true, After: after})
				if err != nil || !more {
					return err
				}
				after = rows[len(rows)-1].ID()
			}
		}},
		{"rows for another node", func(_ *testing.T, table *running, _ *log, _ journal.JobID) error {
			for after, more := (journal.JobID{}), true; more; {
				var err error
				if _, after, more, err = table.Rows(after, 1<<20); err != nil {
					return err
				}
			}
			_, _, _, err := table.Bucket(0, journal.JobID{}, 1<<20)
			return err
		}},
		{"a record of the job", func(_ *testing.T, table *running, l *log, id journal.JobID) error {
			table.Apply(l.stream, []journal.Record{l.write(journal.Record{Kind: journal.CancelAsked, Job: id})})
			return nil
		}},
		{"a commit", func(t *testing.T, table *running, l *log, id journal.JobID) error {
			// The row is in memory, and the file's is damaged when the commit reads it.
			table.Apply(l.stream, []journal.Record{l.write(journal.Record{Kind: journal.CancelAsked, Job: id})})
			return table.flush(t.Context())
		}},
		{"a look for jobs with a key", func(_ *testing.T, table *running, l *log, _ journal.JobID) error {
			_, _, _, err := table.sealedWith(journal.JobID{}, sealOf(&l.all[0]))
			return err
		}},
	} {
		t.Run(finds.name, func(t *testing.T) {
			w := newWorld(t)
			dir, l, ids := filled(t, w, 300)
			id := ids[77]
			spoilRow(t, dir, id)
			o := w.options(dir)
			table := startFilled(t, o, memoryJournals{l})
			if err := finds.by(t, table, l, id); err != nil {
				t.Fatalf("with a damaged row: %v", err)
			}
			for _, s := range []struct {
				what string
				done func() bool
			}{
				{"the file to be replaced", func() bool { return table.number.Load() == 1 }},
				{"the journals to be read", func() bool { return !table.Rebuilding() }},
			} {
				waiting, cancel := context.WithTimeout(t.Context(), 20*time.Second)
				defer cancel()
				for !s.done() {
					if err := table.flush(waiting); err != nil {
						t.Fatalf("waiting for %s: %v", s.what, err)
					}
				}
			}
			if !table.Partial() {
				t.Error("the table does not say that rows may be missing")
			}
			wantAll(t, table, l)
			if err := table.SetWhole(); err != nil || table.Partial() || !table.Proven() {
				t.Errorf("SetWhole: %v, partial %v, proven %v", err, table.Partial(), table.Proven())
			}
			table.end()
			again := start(t, o)
			if again.Partial() || again.Applied(l.stream) != l.seq {
				t.Errorf("after a restart: partial %v, applied %d of %d", again.Partial(), again.Applied(l.stream), l.seq)
			}
			wantAll(t, again, l)
		})
	}
}

func wantAll(t *testing.T, table *running, l *log) {
	t.Helper()
	want := map[journal.JobID]Row{}
	for _, r := range l.all {
		want[r.Job] = Row{Join(want[r.Job].Records, []journal.Record{r})}
	}
	for id, row := range want {
		if now := table.get(t, id); !equal(now.Records, row.Records) {
			t.Errorf("job %s is %v, want %v", id, now, row)
		}
	}
	table.check(t)
	if n := table.Jobs(); n != int64(len(want)) {
		t.Errorf("%d jobs, want %d", n, len(want))
	}
}

// While the journals are being read nobody may call the table complete, and no position is in
// the file: after a crash everything is read again.
func TestACrashDuringARebuildLosesNothing(t *testing.T) {
	w := newWorld(t)
	dir, l, ids := filled(t, w, 100)
	spoilRow(t, dir, ids[5])
	o := w.options(dir)
	table := start(t, o) // without KeepFilled: as if the journals took long
	if _, found, err := table.Get(ids[5]); err != nil || found {
		t.Fatalf("Get: %v, %v", found, err)
	}
	next := l.submit(w.newID(), journal.Submission{Tenant: "x"})
	table.Apply(l.stream, []journal.Record{next})
	if err := table.flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := table.SetWhole(); err != nil || !table.Partial() {
		t.Errorf("SetWhole while the journals are not read: %v, partial %v", err, table.Partial())
	}
	if row := table.get(t, next.Job); row.Status() != journal.Queued {
		t.Errorf("a job that came meanwhile is %v", row)
	}
	if n := table.Applied(l.stream); n != 0 {
		t.Errorf("the journal may be trimmed up to %d", n)
	}
	table.end()
	again := start(t, o)
	if !again.Partial() || again.Applied(l.stream) != 0 {
		t.Errorf("after a restart: partial %v, applied %d", again.Partial(), again.Applied(l.stream))
	}
	again.Apply(l.stream, l.all)
	wantAll(t, again, l)
}

// A flipped bit in a position would hide records for ever, and one in the seals let a key be
// dropped that rows need.
func TestOpenDetectsDamageOfNumbers(t *testing.T) {
	for _, tt := range []struct {
		name  string
		spoil func(tx *bbolt.Tx, l *log, w *world) error
	}{
		{"position", func(tx *bbolt.Tx, l *log, _ *world) error {
			return bucket(tx, tableStreams).Put(streamKey(l.stream), []byte{0, 0, 0, 1, 0, 0, 0, 0})
		}},
		{"counts", func(tx *bbolt.Tx, _ *log, _ *world) error {
			return bucket(tx, tableMeta).Put(keyCounts, make([]byte, 8*len(statuses)))
		}},
		{"seals", func(tx *bbolt.Tx, l *log, _ *world) error {
			id := sealOf(&l.all[0])
			return bucket(tx, tableSeals).Put(id[:], make([]byte, 8))
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t)
			dir, l, _ := filled(t, w, 20)
			db, err := openBolt(filepath.Join(dir, File))
			if err != nil {
				t.Fatal(err)
			}
			// The checksum stays that of what was written, for the transaction that reads it.
			err = db.Update(func(tx *bbolt.Tx) error {
				want := sumOf(tx)
				return errors.Join(tt.spoil(tx, l, w), bucket(tx, tableMeta).Put(keySum, want))
			})
			if err := errors.Join(err, db.Close()); err != nil {
				t.Fatal(err)
			}
			if err := os.Remove(filepath.Join(dir, markFile)); err != nil {
				t.Fatal(err)
			}
			if _, err := Open(w.options(dir)); !errors.Is(err, ErrDamaged) {
				t.Errorf("Open: %v, want ErrDamaged", err)
			}
		})
	}
}

// A list must not show a job under another tenant or status.
func TestAMisplacedListEntryIsDamage(t *testing.T) {
	w := newWorld(t)
	dir, l, ids := filled(t, w, 20)
	db, err := openBolt(filepath.Join(dir, File))
	if err != nil {
		t.Fatal(err)
	}
	var other [16]byte
	table := &Table{o: w.options(dir)}
	if other, err = table.tenantHash("y"); err != nil {
		t.Fatal(err)
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		return bucket(tx, indexList).Put(listKey(other, statusNumber(journal.Queued), l.all[0].Clock, ids[0]), nil)
	})
	if err := errors.Join(err, db.Close(), os.Remove(filepath.Join(dir, markFile))); err != nil {
		t.Fatal(err)
	}
	running := startFilled(t, w.options(dir), memoryJournals{l})
	if rows, _, err := running.List(Filter{Tenant: "y"}); err != nil || len(rows) != 0 {
		t.Errorf("another tenant's list: %v, %v", rows, err)
	}
}

// A full disk ends nothing: the changes wait in memory, and are written when there is room.
func TestACommitToAFullDiskIsTriedAgain(t *testing.T) {
	w := newWorld(t)
	o := w.options(t.TempDir())
	full, tried := make(chan struct{}), make(chan struct{}, 1)
	o.BeforeCommit = func() error {
		select {
		case <-full:
			return nil
		default:
			notify.Wake(tried)
			return syscall.ENOSPC
		}
	}
	table := start(t, o)
	l := w.log("a")
	table.Apply(l.stream, []journal.Record{l.submit(w.newID(), journal.Submission{Tenant: "x"})})
	<-tried
	if _, found, err := table.Get(l.all[0].Job); err != nil || !found || table.Applied(l.stream) != 0 {
		t.Errorf("on a full disk: found %v, %v, applied %d", found, err, table.Applied(l.stream))
	}
	close(full)
	if err := table.flush(t.Context()); err != nil || table.Applied(l.stream) != 1 {
		t.Errorf("with room again: %v, applied %d", err, table.Applied(l.stream))
	}
	wantAll(t, table, l)
}
