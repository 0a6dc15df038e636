package storage

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/hashicorp/raft"
	"go.etcd.io/bbolt"

	"github.com/dsnode/dsnode/storage/boltfile"
)

// content is everything that a store holds, for comparison.
type content struct {
	indexRange
	entries map[uint64]raft.Log
	stable  map[string]string
}

func contentOf(s *RaftStore) (content, error) {
	c := content{indexRange: *s.entries.Load(), entries: map[uint64]raft.Log{}, stable: map[string]string{}}
	for i := c.first; i <= c.last && i > 0; i++ {
		var l raft.Log
		err := s.GetLog(i, &l)
		if errors.Is(err, raft.ErrLogNotFound) {
			continue
		}
		if err != nil {
			return c, err
		}
		c.entries[i] = l
	}
	for _, k := range []string{"CurrentTerm", "LastVoteTerm", "LastVoteCand"} {
		v, err := s.Get([]byte(k))
		if err != nil {
			return c, err
		}
		c.stable[k] = string(v)
	}
	return c, nil
}

func (c content) equal(o content) bool {
	if c.indexRange != o.indexRange || len(c.entries) != len(o.entries) {
		return false
	}
	for i, l := range c.entries {
		if m, ok := o.entries[i]; !ok || !sameEntry(&l, &m) {
			return false
		}
	}
	for k, v := range c.stable {
		if o.stable[k] != v {
			return false
		}
	}
	return true
}

// image is the content of the store's files at one moment.
type image struct{ db, mark []byte }

func imageOf(t testing.TB, dir string) image {
	return image{readFile(t, filepath.Join(dir, RaftFile)), readFile(t, filepath.Join(dir, raftMarkFile))}
}

func (i image) write(t testing.TB, dir string) {
	writeFile(t, filepath.Join(dir, RaftFile), i.db)
	if i.mark != nil {
		writeFile(t, filepath.Join(dir, raftMarkFile), i.mark)
	} else if err := os.Remove(filepath.Join(dir, raftMarkFile)); err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
}

// closed returns i with a mark that says "closed in order": opening that is faster.
func (i image) closed() image {
	m, ok := raftMarkFormat.Parse(i.mark)
	if !ok {
		panic("no mark")
	}
	m.State = boltfile.MarkClosed
	return image{i.db, raftMarkFormat.Append(nil, m)}
}

// filled makes a store with entries and stable values on several pages.
func filled(t testing.TB, dir string) *RaftStore {
	s := openRaft(t, dir)
	mustStore(t, s, entriesFrom(1, 400, 1)...)
	mustDelete(t, s, 1, 100)
	mustStore(t, s, entriesFrom(401, 430, 2)...)
	mustStore(t, s, entriesFrom(500, 540, 3)...)
	if err := errors.Join(s.SetUint64([]byte("CurrentTerm"), 3), s.SetUint64([]byte("LastVoteTerm"), 3),
		s.Set([]byte("LastVoteCand"), []byte("shanghai-a-1"))); err != nil {
		t.Fatal(err)
	}
	return s
}

// A power failure during a transaction leaves any subset of its sectors. Data is
// synced before the meta page is written, so with torn data the store must open
// as it was before. With a torn meta page it opens as before or after.
func TestTornTransactionIsAppliedWhollyOrNotAtAll(t *testing.T) {
	transactions := []struct {
		name string
		do   func(s *RaftStore) error
	}{
		{"append one", func(s *RaftStore) error { return s.StoreLog(entry(541, 3)) }},
		{"append many", func(s *RaftStore) error { return s.StoreLogs(entriesFrom(541, 900, 3)) }},
		{"compact", func(s *RaftStore) error { return s.DeleteRange(101, 300) }},
		{"truncate", func(s *RaftStore) error { return s.DeleteRange(505, 540) }},
		{"delete all", func(s *RaftStore) error { return s.DeleteRange(0, 1000) }},
		{"vote", func(s *RaftStore) error { return s.SetUint64([]byte("LastVoteTerm"), 4) }},
	}
	tries := 40
	if testing.Short() {
		tries = 10
	}
	for _, tx := range transactions {
		t.Run(tx.name, func(t *testing.T) {
			t.Parallel()
			live := t.TempDir()
			s := filled(t, live)
			before, err := contentOf(s)
			if err != nil {
				t.Fatal(err)
			}
			old := imageOf(t, live)
			if err := tx.do(s); err != nil {
				t.Fatal(err)
			}
			after, err := contentOf(s)
			if err != nil {
				t.Fatal(err)
			}
			done := imageOf(t, live)
			if before.equal(after) || bytes.Equal(old.db, done.db) {
				t.Fatal("the transaction changed nothing")
			}
			closeRaft(t, s)

			dir := t.TempDir()
			opens := func(what string, i image, may ...content) {
				t.Helper()
				i.write(t, dir)
				s, err := OpenRaftStore(storeOptions(t, dir))
				if err != nil {
					t.Fatalf("%s: %v", what, err)
				}
				got, err := contentOf(s)
				if err != nil {
					t.Fatalf("%s: %v", what, err)
				}
				closeRaft(t, s)
				if !slices.ContainsFunc(may, got.equal) {
					t.Fatalf("%s: the content is neither that before nor that after the transaction", what)
				}
			}
			for n := range tries {
				size := []int{512, 2048, 4096}[n%3]
				opens(fmt.Sprintf("data torn in %d", size), image{tear(old.db, done.db, size), old.mark}, before)
			}
			opens("data whole, old meta", image{append(bytes.Clone(old.db[:2*pageSize]), done.db[2*pageSize:]...), old.mark}, before)
			// The mark is never synced: it may be missing or torn too.
			opens("no mark", image{tear(old.db, done.db, 512), nil}, before)
			opens("torn mark", image{tear(old.db, done.db, 512), old.mark[:20]}, before)

			for _, cut := range []int{0, 1, 16, 20, 30, 40, 56, 64, 70, 79, 80, 81, 512, 2048, 4095, 4096} {
				for _, tail := range []bool{false, true} {
					db := bytes.Clone(done.db)
					for page := range 2 {
						at := page * pageSize
						from, to := at+cut, at+pageSize
						if tail {
							from, to = at, at+cut
						}
						copy(db[from:to], old.db[from:to])
					}
					opens(fmt.Sprintf("meta torn at %d", cut), image{db, old.mark}, before, after)
				}
			}
			opens("all of it", image{done.db, old.mark}, after)
			opens("all of it, acknowledged", done, after)
		})
	}
}

