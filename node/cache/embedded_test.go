package cache

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func entry(i int, at time.Time, size int) Entry {
	k := Key{}
	r := rand.New(rand.NewPCG(7, uint64(i))) //nolint:gosec // a test's
	for j := range k {
		k[j] = byte(r.Uint32())
	}
	return Entry{Key: k, StoredAt: at.Truncate(time.Millisecond), Sealed: []byte(strings.Repeat("x", size))}
}

// openFiles opens a tier and counts the segments that it drops because of damage.
func openFiles(t testing.TB, dir string, limit int64) (*embedded, *atomic.Int64) {
	t.Helper()
	var damaged atomic.Int64
	e, err := openEmbedded(dir, limit, time.Now, slog.New(slog.DiscardHandler), func() { damaged.Add(1) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.close(); err != nil {
			t.Error(err)
		}
	})
	return e, &damaged
}

func put(t testing.TB, e *embedded, batch ...Entry) {
	t.Helper()
	if err := e.put(t.Context(), batch, time.Hour); err != nil {
		t.Fatal(err)
	}
}

func holds(t testing.TB, e *embedded, want Entry) bool {
	t.Helper()
	value, err := e.get(t.Context(), want.Key)
	if err != nil {
		t.Fatal(err)
	}
	if value != nil && !bytes.Equal(value, want.value()) {
		t.Errorf("key %s has the value %.40q", want.Key, value)
	}
	return value != nil
}

// segmentFiles are the files of a directory in the order of their age.
func segmentFiles(t testing.TB, dir string) []string {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(dir, "*"+segmentSuffix))
	if err != nil {
		t.Fatal(err)
	}
	return paths
}

func sizeOf(t testing.TB, dir string) (sum int64) {
	t.Helper()
	for _, path := range segmentFiles(t, dir) {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		sum += info.Size()
	}
	return sum
}

// TestFileBytes writes ten times as much as the tier may hold, in small and large
// entries: the files stay within the bound and hold the newest entries.
func TestFileBytes(t *testing.T) {
	for _, size := range []int{8000, 40_000, 1 << 20} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			const limit = 16 << 20
			dir := t.TempDir()
			e, _ := openFiles(t, dir, limit)
			begun := time.Now()
			n, most := 10*limit/size, int64(0)
			for i := 0; i < n; {
				var batch []Entry
				for bytes := 0; i < n && len(batch) < maxBatch && bytes < 4<<20; i++ {
					batch = append(batch, entry(i, begun.Add(time.Duration(i)*time.Millisecond), size))
					bytes += size
				}
				put(t, e, batch...)
				most = max(most, sizeOf(t, dir))
			}
			count, bytes, known := e.size()
			t.Logf("%d entries in %d bytes, up to %d on disk in %d files", count, bytes, most, len(segmentFiles(t, dir)))
			if most > limit || !known || bytes != sizeOf(t, dir) {
				t.Errorf("the tier says %d bytes, there were up to %d on disk", bytes, most)
			}
			if held := count * int64(size); held < limit*3/4 {
				t.Errorf("only %d bytes are held", held)
			}
			for i, held := range map[int]bool{n - 1: true, n - int(count)/2: true, n - int(count): true, n - int(count) - 1: false, 0: false} {
				if holds(t, e, entry(i, begun.Add(time.Duration(i)*time.Millisecond), size)) != held {
					t.Errorf("entry %d of %d: held is not %v", i, n, held)
				}
			}
		})
	}
}

