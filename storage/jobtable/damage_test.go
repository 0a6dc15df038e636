package jobtable

import (
	"bytes"
	"encoding/hex"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/dsnode/dsnode/storage/boltfile"
	"github.com/dsnode/dsnode/storage/journal"
)

// filled returns a directory with a closed table of n jobs.
func filled(t testing.TB, w *world, n int) (dir string, l *log, ids []journal.JobID) {
	t.Helper()
	dir, l = t.TempDir(), w.log("a")
	table, err := Open(w.options(dir))
	if err != nil {
		t.Fatal(err)
	}
	for i := range n {
		id := w.newID()
		ids = append(ids, id)
		l.submit(id, journal.Submission{Tenant: "x", Body: bytes.Repeat([]byte{byte(i)}, i%3000)})
		if i%2 == 0 {
			l.finish(id, journal.Token{Generation: 1}, 1, journal.Outcome{Status: journal.Succeeded, Body: make([]byte, i%5000)})
		}
		if i%100 == 99 {
			table.Apply(l.stream, l.all[table.streams[l.stream].seenOrZero():])
			if err := table.commit(); err != nil {
				t.Fatal(err)
			}
		}
	}
	table.Apply(l.stream, l.all)
	checkNow(t, table)
	if err := table.Close(); err != nil {
		t.Fatal(err)
	}
	return dir, l, ids
}

func (p *position) seenOrZero() uint64 {
	if p == nil {
		return 0
	}
	return p.seen
}

// TestDamagedTableIsReplaced discards and reopens the table as a node does, with the
// same options.
func TestDamagedTableIsReplaced(t *testing.T) {
	w := newWorld(t)
	dir, l, _ := filled(t, w, 10)
	o := w.options(dir)
	reg := prometheus.NewRegistry()
	o.Registerer = reg
	if err := os.Truncate(filepath.Join(dir, File), 100); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(o); !errors.Is(err, ErrDamaged) {
		t.Fatalf("opening a short file: %v", err)
	}
	if err := Discard(dir); err != nil {
		t.Fatal(err)
	}
	table, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = table.Close() }()
	table.Apply(l.stream, l.all)
	if err := table.commit(); err != nil {
		t.Fatal(err)
	}
	if n, err := testutil.GatherAndCount(reg, "dsnode_job_table_rows_written_total"); err != nil || n != 1 {
		t.Errorf("%d metrics of rows written, %v", n, err)
	}
}

