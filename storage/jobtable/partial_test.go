package jobtable

import (
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// A table is partial from its creation, and after SetPartial, until SetWhole, through any
// restarts and crashes between.
func TestTableIsPartialUntilSetWhole(t *testing.T) {
	walks := 5
	if os.Getenv("DSNODE_TEST_FULL") != "" {
		walks = 200
	}
	for range walks {
		walkNotes(t, 25)
	}
}

func walkNotes(t *testing.T, steps int) {
	w, dir := newWorld(t), t.TempDir()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	var table *Table
	open := func() {
		var err error
		table, err = Open(w.options(dir))
		must(err)
	}
	remove := func(names ...string) {
		for _, name := range names {
			_ = os.Remove(filepath.Join(dir, name)) // some are not there
		}
	}
	open()
	defer func() { _ = table.Close() }() // a failed step may have closed it
	if !table.Fresh() {
		t.Error("Fresh is false for a new file")
	}
	partial, proven := true, false // what must be so
	actions := map[string]func(){
		"whole": func() {
			must(table.SetWhole())
			partial, proven = false, true
		},
		"a crash in SetWhole": func() { // both notes are on the disk
			if partial {
				must(table.SetWhole())
				must(notePartial(dir))
				must(table.Close())
				open()
				proven = true
			}
		},
		"partial": func() {
			must(table.SetPartial())
			partial = true
		},
		"restart": func() {
			must(table.Close())
			open()
		},
		"discard": func() {
			must(table.Close())
			must(Discard(dir))
			open()
			partial, proven = true, false
		},
		"a crash in Discard": func() {
			must(table.Close())
			must(notePartial(dir))
			open()
			partial = true
		},
		"wipe": func() {
			must(table.Close())
			remove(File, markFile, partialFile, wholeFile)
			open()
			partial, proven = true, false
		},
		"another file": func() { // the notes are not those of this file
			must(table.Close())
			remove(File, markFile)
			open()
			partial, proven = true, false
		},
	}
	var names, trail []string
	for name := range actions {
		names = append(names, name)
	}
	slices.Sort(names)
	for range steps {
		name := names[rand.IntN(len(names))]
		trail = append(trail, name)
		actions[name]()
		if table.Partial() != partial || table.Proven() != proven {
			t.Fatalf("partial %v, proven %v; want %v, %v, after %s", table.Partial(), table.Proven(), partial, proven, strings.Join(trail, ", "))
		}
		if since := table.PartialSince(); since.IsZero() == partial || time.Since(since) < -time.Minute {
			t.Fatalf("partial %v since %s, after %s", partial, since, strings.Join(trail, ", "))
		}
	}
}

// A table of an earlier version has no notes.
func TestTableWithoutNotesIsNeitherPartialNorProven(t *testing.T) {
	w, dir := newWorld(t), t.TempDir()
	table, err := Open(w.options(dir))
	if err != nil {
		t.Fatal(err)
	}
	if err := table.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, partialFile)); err != nil {
		t.Fatal(err)
	}
	if table, err = Open(w.options(dir)); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = table.Close() }() // only read from
	if table.Partial() || table.Proven() {
		t.Errorf("partial %v, proven %v", table.Partial(), table.Proven())
	}
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
