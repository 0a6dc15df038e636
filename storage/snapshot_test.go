package storage

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"
)

func openSnapshots(t testing.TB, dir string) *SnapshotStore {
	t.Helper()
	s, err := OpenSnapshotStore(storeOptions(t, dir))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

var threeVoters = raft.Configuration{Servers: []raft.Server{
	{Suffrage: raft.Voter, ID: "a", Address: "10.0.0.1:1"},
	{Suffrage: raft.Voter, ID: "b", Address: "10.0.0.2:1"},
	{Suffrage: raft.Nonvoter, ID: "c", Address: "10.0.0.3:1"},
}}

func beginSnapshot(t testing.TB, s *SnapshotStore, index, term uint64) raft.SnapshotSink {
	t.Helper()
	sink, err := s.Create(1, index, term, threeVoters, index-1, nil)
	if err != nil {
		t.Fatal(err)
	}
	return sink
}

func takeSnapshot(t testing.TB, s *SnapshotStore, index, term uint64, body []byte) (id string) {
	t.Helper()
	sink := beginSnapshot(t, s, index, term)
	for piece := range slices.Chunk(body, 1000) {
		if _, err := sink.Write(piece); err != nil {
			t.Fatal(err)
		}
	}
	if err := sink.Close(); err != nil {
		t.Fatal(err)
	}
	return sink.ID()
}

func listed(t testing.TB, s *SnapshotStore) (indexes []uint64) {
	t.Helper()
	metas, err := s.List()
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range metas {
		indexes = append(indexes, m.Index)
	}
	return indexes
}

func readSnapshot(t testing.TB, s *SnapshotStore, id string) (*raft.SnapshotMeta, []byte) {
	t.Helper()
	meta, r, err := s.Open(id)
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(r)
	if err := errors.Join(err, r.Close()); err != nil {
		t.Fatal(err)
	}
	return meta, body
}

func TestSnapshotRoundTrip(t *testing.T) {
	dir := t.TempDir()
	for _, size := range []int{0, 1, 5_000_000} {
		body := bytes.Repeat([]byte("x"), size)
		id := takeSnapshot(t, openSnapshots(t, dir), uint64(10+size), 3, body)
		meta, got := readSnapshot(t, openSnapshots(t, dir), id)
		want := &raft.SnapshotMeta{
			Version: 1, ID: id, Index: uint64(10 + size), Term: 3,
			Configuration: threeVoters, ConfigurationIndex: uint64(9 + size), Size: int64(size),
		}
		if d := cmp.Diff(want, meta); d != "" {
			t.Fatal(d)
		}
		if !bytes.Equal(got, body) {
			t.Fatalf("wrote %d bytes, read %d others", len(body), len(got))
		}
	}
}

func TestTheNewestTwoSnapshotsAreKept(t *testing.T) {
	dir := t.TempDir()
	s := openSnapshots(t, dir)
	if got := listed(t, s); got != nil {
		t.Fatalf("a new store lists %v", got)
	}
	for i := range uint64(5) {
		takeSnapshot(t, s, 100*(i+1), 1, []byte("state"))
	}
	takeSnapshot(t, s, 450, 2, []byte("of a later term"))
	if got, want := listed(t, s), []uint64{450, 500}; !slices.Equal(got, want) {
		t.Fatalf("listed %v, want %v", got, want)
	}
	files, err := os.ReadDir(filepath.Join(dir, SnapshotDir))
	if err != nil || len(files) != 2 {
		t.Fatalf("%d files: %v", len(files), err)
	}
	a, b := takeSnapshot(t, s, 600, 3, nil), takeSnapshot(t, s, 600, 3, nil)
	if a == b {
		t.Fatalf("two snapshots have the id %s", a)
	}
}

func TestUnfinishedSnapshotsAreNotListed(t *testing.T) {
	dir := t.TempDir()
	s := openSnapshots(t, dir)
	takeSnapshot(t, s, 1, 1, []byte("good"))
	cancelled := beginSnapshot(t, s, 2, 1)
	if err := errors.Join(cancelled.Cancel(), cancelled.Close(), cancelled.Cancel()); err != nil {
		t.Fatal(err)
	}
	if _, err := cancelled.Write([]byte("late")); !errors.Is(err, ErrClosed) {
		t.Fatalf("write after the end: %v", err)
	}
	left := filepath.Join(dir, SnapshotDir, "snapshot-1-3-4.dss.tmp")
	writeFile(t, left, []byte("half"))
	writeFile(t, filepath.Join(dir, SnapshotDir, "notes.txt"), []byte("a person's"))
	if got := listed(t, s); !slices.Equal(got, []uint64{1}) {
		t.Fatalf("listed %v", got)
	}
	s = openSnapshots(t, dir)
	if got := listed(t, s); !slices.Equal(got, []uint64{1}) {
		t.Fatalf("listed %v", got)
	}
	if _, err := os.Stat(left); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("the unfinished file is still there: %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, SnapshotDir, "notes.txt")); err != nil {
		t.Fatalf("a file that is not a snapshot was removed: %v", err)
	}
}

func TestListSkipsDamagedSnapshots(t *testing.T) {
	dir := t.TempDir()
	o := storeOptions(t, dir)
	reg := prometheus.NewRegistry()
	o.Metrics = NewMetrics(reg)
	var logged bytes.Buffer
	o.Logger = slog.New(slog.NewTextHandler(&logged, nil))
	s, err := OpenSnapshotStore(o)
	if err != nil {
		t.Fatal(err)
	}
	old := takeSnapshot(t, s, 100, 1, []byte("old but good"))
	newer := takeSnapshot(t, s, 200, 1, bytes.Repeat([]byte("new"), 1000))
	path := filepath.Join(dir, SnapshotDir, newer+snapshotSuffix)
	good := readFile(t, path)
	spoil := func(b []byte) {
		writeFile(t, path, b)
		if got := listed(t, s); !slices.Equal(got, []uint64{100}) {
			t.Fatalf("listed %v", got)
		}
		if _, _, err := s.Open(newer); !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrNewerFormat) {
			t.Fatalf("opening a damaged snapshot: %v", err)
		}
	}
	for range 300 {
		b := bytes.Clone(good)
		b[rand.IntN(len(b))] ^= 1 << rand.IntN(8)
		spoil(b)
	}
	for range 100 {
		spoil(good[:rand.IntN(len(good))])
	}
	spoil(append(bytes.Clone(good), 0))
	spoil(readFile(t, filepath.Join(dir, SnapshotDir, old+snapshotSuffix))) // the old one under the new name
	if !strings.Contains(logged.String(), "snapshot skipped") || metric(t, reg, "dsnode_storage_damaged_total", "snapshot") < 400 {
		t.Fatal("nothing was logged")
	}

	// After another good one there are two, with the damaged one between them.
	takeSnapshot(t, s, 300, 1, []byte("good again"))
	if got := listed(t, s); !slices.Equal(got, []uint64{300, 100}) {
		t.Fatalf("listed %v", got)
	}
	takeSnapshot(t, s, 400, 1, []byte("good again"))
	if got := listed(t, s); !slices.Equal(got, []uint64{400, 300}) {
		t.Fatalf("listed %v", got)
	}
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("the damaged snapshot was not removed: %v", err)
	}
}