// TestIndexBound writes many tiny entries: their number is bounded, also after a restart
// with a lower bound.
func TestIndexBound(t *testing.T) {
	const limit = 1 << 20
	dir := t.TempDir()
	e, _ := openFiles(t, dir, limit)
	if want := limit / bytesPerEntry; e.maxEntries != want {
		t.Fatalf("%d entries for %d bytes", e.maxEntries, limit)
	}
	now := time.Now()
	for i := range 3 * e.maxEntries {
		put(t, e, entry(i, now, 10))
		if n, _, _ := e.size(); n > int64(e.maxEntries) {
			t.Fatalf("%d entries", n)
		}
	}
	if n, _, _ := e.size(); n < int64(e.maxEntries)*3/4 || !holds(t, e, entry(3*e.maxEntries-1, now, 10)) {
		t.Errorf("only %d entries are left, or not the newest", n)
	}
	if err := e.close(); err != nil {
		t.Fatal(err)
	}
	less, _ := openFiles(t, dir, limit/4)
	if n, bytes, _ := less.size(); n == 0 || n > limit/4/bytesPerEntry || bytes > limit/4 || bytes != sizeOf(t, dir) {
		t.Errorf("%d entries in %d bytes after the bound was lowered", n, bytes)
	}
	if huge, _ := openFiles(t, t.TempDir(), 1<<42); huge.maxEntries != maxIndexed {
		t.Errorf("%d entries for 4 TiB", huge.maxEntries)
	}
}

// TestReplacedEntries: replaced entries are not counted, and an older answer does not
// replace a newer one, also after a restart.
func TestReplacedEntries(t *testing.T) {
	dir := t.TempDir()
	e, _ := openFiles(t, dir, 16<<20)
	now := time.Now()
	for i := range 20 {
		put(t, e, entry(1, now.Add(time.Duration(i)*time.Second), 100+i))
		if i == 10 {
			later(e, time.Hour)
		}
	}
	put(t, e, entry(1, now, 999))
	if n := len(segmentFiles(t, dir)); n != 2 {
		t.Errorf("%d files", n)
	}
	for range 2 {
		if n, _, _ := e.size(); n != 1 || !holds(t, e, entry(1, now.Add(19*time.Second), 119)) {
			t.Errorf("%d entries, or not the newest", n)
		}
		if err := e.close(); err != nil {
			t.Fatal(err)
		}
		e, _ = openFiles(t, dir, 16<<20)
	}
	if err := e.sweep(t.Context(), now.Add(19*time.Second)); err != nil {
		t.Fatal(err)
	}
	if n, _, _ := e.size(); n != 1 || len(segmentFiles(t, dir)) != 1 {
		t.Errorf("%d entries after a sweep of older ones", n)
	}
	if err := e.sweep(t.Context(), now.Add(20*time.Second)); err != nil {
		t.Fatal(err)
	}
	if n, bytes, _ := e.size(); n != 0 || bytes != 0 || len(segmentFiles(t, dir)) != 0 {
		t.Errorf("%d entries in %d bytes after a sweep", n, bytes)
	}
}

// later moves the tier's clock, so that the next write begins a segment.
func later(e *embedded, by time.Duration) {
	now := e.now
	e.now = func() time.Time { return now().Add(by) }
}

// TestSegmentAge: entries that come slowly are spread over several segments, so that the
// old ones can be dropped.
func TestSegmentAge(t *testing.T) {
	dir := t.TempDir()
	e, _ := openFiles(t, dir, 16<<20)
	begun := time.Now()
	const life, apart = 32 * time.Hour, time.Hour
	for i := range 100 {
		at := begun.Add(time.Duration(i) * apart)
		if err := e.put(t.Context(), []Entry{entry(i, at, 100)}, life); err != nil {
			t.Fatal(err)
		}
		if err := e.sweep(t.Context(), at.Add(-life)); err != nil {
			t.Fatal(err)
		}
		if n, _, _ := e.size(); n > int64(life/apart)+int64(life/apart)/lifeShare+2 {
			t.Fatalf("%d entries are kept %d hours after the first", n, i)
		}
		later(e, apart)
	}
	if n := len(segmentFiles(t, dir)); n < lifeShare/2 || n > 2*lifeShare {
		t.Errorf("%d files", n)
	}
	// A restart takes the age from the file's name.
	if err := e.close(); err != nil {
		t.Fatal(err)
	}
	e, _ = openFiles(t, dir, 16<<20)
	n := len(segmentFiles(t, dir))
	put(t, e, entry(1000, time.Now(), 100))
	if got := len(segmentFiles(t, dir)); got != n {
		t.Errorf("%d files, there were %d", got, n)
	}
}

