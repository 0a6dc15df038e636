package replication

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/dsnode/dsnode/storage/journal"
)

// The noted durability stays, even if watermarks decrease or the node restarts.
func TestNotedDurabilityNeverDecreases(t *testing.T) {
	dir := t.TempDir()
	open := func() *durableNote {
		t.Helper()
		n, damaged, err := openDurableNote(dir)
		if err != nil || damaged != nil {
			t.Fatal(damaged, err)
		}
		return n
	}
	s, gone := journal.Stream{Origin: "a/1", Incarnation: journal.Incarnation{1}}, journal.Stream{Origin: "b"}
	n := open()
	steps := []struct {
		now  map[journal.Stream]levelSeqs
		seq  uint64
		want journal.Durability
	}{
		{map[journal.Stream]levelSeqs{s: {10, 0, 0, 0}, gone: {1, 1, 1, 1}}, 5, journal.DurableNode},
		{map[journal.Stream]levelSeqs{s: {10, 0, 7, 5}}, 5, journal.DurableTwoCities},
		{map[journal.Stream]levelSeqs{s: {10, 0, 0, 0}}, 5, journal.DurableTwoCities}, // watermarks decreased
		{map[journal.Stream]levelSeqs{s: {12, 0, 0, 0}}, 6, journal.DurableTwoSites},
		{map[journal.Stream]levelSeqs{s: {12, 0, 0, 0}}, 12, journal.DurableNode},
		{map[journal.Stream]levelSeqs{s: {12, 0, 0, 0}}, 13, ""},
	}
	for i, step := range steps {
		if err := n.update(step.now); err != nil {
			t.Fatal(err)
		}
		if got := n.best(s, step.seq); got != step.want {
			t.Errorf("step %d: record %d is %q, want %q", i, step.seq, got, step.want)
		}
		want := step.want
		if want == journal.DurableNode {
			want = "" // not noted, since the journal knows it
		}
		if n = open(); n.best(s, step.seq) != step.want && n.best(s, step.seq) != want {
			t.Errorf("step %d: after a restart the durability is %q", i, n.best(s, step.seq))
		}
	}
	if n.best(gone, 1) != "" {
		t.Error("the note has a stream that is not held")
	}
}

func TestDamagedNoteIsDiscarded(t *testing.T) {
	dir := t.TempDir()
	n, _, err := openDurableNote(dir)
	if err != nil {
		t.Fatal(err)
	}
	s := journal.Stream{Origin: "a"}
	if err := n.update(map[journal.Stream]levelSeqs{s: {4, 4, 4, 4}}); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, noteFile)
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for at := range b {
		bad := append([]byte(nil), b...)
		bad[at] ^= 4
		if err := os.WriteFile(path, bad, 0o600); err != nil {
			t.Fatal(err)
		}
		n, damaged, err := openDurableNote(dir)
		if err != nil {
			t.Fatal(err)
		}
		if damaged == nil || n.best(s, 4) != "" {
			t.Fatalf("a note with byte %d of %q changed to %q was accepted", at, b, bad[at])
		}
	}
}

func FuzzDurableNote(f *testing.F) {
	good, err := durableNoteFile{Format: noteFormat, Streams: map[string]levelSeqs{"a/" + journal.Incarnation{}.String(): {1, 2, 3, 4}}}.encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		noted, err := decodeDurableNote(b)
		if err != nil && noted != nil {
			t.Fatal("both a durability and an error were returned")
		}
	})
}
