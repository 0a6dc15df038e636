package storage

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"
	"pgregory.net/rapid"
)

func storeOptions(t testing.TB, dir string) Options {
	return Options{
		Dir: dir, Sealer: testSealer(t, 1),
		Logger: slog.New(slog.DiscardHandler), Metrics: NewMetrics(prometheus.NewRegistry()),
	}
}

// openRaft opens a store that is closed when the test ends.
func openRaft(t testing.TB, dir string) *RaftStore {
	t.Helper()
	s, err := OpenRaftStore(storeOptions(t, dir))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeRaft(t, s) })
	return s
}

func closeRaft(t testing.TB, s *RaftStore) {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// entry makes an entry whose content depends on its index and term.
func entry(index, term uint64) *raft.Log {
	seed := binary.BigEndian.AppendUint64(nil, index*31+term)
	return &raft.Log{
		Index: index, Term: term, Type: raft.LogType(index % 6),
		Data:       bytes.Repeat(seed, int(1+index*37%97)),
		AppendedAt: time.Unix(int64(index), int64(term)),
	}
}

// sameEntry is used instead of cmp, which takes seconds for megabytes.
func sameEntry(a, b *raft.Log) bool {
	return a.Index == b.Index && a.Term == b.Term && a.Type == b.Type && a.AppendedAt.Equal(b.AppendedAt) &&
		bytes.Equal(a.Data, b.Data) && bytes.Equal(a.Extensions, b.Extensions)
}

func entriesFrom(first, last, term uint64) []*raft.Log {
	var logs []*raft.Log
	for i := first; i <= last; i++ {
		logs = append(logs, entry(i, term))
	}
	return logs
}

func mustStore(t testing.TB, s *RaftStore, logs ...*raft.Log) {
	t.Helper()
	if err := s.StoreLogs(logs); err != nil {
		t.Fatal(err)
	}
}

// wantLog checks that the store has exactly these entries.
func wantLog(t testing.TB, s *RaftStore, want ...*raft.Log) {
	t.Helper()
	var first, last uint64
	if len(want) > 0 {
		first, last = want[0].Index, want[len(want)-1].Index
	}
	gotFirst, err1 := s.FirstIndex()
	gotLast, err2 := s.LastIndex()
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	if gotFirst != first || gotLast != last {
		t.Fatalf("entries %d to %d, want %d to %d", gotFirst, gotLast, first, last)
	}
	for i, l := range want {
		var got raft.Log
		if err := s.GetLog(l.Index, &got); err != nil {
			t.Fatalf("entry %d: %v", l.Index, err)
		}
		if !sameEntry(l, &got) {
			t.Fatalf("entry %d came back as index %d, term %d, %d bytes", l.Index, got.Index, got.Term, len(got.Data))
		}
		if i > 0 && l.Index != want[i-1].Index+1 {
			if err := s.GetLog(l.Index-1, &got); err != raft.ErrLogNotFound { //nolint:errorlint // raft compares so
				t.Fatalf("entry %d in a gap: %v", l.Index-1, err)
			}
		}
	}
	for _, i := range []uint64{first - 1, last + 1} {
		if err := s.GetLog(i, new(raft.Log)); err != raft.ErrLogNotFound { //nolint:errorlint // raft compares so
			t.Fatalf("entry %d beyond the end: %v", i, err)
		}
	}
}

func TestRaftStoreLog(t *testing.T) {
	tests := []struct {
		name string
		do   func(t *testing.T, s *RaftStore) (want []*raft.Log)
	}{
		{"empty", func(t *testing.T, s *RaftStore) []*raft.Log { return nil }},
		{"one", func(t *testing.T, s *RaftStore) []*raft.Log {
			if err := s.StoreLog(entry(1, 1)); err != nil {
				t.Fatal(err)
			}
			return entriesFrom(1, 1, 1)
		}},
		{"nothing to store", func(t *testing.T, s *RaftStore) []*raft.Log {
			mustStore(t, s)
			return nil
		}},
		{"batches", func(t *testing.T, s *RaftStore) []*raft.Log {
			mustStore(t, s, entriesFrom(1, 64, 1)...)
			mustStore(t, s, entriesFrom(65, 70, 1)...)
			return entriesFrom(1, 70, 1)
		}},
		{"first index above 1", func(t *testing.T, s *RaftStore) []*raft.Log {
			mustStore(t, s, entriesFrom(500, 510, 3)...)
			return entriesFrom(500, 510, 3)
		}},
		{"gap after a snapshot was installed", func(t *testing.T, s *RaftStore) []*raft.Log {
			mustStore(t, s, entriesFrom(1, 5, 1)...)
			mustStore(t, s, entriesFrom(100, 105, 2)...)
			return append(entriesFrom(1, 5, 1), entriesFrom(100, 105, 2)...)
		}},
		{"compaction", func(t *testing.T, s *RaftStore) []*raft.Log {
			mustStore(t, s, entriesFrom(1, 50, 1)...)
			mustDelete(t, s, 1, 20)
			return entriesFrom(21, 50, 1)
		}},
		{"compaction from below the first index", func(t *testing.T, s *RaftStore) []*raft.Log {
			mustStore(t, s, entriesFrom(10, 50, 1)...)
			mustDelete(t, s, 0, 20)
			return entriesFrom(21, 50, 1)
		}},
		{"compaction that ends in a gap", func(t *testing.T, s *RaftStore) []*raft.Log {
			mustStore(t, s, entriesFrom(1, 5, 1)...)
			mustStore(t, s, entriesFrom(100, 105, 2)...)
			mustDelete(t, s, 1, 50)
			return entriesFrom(100, 105, 2)
		}},
		{"conflicting suffix replaced", func(t *testing.T, s *RaftStore) []*raft.Log {
			mustStore(t, s, entriesFrom(1, 50, 1)...)
			mustDelete(t, s, 31, 50)
			mustStore(t, s, entriesFrom(31, 33, 2)...)
			return append(entriesFrom(1, 30, 1), entriesFrom(31, 33, 2)...)
		}},
		{"all deleted, then new entries", func(t *testing.T, s *RaftStore) []*raft.Log {
			mustStore(t, s, entriesFrom(1, 50, 1)...)
			mustDelete(t, s, 1, 50)
			mustStore(t, s, entriesFrom(20, 22, 2)...)
			return entriesFrom(20, 22, 2)
		}},
		{"nothing to delete", func(t *testing.T, s *RaftStore) []*raft.Log {
			mustDelete(t, s, 1, 5)
			mustStore(t, s, entriesFrom(10, 12, 1)...)
			mustDelete(t, s, 1, 9)
			mustDelete(t, s, 13, 20)
			mustDelete(t, s, 12, 11)
			return entriesFrom(10, 12, 1)
		}},
		{"more than one transaction deleted from either end", func(t *testing.T, s *RaftStore) []*raft.Log {
			mustStore(t, s, entriesFrom(1, 4*deleteBatch, 1)...)
			mustDelete(t, s, 1, deleteBatch+100)
			mustDelete(t, s, 2*deleteBatch, 4*deleteBatch)
			return entriesFrom(deleteBatch+101, 2*deleteBatch-1, 1)
		}},
		{"exactly one transaction deleted", func(t *testing.T, s *RaftStore) []*raft.Log {
			mustStore(t, s, entriesFrom(1, deleteBatch, 1)...)
			mustDelete(t, s, 1, deleteBatch)
			return nil
		}},
		{"large entries", func(t *testing.T, s *RaftStore) []*raft.Log {
			a, b := entry(1, 1), entry(2, 1)
			a.Data, b.Extensions = bytes.Repeat([]byte("a"), 3<<20), bytes.Repeat([]byte("b"), 5<<20)
			mustStore(t, s, a, b)
			return []*raft.Log{a, b}
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			s := openRaft(t, dir)
			want := tt.do(t, s)
			wantLog(t, s, want...)
			closeRaft(t, s)
			s = openRaft(t, dir)
			wantLog(t, s, want...)
		})
	}
}

func mustDelete(t testing.TB, s *RaftStore, from, to uint64) {
	t.Helper()
	if err := s.DeleteRange(from, to); err != nil {
		t.Fatal(err)
	}
}

func TestRaftStoreRefusesInvalidCalls(t *testing.T) {
	s := openRaft(t, t.TempDir())
	want := entriesFrom(10, 20, 1)
	mustStore(t, s, want...)
	huge := entry(21, 1)
	huge.Data = make([]byte, maxEntry+1)
	tests := []struct {
		name string
		do   func() error
		want error
	}{
		{"an index that exists", func() error { return s.StoreLog(entry(20, 2)) }, ErrOutOfOrder},
		{"an entry before the first", func() error { return s.StoreLog(entry(3, 2)) }, ErrOutOfOrder},
		{"falling indexes", func() error { return s.StoreLogs([]*raft.Log{entry(22, 1), entry(21, 1)}) }, ErrOutOfOrder},
		{"the same index twice", func() error { return s.StoreLogs([]*raft.Log{entry(21, 1), entry(21, 1)}) }, ErrOutOfOrder},
		{"a hole", func() error { return s.DeleteRange(12, 15) }, ErrOutOfOrder},
		{"a huge entry", func() error { return s.StoreLogs([]*raft.Log{huge}) }, ErrTooLarge},
		{"a huge stable value", func() error { return s.Set([]byte("k"), make([]byte, maxStableValue+1)) }, ErrTooLarge},
		{"a stable value without a key", func() error { return s.Set(nil, []byte("v")) }, ErrTooLarge},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if err := tt.do(); !errors.Is(err, tt.want) {
				t.Fatalf("got %v, want %v", err, tt.want)
			}
			wantLog(t, s, want...)
		})
	}
	empty := openRaft(t, t.TempDir())
	if err := empty.StoreLog(entry(0, 1)); !errors.Is(err, ErrOutOfOrder) {
		t.Fatalf("index 0: %v", err)
	}
}

