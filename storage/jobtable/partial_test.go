package jobtable

import (
	"os"
	"path/filepath"
	"testing"
)

func TestDiscardedTableIsPartialUntilSetWhole(t *testing.T) {
	w := newWorld(t)
	dir := t.TempDir()
	want := func(when string, partial bool) *Table {
		t.Helper()
		table, err := Open(w.options(dir))
		if err != nil {
			t.Fatal(err)
		}
		if table.Partial() != partial {
			t.Errorf("%s: Partial is %v", when, table.Partial())
		}
		t.Cleanup(func() { _ = table.Close() }) // the test may have closed it, which is fine
		return table
	}
	reopened := func(table *Table) {
		t.Helper()
		if err := table.Close(); err != nil {
			t.Fatal(err)
		}
	}
	table := want("a new one", false)
	reopened(table)
	// A crash during Discard leaves the file that says "partial".
	if err := notePartial(dir); err != nil {
		t.Fatal(err)
	}
	reopened(want("before its files went", true))
	if err := Discard(dir); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, File)); !os.IsNotExist(err) {
		t.Fatalf("not discarded: %v", err)
	}
	table = want("discarded", true)
	if !table.Fresh() {
		t.Error("Fresh is false for a new file")
	}
	reopened(table)
	table = want("discarded, and opened again", true)
	for range 2 { // the second call does nothing
		if err := table.SetWhole(); err != nil {
			t.Fatal(err)
		}
	}
	if table.Partial() {
		t.Error("Partial is true after SetWhole")
	}
	reopened(table)
	want("whole", false)
}

// A table that is marked keeps its rows, and may lack others until SetWhole.
func TestMarkedTableKeepsItsRows(t *testing.T) {
	w := newWorld(t)
	dir, l, _ := filled(t, w, 10)
	if err := MarkPartial(dir); err != nil {
		t.Fatal(err)
	}
	table, err := Open(w.options(dir))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = table.Close() }()
	if !table.Partial() || table.Fresh() || table.Applied(l.stream) != l.seq {
		t.Errorf("partial %t, fresh %t, applied %d, want a partial table with all %d records", table.Partial(), table.Fresh(), table.Applied(l.stream), l.seq)
	}
}