// TestKeysWithOneBeginning: an index has only the first bytes of a key, and an entry is
// not given for another key that shares them.
func TestKeysWithOneBeginning(t *testing.T) {
	e, _ := openFiles(t, t.TempDir(), 16<<20)
	one, other := entry(1, time.Now(), 100), entry(1, time.Now(), 200)
	other.Key[len(Key{})-1]++
	put(t, e, one)
	if one.Key.record() != other.Key.record() || holds(t, e, other) || !holds(t, e, one) {
		t.Error("one entry was given for both keys")
	}
	put(t, e, other)
	if holds(t, e, one) || !holds(t, e, other) {
		t.Error("the later entry is not the one that is given")
	}
}

// TestDroppedKeys: dropped keys are misses, and a restart finds what was written after
// the drop.
func TestDroppedKeys(t *testing.T) {
	dir := t.TempDir()
	e, _ := openFiles(t, dir, 16<<20)
	now := time.Now()
	bad, good, other := entry(1, now.Add(time.Minute), 100), entry(1, now, 200), entry(2, now, 100)
	put(t, e, bad, other)
	if err := e.drop(t.Context(), []Key{bad.Key, entry(3, now, 0).Key}); err != nil {
		t.Fatal(err)
	}
	if holds(t, e, bad) || !holds(t, e, other) {
		t.Error("not the right one was dropped")
	}
	put(t, e, good)
	if err := e.close(); err != nil {
		t.Fatal(err)
	}
	e, _ = openFiles(t, dir, 16<<20)
	if !holds(t, e, good) || !holds(t, e, other) {
		t.Error("the restart lost an entry")
	}
}

// TestDamagedFiles damages files while the tier is closed: entries are lost, and nothing
// else happens.
func TestDamagedFiles(t *testing.T) {
	const entries, perFile = 30, 10
	record := int64(recordHead + 500)
	write := func(t *testing.T, path string, offset int64, b []byte) {
		t.Helper()
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt(b, offset); err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
	cut := func(t *testing.T, path string, size int64) {
		t.Helper()
		if err := os.Truncate(path, size); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		name    string
		damage  func(t *testing.T, paths []string)
		lost    []int // the first and the last entry that is lost
		damaged int64
	}{
		{"nothing", func(*testing.T, []string) {}, nil, 0},
		{"garbage in place of a file", func(t *testing.T, paths []string) { write(t, paths[1], 0, bytes.Repeat([]byte{7, 3}, 4000)) }, []int{10, 19}, 1},
		{"a short text in place of a file", func(t *testing.T, paths []string) {
			if err := os.WriteFile(paths[1], []byte("hello"), 0o600); err != nil {
				t.Fatal(err)
			}
		}, []int{10, 19}, 0}, // looks like a file whose writer was killed
		{"a flipped bit in a head", func(t *testing.T, paths []string) { write(t, paths[0], 3*record+20, []byte{0x99}) }, []int{0, 9}, 1},
		{"a length of 4 GiB", func(t *testing.T, paths []string) { write(t, paths[0], 3*record+4, []byte{0xff, 0xff, 0xff, 0xff}) }, []int{0, 9}, 1},
		{"zeros at the end", func(t *testing.T, paths []string) { write(t, paths[2], 8*record, make([]byte, 2*record)) }, []int{20, 29}, 1},
		{"zeros after the end", func(t *testing.T, paths []string) { cut(t, paths[2], 11*record) }, []int{20, 29}, 1},
		{"cut in a head", func(t *testing.T, paths []string) { cut(t, paths[2], 9*record+10) }, []int{29, 29}, 0},
		{"cut in an answer", func(t *testing.T, paths []string) { cut(t, paths[2], 9*record+int64(recordHead)+400) }, []int{29, 29}, 0},
		{"cut between records", func(t *testing.T, paths []string) { cut(t, paths[2], 9*record) }, []int{29, 29}, 0},
		{"emptied", func(t *testing.T, paths []string) { cut(t, paths[2], 0) }, []int{20, 29}, 0},
		{"removed", func(t *testing.T, paths []string) {
			if err := os.Remove(paths[0]); err != nil {
				t.Fatal(err)
			}
		}, []int{0, 9}, 0},
		{"a directory in place of a file", func(t *testing.T, paths []string) {
			if err := errors.Join(os.Remove(paths[0]), os.MkdirAll(filepath.Join(paths[0], "x"), 0o700)); err != nil {
				t.Fatal(err)
			}
		}, []int{0, 9}, 0},
		{"a pipe in place of a file", func(t *testing.T, paths []string) {
			if err := os.Remove(paths[0]); err != nil {
				t.Fatal(err)
			}
			if out, err := exec.CommandContext(t.Context(), "mkfifo", paths[0]).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
		}, []int{0, 9}, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir, now := t.TempDir(), time.Now()
			e, _ := openFiles(t, dir, 16<<20)
			for i := range entries {
				put(t, e, entry(i, now, 500))
				if i%perFile == perFile-1 {
					later(e, time.Hour)
				}
			}
			if err := e.close(); err != nil {
				t.Fatal(err)
			}
			paths := segmentFiles(t, dir)
			if len(paths) != entries/perFile {
				t.Fatalf("%d files", len(paths))
			}
			c.damage(t, paths)
			e, damaged := openFiles(t, dir, 16<<20)
			for i := range entries {
				lost := len(c.lost) > 0 && i >= c.lost[0] && i <= c.lost[1]
				if holds(t, e, entry(i, now, 500)) == lost {
					t.Errorf("entry %d is lost: %v", i, !lost)
				}
			}
			if got := damaged.Load(); got != c.damaged {
				t.Errorf("%d files were found damaged, want %d", got, c.damaged)
			}
			// The tier works, and the next start finds no damage.
			put(t, e, entry(1000, now, 100))
			count, bytes, _ := e.size()
			if err := e.close(); err != nil {
				t.Fatal(err)
			}
			e, damaged = openFiles(t, dir, 16<<20)
			if n, b, _ := e.size(); n != count || b != bytes || damaged.Load() != 0 || !holds(t, e, entry(1000, now, 100)) {
				t.Errorf("%d entries in %d bytes after another start, there were %d in %d", n, b, count, bytes)
			}
		})
	}
}