func TestStableValues(t *testing.T) {
	dir := t.TempDir()
	s := openRaft(t, dir)
	if b, err := s.Get([]byte("LastVoteCand")); b != nil || err != nil {
		t.Fatalf("absent value: %v %v", b, err)
	}
	if n, err := s.GetUint64([]byte("CurrentTerm")); n != 0 || err != nil {
		t.Fatalf("absent number: %v %v", n, err)
	}
	for term := range uint64(5) {
		if err := s.SetUint64([]byte("CurrentTerm"), term); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Set([]byte("LastVoteCand"), []byte("beijing-1")); err != nil {
		t.Fatal(err)
	}
	if err := s.Set([]byte("empty"), nil); err != nil {
		t.Fatal(err)
	}
	closeRaft(t, s)
	s = openRaft(t, dir)
	if n, err := s.GetUint64([]byte("CurrentTerm")); n != 4 || err != nil {
		t.Fatalf("term: %v %v", n, err)
	}
	if b, err := s.Get([]byte("LastVoteCand")); string(b) != "beijing-1" || err != nil {
		t.Fatalf("vote: %q %v", b, err)
	}
	if b, err := s.Get([]byte("empty")); len(b) != 0 || err != nil {
		t.Fatalf("empty value: %q %v", b, err)
	}
	if _, err := s.GetUint64([]byte("LastVoteCand")); err == nil {
		t.Fatal("a value that is not a number was read as one")
	}
	if s.Err() != nil {
		t.Fatalf("a wrong call failed the store: %v", s.Err())
	}
	for i := 3; i < maxStableValues; i++ {
		if err := s.SetUint64(fmt.Appendf(nil, "k%d", i), 1); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.SetUint64([]byte("one more"), 1); !errors.Is(err, ErrTooLarge) {
		t.Fatalf("one value too many: %v", err)
	}
	if err := s.SetUint64([]byte("CurrentTerm"), 9); err != nil {
		t.Fatalf("changing a value when the store is full: %v", err)
	}
}

// The store must behave as a sorted map with raft's rules, for any order of calls
// and restarts.
func TestRaftStoreAgainstAModel(t *testing.T) {
	dir := t.TempDir()
	run := 0
	rapid.Check(t, func(rt *rapid.T) {
		run++
		sub := filepath.Join(dir, fmt.Sprint(run))
		if err := os.Mkdir(sub, 0o700); err != nil {
			rt.Fatal(err)
		}
		open := func() *RaftStore {
			s, err := OpenRaftStore(storeOptions(t, sub))
			if err != nil {
				rt.Fatal(err)
			}
			return s
		}
		s := open()
		defer func() { _ = s.Close() }() // the last check may have closed it already
		var model []*raft.Log
		stable := map[string]string{}
		last := func() uint64 {
			if len(model) == 0 {
				return 0
			}
			return model[len(model)-1].Index
		}
		actions := map[string]func(*rapid.T){
			"append": func(rt *rapid.T) {
				next := last() + 1
				if rapid.IntRange(0, 9).Draw(rt, "gap") == 0 {
					next += rapid.Uint64Range(1, 1000).Draw(rt, "gap size")
				}
				var logs []*raft.Log
				for range rapid.IntRange(1, 20).Draw(rt, "batch") {
					l := entryGen().Draw(rt, "entry")
					l.Index = next
					next++
					logs = append(logs, &l)
				}
				if err := s.StoreLogs(logs); err != nil {
					rt.Fatal(err)
				}
				model = append(model, logs...)
			},
			"compact": func(rt *rapid.T) {
				if len(model) == 0 {
					rt.Skip("empty")
				}
				n := rapid.IntRange(1, len(model)).Draw(rt, "n")
				if err := s.DeleteRange(model[0].Index, model[n-1].Index); err != nil {
					rt.Fatal(err)
				}
				model = model[n:]
			},
			"truncate": func(rt *rapid.T) {
				if len(model) == 0 {
					rt.Skip("empty")
				}
				n := rapid.IntRange(0, len(model)-1).Draw(rt, "n")
				if err := s.DeleteRange(model[n].Index, last()); err != nil {
					rt.Fatal(err)
				}
				model = model[:n]
			},
			"set": func(rt *rapid.T) {
				k := rapid.SampledFrom([]string{"CurrentTerm", "LastVoteTerm", "LastVoteCand"}).Draw(rt, "key")
				v := rapid.SliceOf(rapid.Byte()).Draw(rt, "value")
				if err := s.Set([]byte(k), v); err != nil {
					rt.Fatal(err)
				}
				stable[k] = string(v)
			},
			"reopen": func(rt *rapid.T) {
				if err := s.Close(); err != nil {
					rt.Fatal(err)
				}
				s = open()
			},
			"": func(rt *rapid.T) {
				e := s.entries.Load()
				want := indexRange{}
				if len(model) > 0 {
					want = indexRange{model[0].Index, last()}
				}
				if *e != want {
					rt.Fatalf("entries %v, want %v", *e, want)
				}
				for _, l := range model {
					var got raft.Log
					if err := s.GetLog(l.Index, &got); err != nil || !sameEntry(l, &got) {
						rt.Fatalf("entry %d: %v %s", l.Index, err, cmp.Diff(*l, got))
					}
				}
				for k, v := range stable {
					if got, err := s.Get([]byte(k)); err != nil || string(got) != v {
						rt.Fatalf("%s: %q %v, want %q", k, got, err, v)
					}
				}
			},
		}
		rt.Repeat(actions)
		if err := s.Close(); err != nil {
			rt.Fatal(err)
		}
	})
}

func TestOpenNamesTheFault(t *testing.T) {
	fill := func(t *testing.T) string {
		dir := t.TempDir()
		s := openRaft(t, dir)
		mustStore(t, s, entriesFrom(1, 10, 1)...)
		closeRaft(t, s)
		return dir
	}
	tests := []struct {
		name  string
		spoil func(t *testing.T, dir string) Options
		want  error
		words string
	}{
		{"another key", func(t *testing.T, dir string) Options {
			o := storeOptions(t, dir)
			o.Sealer = testSealer(t, 2)
			return o
		}, ErrWrongKey, "node.key"},
		{"another program's file", func(t *testing.T, dir string) Options {
			writeFile(t, filepath.Join(dir, RaftFile), bytes.Repeat([]byte("not a database "), 10000))
			return storeOptions(t, dir)
		}, ErrForeign, "not a database"},
		{"an empty file", func(t *testing.T, dir string) Options {
			writeFile(t, filepath.Join(dir, RaftFile), nil)
			return storeOptions(t, dir)
		}, ErrDamaged, "join again"},
		{"the file is gone", func(t *testing.T, dir string) Options {
			if err := os.Remove(filepath.Join(dir, RaftFile)); err != nil {
				t.Fatal(err)
			}
			return storeOptions(t, dir)
		}, ErrDamaged, "it is gone"},
		{"an older copy", func(t *testing.T, dir string) Options {
			path := filepath.Join(dir, RaftFile)
			old := readFile(t, path)
			s := openRaft(t, dir)
			mustStore(t, s, entry(11, 1))
			closeRaft(t, s)
			writeFile(t, path, old)
			return storeOptions(t, dir)
		}, ErrDamaged, "older copy"},
		{"another store of the same key", func(t *testing.T, dir string) Options {
			other := t.TempDir()
			s := openRaft(t, other)
			mustStore(t, s, entriesFrom(1, 99, 1)...)
			mustStore(t, s, entriesFrom(100, 199, 1)...)
			closeRaft(t, s)
			writeFile(t, filepath.Join(dir, RaftFile), readFile(t, filepath.Join(other, RaftFile)))
			return storeOptions(t, dir)
		}, ErrDamaged, "not the file that was here before"},
		{"truncated file", func(t *testing.T, dir string) Options {
			if err := os.Truncate(filepath.Join(dir, RaftFile), 3*pageSize); err != nil {
				t.Fatal(err)
			}
			return storeOptions(t, dir)
		}, ErrDamaged, "pages are in use"},
		{"in use", func(t *testing.T, dir string) Options {
			openRaft(t, dir)
			return storeOptions(t, dir)
		}, ErrLocked, "in use"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			o := tt.spoil(t, fill(t))
			s, err := OpenRaftStore(o)
			if err == nil {
				closeRaft(t, s)
				t.Fatal("it was opened")
			}
			if !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
			if !strings.Contains(err.Error(), tt.words) {
				t.Errorf("error %q does not contain %q", err, tt.words)
			}
		})
	}
}

func TestClosedRaftStoreReturnsErrClosed(t *testing.T) {
	s := openRaft(t, t.TempDir())
	mustStore(t, s, entry(1, 1))
	closeRaft(t, s)
	_, err1 := s.FirstIndex()
	_, err2 := s.LastIndex()
	_, err3 := s.Get([]byte("k"))
	_, err4 := s.GetUint64([]byte("k"))
	for i, err := range []error{
		err1, err2, err3, err4, s.GetLog(1, new(raft.Log)), s.StoreLog(entry(2, 1)), s.StoreLogs(nil),
		s.DeleteRange(1, 1), s.Set([]byte("k"), nil), s.SetUint64([]byte("k"), 1),
	} {
		if !errors.Is(err, ErrClosed) {
			t.Errorf("call %d: %v", i, err)
		}
	}
	if s.Err() != nil {
		t.Errorf("Err after closing: %v", s.Err())
	}
}

func TestNoPlaintextOnDisk(t *testing.T) {
	dir := t.TempDir()
	canary := []byte("canary-7f3a91-canary")
	s := openRaft(t, dir)
	for i := range uint64(300) {
		mustStore(t, s, &raft.Log{Index: i + 1, Data: canary, Extensions: canary})
	}
	if err := s.Set([]byte("LastVoteCand"), canary); err != nil {
		t.Fatal(err)
	}
	mustDelete(t, s, 1, 100)
	snaps := openSnapshots(t, dir)
	takeSnapshot(t, snaps, 200, 1, bytes.Repeat(canary, 100))
	closeRaft(t, s)
	openRaft(t, dir) // this may rewrite the file
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		if bytes.Contains(readFile(t, path), canary) {
			t.Errorf("%s holds the canary as plaintext", path)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestMetricsCountSyncsAndDamage(t *testing.T) {
	dir := t.TempDir()
	reg := prometheus.NewRegistry()
	o := storeOptions(t, dir)
	o.Metrics = NewMetrics(reg)
	s, err := OpenRaftStore(o)
	if err != nil {
		t.Fatal(err)
	}
	mustStore(t, s, entriesFrom(1, 3, 1)...)
	closeRaft(t, s)
	if n := metric(t, reg, "dsnode_storage_fsync_seconds", "raft"); n != 1 {
		t.Fatalf("%v syncs counted", n)
	}
	if err := os.Truncate(filepath.Join(dir, RaftFile), pageSize); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenRaftStore(o); !errors.Is(err, ErrDamaged) {
		t.Fatal(err)
	}
	if n := metric(t, reg, "dsnode_storage_damaged_total", "raft"); n != 1 {
		t.Fatalf("%v damaged files counted", n)
	}
}

// metric returns the value of a counter, or the count of a histogram.
func metric(t testing.TB, reg *prometheus.Registry, name, store string) float64 {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if f.GetName() == name && m.GetLabel()[0].GetValue() == store {
				return m.GetCounter().GetValue() + float64(m.GetHistogram().GetSampleCount())
			}
		}
	}
	t.Fatalf("no metric %s of %s", name, store)
	return 0
}

// fsm records the commands that it applies.
type fsm struct{ applied []string }

func (f *fsm) Apply(l *raft.Log) any { f.applied = append(f.applied, string(l.Data)); return nil }
func (f *fsm) Snapshot() (raft.FSMSnapshot, error) {
	return fsmSnapshot(strings.Join(f.applied, "\n")), nil
}

func (f *fsm) Restore(r io.ReadCloser) error {
	b, err := io.ReadAll(r)
	f.applied = strings.Split(string(b), "\n")
	return err
}

type fsmSnapshot string

func (f fsmSnapshot) Persist(sink raft.SnapshotSink) error {
	if _, err := io.WriteString(sink, string(f)); err != nil {
		return err
	}
	return sink.Close()
}
func (f fsmSnapshot) Release() {}

// Raft runs on both stores, takes snapshots, compacts and restarts.
func TestRaftRestartsFromTheStores(t *testing.T) {
	dir := t.TempDir()
	var want []string
	for round := range 4 {
		s, snaps := openRaft(t, dir), openSnapshots(t, dir)
		if err := CheckTogether(s, snaps); err != nil {
			t.Fatal(err)
		}
		state := &fsm{}
		addr, trans := raft.NewInmemTransport("a")
		conf := raft.DefaultConfig()
		conf.LocalID, conf.TrailingLogs, conf.SnapshotThreshold = "a", 3, 2
		conf.HeartbeatTimeout, conf.ElectionTimeout, conf.LeaderLeaseTimeout = 50*time.Millisecond, 50*time.Millisecond, 50*time.Millisecond
		conf.Logger = hclog.NewNullLogger()
		if round == 0 {
			servers := raft.Configuration{Servers: []raft.Server{{ID: "a", Address: addr}}}
			if err := raft.BootstrapCluster(conf, s, s, snaps, trans, servers); err != nil {
				t.Fatal(err)
			}
		}
		r, err := raft.NewRaft(conf, state, s, s, snaps, trans)
		if err != nil {
			t.Fatal(err)
		}
		for leader := range r.LeaderCh() {
			if leader {
				break
			}
		}
		for i := range 10 {
			cmd := fmt.Sprintf("%d-%d", round, i)
			want = append(want, cmd)
			if err := r.Apply([]byte(cmd), 0).Error(); err != nil {
				t.Fatal(err)
			}
		}
		if round != 2 { // one round restarts from the log alone
			if err := r.Snapshot().Error(); err != nil {
				t.Fatal(err)
			}
		}
		if err := r.Shutdown().Error(); err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(want, state.applied); d != "" {
			t.Fatalf("round %d: %s", round, d)
		}
		closeRaft(t, s)
	}
}

func readFile(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func writeFile(t testing.TB, path string, b []byte) {
	t.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}