func TestListFailsWhenAllSnapshotsAreDamaged(t *testing.T) {
	dir := t.TempDir()
	s := openSnapshots(t, dir)
	id := takeSnapshot(t, s, 100, 1, []byte("state"))
	o := storeOptions(t, dir)
	o.Sealer = testSealer(t, 2)
	other, err := OpenSnapshotStore(o)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := other.List(); !errors.Is(err, ErrWrongKey) {
		t.Fatalf("another key: %v", err)
	}
	if err := os.Truncate(filepath.Join(dir, SnapshotDir, id+snapshotSuffix), 50); err != nil {
		t.Fatal(err)
	}
	if _, err := s.List(); !errors.Is(err, ErrDamaged) {
		t.Fatalf("damaged: %v", err)
	}
}

func TestSnapshotStoreRefusesInvalidCalls(t *testing.T) {
	s := openSnapshots(t, t.TempDir())
	if _, err := s.Create(0, 1, 1, threeVoters, 1, nil); !errors.Is(err, ErrNewerFormat) {
		t.Errorf("version 0: %v", err)
	}
	for _, id := range []string{"", "..", "../raft", "snapshot-1-2-3", "snapshot-1-2-3/../x", "snapshot-01-2-3"} {
		if _, _, err := s.Open(id); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%q: %v", id, err)
		}
	}
	sink := beginSnapshot(t, s, 1, 1)
	piece := make([]byte, maxSnapshot/2)
	for range 2 {
		if _, err := sink.Write(piece); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := sink.Write([]byte{1}); !errors.Is(err, ErrTooLarge) {
		t.Errorf("a snapshot that is too large: %v", err)
	}
	if err := sink.Cancel(); err != nil {
		t.Error(err)
	}
}