// TestDamageInUse damages a file while the tier is open: the first read that finds the
// damage drops the file, and writes work.
func TestDamageInUse(t *testing.T) {
	for name, damage := range map[string]func(t *testing.T, path string){
		"cut": func(t *testing.T, path string) {
			if err := os.Truncate(path, 5000); err != nil {
				t.Fatal(err)
			}
		},
		"overwritten": func(t *testing.T, path string) {
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := f.WriteAt(bytes.Repeat([]byte{7, 3}, 20_000), 5000); err != nil {
				t.Fatal(err)
			}
			if err := f.Close(); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir, now := t.TempDir(), time.Now()
			e, damaged := openFiles(t, dir, 16<<20)
			for i := range 200 {
				put(t, e, entry(i, now, 500))
			}
			damage(t, segmentFiles(t, dir)[0])
			held := 0
			for i := range 200 {
				if value, err := e.get(t.Context(), entry(i, now, 0).Key); err != nil {
					t.Fatal(err)
				} else if value != nil {
					held++
				}
			}
			if damaged.Load() != 1 || held == 200 || len(segmentFiles(t, dir)) != 0 {
				t.Errorf("%d of 200 entries were found, %d files found damaged, %d left", held, damaged.Load(), len(segmentFiles(t, dir)))
			}
			put(t, e, entry(7, now, 100))
			if !holds(t, e, entry(7, now, 100)) {
				t.Error("a new entry is not found")
			}
		})
	}
	t.Run("found by ping", func(t *testing.T) {
		dir := t.TempDir()
		e, damaged := openFiles(t, dir, 16<<20)
		if err := e.ping(t.Context()); err != nil {
			t.Errorf("empty: %v", err)
		}
		put(t, e, entry(1, time.Now(), 500))
		if err := os.Truncate(segmentFiles(t, dir)[0], 100); err != nil {
			t.Fatal(err)
		}
		if err := e.ping(t.Context()); err != nil || damaged.Load() != 1 {
			t.Errorf("%v, %d files found damaged", err, damaged.Load())
		}
	})
}