func TestOpenDetectsDamage(t *testing.T) {
	w := newWorld(t)
	dir, l, _ := filled(t, w, 300)
	db, mark := filepath.Join(dir, File), filepath.Join(dir, markFile)
	whole, err := os.ReadFile(db)
	if err != nil {
		t.Fatal(err)
	}
	closed, err := os.ReadFile(mark)
	if err != nil {
		t.Fatal(err)
	}
	put := func(b []byte) func() error { return func() error { return os.WriteFile(db, b, 0o600) } }
	spoil := func(at, n int) func() error {
		b := bytes.Clone(whole)
		for i := range n {
			b[at+i] ^= 0xFF
		}
		return put(b)
	}
	m, err := boltfile.CheckFile(db, layout(boltfile.Whole))
	if err != nil {
		t.Fatal(err)
	}
	newest := int(m.Txid%2) * pageSize // bbolt alternates

	// One more transaction, so that the file is older than its mark.
	newer := t.TempDir()
	if err := errors.Join(os.WriteFile(filepath.Join(newer, File), whole, 0o600), os.WriteFile(filepath.Join(newer, markFile), closed, 0o600)); err != nil {
		t.Fatal(err)
	}
	table, err := Open(w.options(newer))
	if err != nil {
		t.Fatal(err)
	}
	table.Apply(l.stream, []journal.Record{l.submit(w.newID(), journal.Submission{})})
	if err := errors.Join(table.commit(), table.Close()); err != nil {
		t.Fatal(err)
	}
	newerMark, err := os.ReadFile(filepath.Join(newer, markFile))
	if err != nil {
		t.Fatal(err)
	}

	for _, tt := range []struct {
		name  string
		spoil func() error
		want  error
	}{
		{"undamaged", func() error { return nil }, nil},
		{"gone", func() error { return os.Remove(db) }, ErrDamaged},
		{"empty", put(nil), ErrDamaged},
		{"truncated", put(whole[:4*pageSize]), ErrDamaged},
		{"newest meta page", spoil(newest+16, 64), ErrDamaged},
		{"both meta pages", func() error {
			b := bytes.Clone(whole)
			clear(b[:2*pageSize])
			return os.WriteFile(db, b, 0o600)
		}, ErrDamaged},
		{"another table's file", func() error {
			if err := os.Remove(db); err != nil {
				return err
			}
			return createFile(dir, db)
		}, ErrDamaged},
		{"not a database", put(bytes.Repeat([]byte("no "), 40_000)), ErrDamaged},
		{"no mark", func() error { return os.Remove(mark) }, nil},
		{"torn mark", func() error { return os.WriteFile(mark, closed[:20], 0o600) }, nil},
		{"older copy", func() error { return os.WriteFile(mark, newerMark, 0o600) }, ErrDamaged},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if err := errors.Join(os.WriteFile(db, whole, 0o600), os.WriteFile(mark, closed, 0o600), tt.spoil()); err != nil {
				t.Fatal(err)
			}
			table, err := Open(w.options(dir))
			if !errors.Is(err, tt.want) {
				t.Fatalf("Open: %v, want %v", err, tt.want)
			}
			if err == nil {
				if err := table.Close(); err != nil {
					t.Error(err)
				}
				return
			}
			if _, err := Open(w.options(dir)); !errors.Is(err, tt.want) {
				t.Fatalf("Open again: %v, want %v", err, tt.want)
			}
			if err := Discard(dir); err != nil {
				t.Fatal(err)
			}
			table, err = Open(w.options(dir))
			if err != nil || !table.Fresh() {
				t.Fatalf("after Discard: %v", err)
			}
			table.Apply(l.stream, l.all)
			checkNow(t, table)
			if err := table.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// Any damage leads to ErrDamaged, never to a panic or to different content.
func TestDamageNeverChangesContent(t *testing.T) {
	w := newWorld(t)
	dir, l, ids := filled(t, w, 400)
	whole, err := os.ReadFile(filepath.Join(dir, File))
	if err != nil {
		t.Fatal(err)
	}
	killed, _, err := markFormat.Read(filepath.Join(dir, markFile))
	if err != nil {
		t.Fatal(err)
	}
	killed.State = boltfile.MarkOpen
	size := int64(len(whole)) // the file grows by more than it needs
	whole = whole[:(len(bytes.TrimRight(whole, "\x00"))/pageSize+1)*pageSize]
	want := map[journal.JobID]Row{}
	for _, r := range l.all {
		want[r.Job] = Row{Join(want[r.Job].Records, []journal.Record{r})}
	}
	found := 0
	used := len(whole) / pageSize
	const tries = 120
	for range tries {
		b := bytes.Clone(whole)
		page := rand.IntN(used) * pageSize
		switch rand.IntN(4) {
		case 0:
			b[page+rand.IntN(pageSize)] ^= 1 << rand.IntN(8)
		case 1:
			b[page+rand.IntN(200)] ^= 1 << rand.IntN(8)
		case 2:
			clear(b[page : page+pageSize])
		case 3:
			copy(b[page:page+pageSize], whole[rand.IntN(used)*pageSize:])
		}
		err := os.WriteFile(filepath.Join(dir, File), b, 0o600)
		if err == nil {
			err = os.Truncate(filepath.Join(dir, File), size)
		}
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, markFile), markFormat.Append(nil, killed), 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		table, err := Open(w.options(dir))
		if err == nil {
			for _, id := range ids {
				var row Row
				var ok bool
				if row, ok, err = table.Get(id); err != nil {
					break
				}
				if ok && !equal(row.Records, want[id].Records) {
					t.Fatalf("job %s became %v", id, row)
				}
			}
			var rows []Row
			if err == nil {
				rows, _, err = table.List(Filter{Tenant: "x"})
			}
			for _, row := range rows {
				if !equal(row.Records, want[row.ID()].Records) {
					t.Fatalf("job %s is listed as %v", row.ID(), row)
				}
			}
			if err == nil {
				table.Apply(l.stream, []journal.Record{{Stream: l.stream, Seq: l.seq + 1, Clock: 1, Kind: journal.CancelAsked, Job: ids[rand.IntN(len(ids))]}})
				err = table.commit()
			}
			_ = table.Close() // it may have failed
		}
		if err != nil {
			found++
			if !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrNewerFormat) {
				t.Fatalf("the error for damage is %v", err)
			}
		}
	}
	if found < tries/6 {
		t.Errorf("%d of %d damaged files were detected", found, tries)
	}
}

