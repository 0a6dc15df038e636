package jobtable

import (
	"os"
	"path/filepath"
	"testing"
)

func TestDiscardedTableIsPartialUntilItIsWhole(t *testing.T) {
	w := newWorld(t)
	dir := t.TempDir()
	want := func(when string, partial bool) *Table {
		t.Helper()
		table, err := Open(w.options(dir))
		if err != nil {
			t.Fatal(err)
		}
		if table.Partial() != partial {
			t.Errorf("%s: partial %v", when, table.Partial())
		}
		t.Cleanup(func() { _ = table.Close() }) // also by hand, which is no harm
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
	// A crash in the midst of it leaves what was noted first.
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
		t.Error("not a new file")
	}
	reopened(table)
	table = want("discarded, and opened again", true)
	for range 2 { // again is no harm
		if err := table.SetWhole(); err != nil {
			t.Fatal(err)
		}
	}
	if table.Partial() {
		t.Error("partial when it is whole")
	}
	reopened(table)
	want("whole", false)
}