// TestFailedWrite: an entry whose write failed is a miss, other entries are not affected,
// and failing writes create no files.
func TestFailedWrite(t *testing.T) {
	dir, now := t.TempDir(), time.Now()
	e, _ := openFiles(t, dir, 16<<20)
	put(t, e, entry(1, now, 100))
	s := e.segments[0]
	works := s.file
	readOnly, err := os.Open(works.Name())
	if err != nil {
		t.Fatal(err)
	}
	s.file = readOnly
	if err := e.put(t.Context(), []Entry{entry(2, now, 100)}, time.Hour); err == nil {
		t.Fatal("a write to a read-only file succeeds")
	}
	s.file = works
	if err := readOnly.Close(); err != nil {
		t.Fatal(err)
	}
	for range 100 { // as many writes that fail, each long after the one before
		later(e, time.Hour)
		if _, err := e.last(time.Hour); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(segmentFiles(t, dir)); n != 2 {
		t.Errorf("%d files", n)
	}
	put(t, e, entry(1000, now, 100))
	if n, _, _ := e.size(); n != 2 || !holds(t, e, entry(1, now, 100)) || holds(t, e, entry(2, now, 100)) || !holds(t, e, entry(1000, now, 100)) {
		t.Errorf("%d entries", n)
	}
}

// TestHangingWrite: while a write hangs, reads work, and another writer stops when its
// context ends.
func TestHangingWrite(t *testing.T) {
	e, _ := openFiles(t, t.TempDir(), 16<<20)
	now := time.Now()
	put(t, e, entry(1, now, 100))
	if !e.writing.TryAcquire(1) {
		t.Fatal("the lock is held")
	}
	defer e.writing.Release(1)
	if !holds(t, e, entry(1, now, 100)) {
		t.Error("the entry is not found")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := e.put(ctx, []Entry{entry(2, now, 100)}, time.Hour); !errors.Is(err, context.Canceled) {
		t.Errorf("put: %v", err)
	}
}

// TestLargerThanTier: an entry that is larger than the whole tier is skipped, and the
// others of its batch are written.
func TestLargerThanTier(t *testing.T) {
	e, _ := openFiles(t, t.TempDir(), 64<<10)
	now := time.Now()
	put(t, e, entry(1, now, 100), entry(2, now, 64<<10), entry(3, now, 100))
	if n, _, _ := e.size(); n != 2 || !holds(t, e, entry(1, now, 100)) || !holds(t, e, entry(3, now, 100)) {
		t.Errorf("%d entries", n)
	}
}

// TestOtherFiles: the file of earlier versions is removed, other files stay.
func TestOtherFiles(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{oldFile, "notes.txt", "x" + segmentSuffix} {
		if err := os.WriteFile(filepath.Join(dir, name), bytes.Repeat([]byte("old"), 9000), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	_, damaged := openFiles(t, dir, 16<<20)
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 2 || left[0].Name() != "notes.txt" || left[1].Name() != "x"+segmentSuffix || damaged.Load() != 0 {
		t.Errorf("%v, %v, %d found damaged", left, err, damaged.Load())
	}
}

// TestConcurrentUse reads, writes, drops, sweeps and damages files at the same time.
func TestConcurrentUse(t *testing.T) {
	dir, now := t.TempDir(), time.Now()
	e, damaged := openFiles(t, dir, 256<<10)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var others sync.WaitGroup
	for range 4 {
		others.Go(func() {
			for ctx.Err() == nil {
				i := rand.IntN(500) //nolint:gosec // a test's
				if value, err := e.get(ctx, entry(i, now, 0).Key); err != nil || value != nil && !bytes.Equal(value, entry(i, now, 300).value()) {
					t.Errorf("%v, %.40q", err, value)
				}
				e.size()
				_ = e.ping(ctx)
			}
		})
	}
	others.Go(func() {
		for ctx.Err() == nil {
			_ = e.drop(ctx, []Key{entry(rand.IntN(500), now, 0).Key}) //nolint:gosec // a test's
			_ = e.sweep(ctx, now.Add(-time.Hour))
			for _, path := range segmentFiles(t, dir) {
				_ = os.Truncate(path, 1) // it may have been removed
				break
			}
		}
	})
	for i := 0; damaged.Load() < 20; i++ {
		_ = e.put(ctx, []Entry{entry(i%500, now, 300)}, time.Hour) // fails if its file was just dropped
	}
	cancel()
	others.Wait()
}

// TestKilledWriter kills a process while it writes: the next one finds all entries that
// were written.
func TestKilledWriter(t *testing.T) {
	const size = 5000
	at := time.UnixMilli(1_800_000_000_000)
	if os.Getenv("DSNODE_TEST_CACHE_WRITER") != "" { // the process that is killed
		e, _ := openFiles(t, ".", 64<<20)
		for i := 0; ; i++ {
			put(t, e, entry(i, at, size))
			fmt.Println("written", i)
		}
	}
	for round := range 5 {
		dir := t.TempDir()
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestKilledWriter$")
		cmd.Dir, cmd.Env = dir, append(os.Environ(), "DSNODE_TEST_CACHE_WRITER=1")
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		written := -1
		for lines := bufio.NewScanner(out); lines.Scan(); {
			if _, err := fmt.Sscanf(lines.Text(), "written %d", &written); err == nil && written == 50*(round+1) {
				_ = cmd.Process.Kill() // lines that it wrote before are still read
			}
		}
		_ = cmd.Wait() // it was killed
		if written < 50*(round+1) {
			t.Fatalf("it wrote %d entries", written)
		}
		e, damaged := openFiles(t, dir, 64<<20)
		for i := range written + 1 {
			if !holds(t, e, entry(i, at, size)) {
				t.Errorf("entry %d of %d is lost", i, written)
			}
		}
		if damaged.Load() != 0 {
			t.Error("a file was found damaged")
		}
	}
}

// TestFullDisk: after a write that a full disk cut short, a shorter one succeeds, and the next
// process finds no damage.
func TestFullDisk(t *testing.T) {
	at := time.UnixMilli(1_800_000_000_000)
	if os.Getenv("DSNODE_TEST_CACHE_WRITER") != "" { // a process of its own, for the limit
		e, _ := openFiles(t, ".", 64<<20)
		put(t, e, entry(1, at, 1000))
		signal.Ignore(syscall.SIGXFSZ)
		var limit syscall.Rlimit
		if err := syscall.Getrlimit(syscall.RLIMIT_FSIZE, &limit); err != nil {
			t.Fatal(err)
		}
		if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &syscall.Rlimit{Cur: 5000, Max: limit.Max}); err != nil {
			t.Fatal(err)
		}
		if err := e.put(t.Context(), []Entry{entry(2, at, 10_000)}, time.Hour); !errors.Is(err, syscall.EFBIG) {
			t.Fatalf("put: %v", err)
		}
		put(t, e, entry(3, at, 100))
		return
	}
	dir := t.TempDir()
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestFullDisk$")
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "DSNODE_TEST_CACHE_WRITER=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	e, damaged := openFiles(t, dir, 64<<20)
	if n, _, _ := e.size(); n != 2 || !holds(t, e, entry(1, at, 1000)) || !holds(t, e, entry(3, at, 100)) || damaged.Load() != 0 {
		t.Errorf("%d entries, %d files found damaged", n, damaged.Load())
	}
}

// TestNoWrongAnswer damages files at random: an answer that is found is the one that was
// kept.
func TestNoWrongAnswer(t *testing.T) {
	first := newRig(t, nil, embeddedTier).run()
	const answers = 12
	keys, bodies := make([]Key, answers), make([]string, answers)
	for i := range keys {
		keys[i], bodies[i] = first.key("tenant a", fmt.Sprintf(`{"i":%d}`, i)), strings.Repeat(fmt.Sprint(i), 10*(i+1))
		first.keep(keys[i], plainAnswer(bodies[i]))
	}
	first.stop()
	paths := segmentFiles(t, first.dir)
	if len(paths) != 1 {
		t.Fatalf("%v", paths)
	}
	good, err := os.ReadFile(paths[0])
	if err != nil {
		t.Fatal(err)
	}
	rapid.Check(t, func(rt *rapid.T) {
		b := bytes.Clone(good)
		for range rapid.IntRange(1, 4).Draw(rt, "damages") {
			at := rapid.IntRange(0, len(b)).Draw(rt, "at")
			n := min(rapid.IntRange(0, 400).Draw(rt, "bytes"), len(b)-at)
			switch rapid.IntRange(0, 4).Draw(rt, "kind") {
			case 0:
				if n > 0 {
					b[at] ^= 1 << rapid.IntRange(0, 7).Draw(rt, "bit")
				}
			case 1:
				b = b[:at]
			case 2:
				clear(b[at : at+n])
			case 3: // moved
				b = append(b[:at:at], b[at+n:]...)
			case 4: // twice
				b = append(b[:at+n:at+n], b[at:]...)
			}
		}
		dir, err := os.MkdirTemp(first.dir, "damaged")
		if err != nil {
			rt.Fatal(err)
		}
		defer func() { _ = os.RemoveAll(dir) }()
		if err := os.WriteFile(filepath.Join(dir, filepath.Base(paths[0])), b, 0o600); err != nil {
			rt.Fatal(err)
		}
		e, err := openEmbedded(dir, 16<<20, time.Now, slog.New(slog.DiscardHandler), func() {})
		if err != nil {
			rt.Fatal(err)
		}
		defer func() { _ = e.close() }()
		first.shared.Store(newShared(e, func(bool, error) {}, func(bool, error) {}))
		defer first.shared.Store(nil)
		for i, k := range keys {
			if f, ok := first.Shared(t.Context(), k, "m", life); ok && string(f.Answer.Body) != bodies[i] {
				rt.Fatalf("answer %d became %q", i, f.Answer.Body)
			}
		}
	})
	if first.Stats().Requests["shared"]["hit"] == 0 {
		t.Error("no answer was found in any file")
	}
}

// FuzzSegment: the records of any file are consecutive parts of it, and writing what was
// read gives the same bytes.
func FuzzSegment(f *testing.F) {
	var b []byte
	for i := range 3 {
		b = appendRecord(b, entry(i, time.UnixMilli(1_800_000_000_000), 40*i))
	}
	f.Add(b, 0)
	f.Add(b, recordHead+3)
	f.Add([]byte("hello"), 0)
	f.Fuzz(func(t *testing.T, b []byte, fix int) {
		if fix >= 0 && fix <= len(b)-recordHead { // else no mutated head passes its checksum
			binary.BigEndian.PutUint32(b[fix:], crc32.Checksum(b[fix+4:fix+recordHead], castagnoli))
		}
		end := int64(0)
		err := scanRecords(bytes.NewReader(b), int64(len(b)), func(r record, at int64) {
			if at != end || r.size < int64(recordHead) || at+r.size > int64(len(b)) {
				t.Fatalf("a record of %d bytes at %d, the last one ended at %d", r.size, at, end)
			}
			end = at + r.size
			e, err := parseEntry(r.key, b[at+int64(recordValue):end])
			if err != nil {
				return // too short to be sealed
			}
			if again := appendRecord(nil, e); !bytes.Equal(again, b[at:end]) || e.StoredAt.UnixMilli() != r.storedAt {
				t.Fatalf("%x was read, %x written", b[at:end], again)
			}
		})
		if whole := int64(len(b)) == end; whole && err != nil {
			t.Fatalf("all records were read, then: %v", err)
		}
	})
}

// BenchmarkOpenFiles opens a tier of 100,000 entries.
func BenchmarkOpenFiles(b *testing.B) {
	dir := b.TempDir()
	e, _ := openFiles(b, dir, 1<<30)
	for i := range 100_000 {
		put(b, e, entry(i, time.Now(), 900))
	}
	if err := e.close(); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		e, _ = openFiles(b, dir, 1<<30)
		if n, _, _ := e.size(); n != 100_000 {
			b.Fatalf("%d entries", n)
		}
		if err := e.close(); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkFileHit reads entries of 1 KiB from a tier of 100,000.
func BenchmarkFileHit(b *testing.B) {
	e, _ := openFiles(b, b.TempDir(), 128<<20)
	entries := make([]Entry, 100_000)
	for i := range entries {
		entries[i] = entry(i, time.Now(), 1024)
	}
	put(b, e, entries...)
	i := 0
	for b.Loop() {
		if v, err := e.get(b.Context(), entries[i%len(entries)].Key); err != nil || v == nil {
			b.Fatal(v, err)
		}
		i++
	}
}