// After a failed commit the file is not used again: its pages may exist only in the
// kernel's cache.
func TestFailedCommitFailsTheTable(t *testing.T) {
	w := newWorld(t)
	o := w.options(t.TempDir())
	table, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	l := w.log("a")
	ended := make(chan error, 1)
	if err := table.db.Close(); err != nil { // makes bbolt fail
		t.Fatal(err)
	}
	go func() { ended <- table.Run(t.Context()) }()
	if err := table.SetApplied(t.Context(), l.stream, 1); !errors.Is(err, ErrFailed) {
		t.Errorf("SetApplied: %v", err)
	}
	if err := <-ended; !errors.Is(err, ErrFailed) {
		t.Errorf("Run: %v", err)
	}
	if err := table.Merge(t.Context(), nil); !errors.Is(err, ErrFailed) {
		t.Errorf("Merge: %v", err)
	}
	if _, _, err := table.Get(w.newID()); !errors.Is(err, ErrFailed) {
		t.Errorf("Get: %v", err)
	}
	table.Apply(l.stream, []journal.Record{l.submit(w.newID(), journal.Submission{})}) // must return
	if n := table.Applied(l.stream); n != 0 {
		t.Errorf("applied %d", n)
	}
	if err := table.Close(); err != nil {
		t.Error(err)
	}
	if _, err := Open(o); !errors.Is(err, ErrDamaged) {
		t.Errorf("Open after a failed commit: %v", err)
	}
}

func TestGapFailsTheTable(t *testing.T) {
	w := newWorld(t)
	table := openStepped(t, w.options(t.TempDir()))
	l := w.log("a")
	l.submit(w.newID(), journal.Submission{})
	table.Apply(l.stream, []journal.Record{l.submit(w.newID(), journal.Submission{})})
	if err := table.commit(); !errors.Is(err, ErrGap) || !errors.Is(err, ErrFailed) {
		t.Errorf("commit after a gap: %v", err)
	}
}

func FuzzParseValue(f *testing.F) {
	w := newWorld(f)
	l := w.log("a")
	id := w.newID()
	s, _ := (&state{}).with([]journal.Record{l.submit(id, journal.Submission{Tenant: "x"}), l.start(id, journal.Token{Generation: 1}, 1)}, w.time())
	s.head = head{known: true, tenant: [16]byte{1}, key: [16]byte{2}, expires: 3}
	for _, s := range []state{s, {idUntil: 5, at: 7}, {records: []journal.Record{l.start(id, journal.Token{}, 1)}, firstSeen: 9}} {
		b, err := appendValue(nil, &s)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := parseValue(id, b)
		if err != nil {
			if !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrNewerFormat) {
				t.Fatal(err)
			}
			return
		}
		again, err := appendValue(nil, &s)
		if err != nil {
			t.Fatal(err)
		}
		s2, err := parseValue(id, again)
		if err != nil || !equal(s.records, s2.records) || s.head != s2.head || s.at != s2.at || s.idUntil != s2.idUntil || s.firstSeen != s2.firstSeen {
			t.Fatalf("%+v was encoded and decoded as %+v, %v", s, s2, err)
		}
		_ = s.appendIndexKeys(nil, id)
	})
}

// An older or newer version of dsnode reads the same bytes.
func TestMarkBytes(t *testing.T) {
	m := boltfile.Mark{State: boltfile.MarkClosed, Store: [16]byte{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, Txid: 7}
	const want = "44534e4a4d41524b0102000102030405060708090a0b0c0d0e0f" + "0000000000000007" + "04001cc8"
	if got := hex.EncodeToString(markFormat.Append(nil, m)); got != want {
		t.Errorf("jobs.mark is\n%s, want\n%s", got, want)
	}
}

func wantAbsent(t *testing.T, dir string, canary []byte) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) < 2 {
		t.Fatal(entries, err)
	}
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(b, canary) {
			t.Errorf("%s contains it as plaintext", e.Name())
		}
	}
}