// tear returns old with a random subset of the sectors that differ in done, with
// the length of either. The meta pages stay as in old.
func tear(old, done []byte, sector int) []byte {
	b := bytes.Clone(old)
	if len(done) > len(old) && rand.IntN(2) == 0 {
		b = append(b, make([]byte, len(done)-len(old))...)
	}
	for at := 2 * pageSize; at+sector <= min(len(b), len(done)); at += sector {
		if rand.IntN(2) == 0 {
			copy(b[at:at+sector], done[at:])
		}
	}
	return b
}

// After any damage of the file, opening either fails with a named error or finds
// everything that was acknowledged. It never panics.
func TestDamageIsDetectedOrHarmless(t *testing.T) {
	live := t.TempDir()
	s := filled(t, live)
	want, err := contentOf(s)
	if err != nil {
		t.Fatal(err)
	}
	good := imageOf(t, live).closed()
	closeRaft(t, s)
	used := len(bytes.TrimRight(good.db, "\x00"))

	tries := 1600
	if testing.Short() {
		tries = 300
	}
	spoil := []struct {
		name string
		do   func(b []byte) []byte
	}{
		{"bit anywhere", func(b []byte) []byte { b[rand.IntN(used)] ^= 1 << rand.IntN(8); return b }},
		{"bit in a meta page", func(b []byte) []byte { b[rand.IntN(2)*pageSize+rand.IntN(80)] ^= 1 << rand.IntN(8); return b }},
		{"bit in a page header", func(b []byte) []byte {
			b[rand.IntN(used/pageSize)*pageSize+rand.IntN(64)] ^= 1 << rand.IntN(8)
			return b
		}},
		{"number in a page header", func(b []byte) []byte {
			at := rand.IntN(used/pageSize)*pageSize + 4*rand.IntN(32)
			copy(b[at:], []byte{byte(rand.Uint32()), byte(rand.IntN(2)), 0, 0})
			return b
		}},
		{"garbage", func(b []byte) []byte {
			at := rand.IntN(used)
			for i := range min(1+rand.IntN(600), len(b)-at) {
				b[at+i] = byte(rand.Uint32())
			}
			return b
		}},
		{"zeroed page", func(b []byte) []byte {
			at := rand.IntN(used/pageSize) * pageSize
			clear(b[at : at+pageSize])
			return b
		}},
		{"one page over another", func(b []byte) []byte {
			from, to := rand.IntN(used/pageSize)*pageSize, rand.IntN(used/pageSize)*pageSize
			copy(b[to:to+pageSize], bytes.Clone(b[from:from+pageSize]))
			return b
		}},
		{"truncated", func(b []byte) []byte { return b[:rand.IntN(used)] }},
	}
	dir := t.TempDir()
	var refused, harmless int
	for n := range tries {
		how := spoil[n%len(spoil)]
		image{how.do(bytes.Clone(good.db)), good.mark}.write(t, dir)
		s, err := OpenRaftStore(storeOptions(t, dir))
		if err != nil {
			if !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrForeign) {
				t.Fatalf("%s: %v", how.name, err)
			}
			refused++
			continue
		}
		got, err := contentOf(s)
		if err != nil || !got.equal(want) {
			t.Fatalf("%s: opened with different content: %v", how.name, err)
		}
		if err := s.StoreLog(entry(got.last+1, 9)); err != nil {
			t.Fatalf("%s: opened, but writing fails: %v", how.name, err)
		}
		closeRaft(t, s)
		harmless++
	}
	t.Logf("%d refused, %d harmless", refused, harmless)
	if refused < tries/4 {
		t.Fatalf("only %d of %d damaged files were refused: the test damages too little", refused, tries)
	}
}