func TestFailedWriteLeavesNoSnapshot(t *testing.T) {
	dir := t.TempDir()
	o := storeOptions(t, dir)
	reg := prometheus.NewRegistry()
	o.Metrics = NewMetrics(reg)
	s, err := OpenSnapshotStore(o)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(dir, SnapshotDir)); err != nil {
		t.Fatal(err)
	}
	sink := beginSnapshot(t, s, 1, 1)
	if err := sink.Close(); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("writing to a removed directory: %v", err)
	}
	if n := metric(t, reg, "dsnode_storage_failures_total", "snapshot"); n != 1 {
		t.Fatalf("%v failures counted", n)
	}
}

func TestCheckTogetherFindsAHole(t *testing.T) {
	tests := []struct {
		name    string
		entries []*raft.Log
		covered uint64 // by the snapshot, 0 for none
		want    error
	}{
		{"no log, no snapshot", nil, 0, nil},
		{"log from the beginning", entriesFrom(1, 9, 1), 0, nil},
		{"compacted log", entriesFrom(50, 99, 1), 60, nil},
		{"log continues where the snapshot ends", entriesFrom(61, 99, 1), 60, nil},
		{"snapshot was installed", append(entriesFrom(1, 9, 1), entriesFrom(61, 99, 1)...), 60, nil},
		{"installed, nothing stored since", entriesFrom(1, 9, 1), 60, nil},
		{"snapshot covers all", entriesFrom(1, 60, 1), 60, nil},
		{"no snapshot of a compacted log", entriesFrom(50, 99, 1), 0, ErrDamaged},
		{"only an older snapshot is left", entriesFrom(62, 99, 1), 60, ErrDamaged},
		{"gap that no snapshot covers", append(entriesFrom(1, 9, 1), entriesFrom(61, 99, 1)...), 5, ErrDamaged},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			s := openRaft(t, dir)
			mustStore(t, s, tt.entries...)
			closeRaft(t, s)
			snaps := openSnapshots(t, dir)
			if tt.covered > 0 {
				takeSnapshot(t, snaps, tt.covered, 1, []byte("state"))
			}
			if err := CheckTogether(openRaft(t, dir), snaps); !errors.Is(err, tt.want) {
				t.Fatalf("got %v, want %v", err, tt.want)
			}
		})
	}
}

func FuzzParseSnapshot(f *testing.F) {
	s := testSealer(f, 1)
	id := snapshotName{1, 2, 3}.id()
	b, err := appendSnapshot(nil, s, id, snapshotMeta{RaftVersion: 1, Index: 2, Term: 1, Configuration: raft.EncodeConfiguration(threeVoters)}, []byte("body"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add(b[:len(b)/2])
	f.Add([]byte(snapshotMagic))
	f.Fuzz(func(t *testing.T, b []byte) {
		meta, body, err := parseSnapshot(b, s, id)
		if err != nil && !isUnreadable(err) {
			t.Fatalf("unnamed error %v", err)
		}
		if err == nil && meta.Size != int64(len(body)) {
			t.Fatalf("%d bytes, but the meta says %d", len(body), meta.Size)
		}
	})
}

// A fuzzer can't produce a sealed configuration, so this one tests decoding alone.
func FuzzSnapshotConfiguration(f *testing.F) {
	f.Add(raft.EncodeConfiguration(threeVoters))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, err := decodeConfiguration(b); err != nil && !errors.Is(err, ErrDamaged) {
			t.Fatalf("unnamed error %v", err)
		}
	})
}

func FuzzSnapshotName(f *testing.F) {
	for _, name := range []string{"snapshot-1-2-3.dss", "snapshot--1-2-3.dss", "snapshot-1-2-3.dss.tmp", "snapshot-1-2.dss", ""} {
		f.Add(name)
	}
	f.Fuzz(func(t *testing.T, name string) {
		if n, ok := parseSnapshotName(name); ok && n.id()+snapshotSuffix != name {
			t.Fatalf("%q was read as %q", name, n.id())
		}
	})
}