// A running store reads damage through its memory mapping.
func TestDamageWhileRunningStopsTheStore(t *testing.T) {
	tests := []struct {
		name  string
		spoil func(f *os.File, used int64) error
	}{
		{"garbage in all data pages", func(f *os.File, used int64) error {
			_, err := f.WriteAt(bytes.Repeat([]byte{0xA5}, int(used-2*pageSize)), 2*pageSize)
			return err
		}},
		{"pages can't be read", func(f *os.File, _ int64) error { return f.Truncate(2 * pageSize) }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			s := filled(t, dir)
			path := filepath.Join(dir, RaftFile)
			pages, err := boltfile.CheckFile(path, raftLayout())
			if err != nil {
				t.Fatal(err)
			}
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(tt.spoil(f, int64(pages.HighWater)*pageSize), f.Close()); err != nil {
				t.Fatal(err)
			}
			err = s.GetLog(200, new(raft.Log))
			if !errors.Is(err, ErrFailed) || !errors.Is(err, ErrDamaged) {
				t.Fatalf("read: %v", err)
			}
			<-s.Failed()
			if err := s.StoreLog(entry(541, 3)); !errors.Is(err, ErrFailed) {
				t.Fatalf("storing after damage was found: %v", err)
			}
			if _, err := s.LastIndex(); !errors.Is(err, ErrFailed) {
				t.Fatalf("last index: %v", err)
			}
		})
	}
}

// A panic of bbolt inside a transaction fails the store, and it can be closed.
func TestPanicsAreContained(t *testing.T) {
	s := openRaft(t, t.TempDir())
	s.writing.Lock()
	err := s.update("panic", s.now, func(*bbolt.Tx) error { panic("page 7 is odd") })
	s.writing.Unlock()
	if !errors.Is(err, ErrFailed) || !errors.Is(err, ErrDamaged) {
		t.Fatalf("got %v", err)
	}
	if err := s.StoreLog(entry(1, 1)); !errors.Is(err, ErrFailed) {
		t.Fatalf("storing after a panic: %v", err)
	}
}

// boltfile accepts every file that bbolt itself finds correct.
func TestPageCheckAgreesWithBolt(t *testing.T) {
	for n := range 20 {
		dir := t.TempDir()
		s := openRaft(t, dir)
		var last uint64
		for range 1 + rand.IntN(20) {
			to := last + 1 + rand.Uint64N(400)
			logs := entriesFrom(last+1, to, 1)
			logs[0].Data = make([]byte, rand.IntN(20000))
			mustStore(t, s, logs...)
			last = to
			if rand.IntN(3) == 0 {
				mustDelete(t, s, 0, rand.Uint64N(last))
			}
		}
		if _, err := boltfile.CheckFile(filepath.Join(dir, RaftFile), raftLayout()); err != nil {
			t.Fatalf("store %d: %v", n, err)
		}
		if err := s.db.View(func(tx *bbolt.Tx) error {
			for err := range tx.Check() {
				return err
			}
			return nil
		}); err != nil {
			t.Fatalf("bbolt reports its own file as damaged: %v", err)
		}
		closeRaft(t, s)
	}
}

func FuzzCheckPages(f *testing.F) {
	dir := f.TempDir()
	s, err := OpenRaftStore(storeOptions(f, dir))
	if err != nil {
		f.Fatal(err)
	}
	for i := range uint64(6) {
		if err := s.StoreLogs(entriesFrom(1+20*i, 20+20*i, 1)); err != nil {
			f.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		f.Fatal(err)
	}
	db := readFile(f, filepath.Join(dir, RaftFile))
	pages, err := boltfile.CheckFile(filepath.Join(dir, RaftFile), raftLayout())
	if err != nil {
		f.Fatal(err)
	}
	db = db[:pages.HighWater*pageSize]
	f.Add(uint32(0), []byte{})
	f.Add(uint32(2*pageSize+8), []byte{1, 0, 255, 255})
	// Patching a correct file gets further into the check than arbitrary bytes.
	f.Fuzz(func(t *testing.T, at uint32, patch []byte) {
		b := bytes.Clone(db)
		copy(b[int(at)%len(b):], patch)
		_, err := boltfile.Check(bytes.NewReader(b), int64(len(b)), raftLayout())
		if err != nil && !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrForeign) && !errors.Is(err, io.EOF) {
			t.Fatalf("unexpected kind of error: %v", err)
		}
	})
}
