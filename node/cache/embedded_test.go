package cache

import (
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.etcd.io/bbolt"
)

func entry(i int, at time.Time, size int) Entry {
	k := Key{}
	r := rand.New(rand.NewPCG(7, uint64(i))) //nolint:gosec // a test's
	for j := range k {
		k[j] = byte(r.Uint32())
	}
	return Entry{Key: k, StoredAt: at.Truncate(time.Millisecond), Sealed: []byte(strings.Repeat("x", size))}
}

func openFile(t *testing.T, dir string, limit int64) (*embedded, *int) {
	t.Helper()
	rebuilt := 0
	e, err := openEmbedded(dir, limit, slog.New(slog.DiscardHandler), func() { rebuilt++ })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.close(); err != nil {
			t.Error(err)
		}
	})
	return e, &rebuilt
}

// TestFileBytes: the file stays within its bound under ten times as much, of
// small and large entries, and what is left are the newest.
func TestFileBytes(t *testing.T) {
	for _, size := range []int{8000, 40_000, 1 << 20} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			const limit = 16 << 20
			dir := t.TempDir()
			e, _ := openFile(t, dir, limit)
			begun := time.Now()
			n, most := 10*limit/size, int64(0)
			failed := 0
			for i := 0; i < n; {
				var batch []Entry
				for bytes := 0; i < n && len(batch) < maxBatch && bytes < 4<<20; i++ {
					batch = append(batch, entry(i, begun.Add(time.Duration(i)*time.Millisecond), size))
					bytes += size
				}
				if err := e.put(t.Context(), batch, time.Hour); err != nil {
					failed++
				}
				info, err := os.Stat(filepath.Join(dir, fileName))
				if err != nil {
					t.Fatal(err)
				}
				most = max(most, info.Size())
			}
			count, bytes, known := e.size()
			t.Logf("%d entries in %d bytes, the file had up to %d, %d batches failed", count, bytes, most, failed)
			if most > limit || !known || bytes > limit {
				t.Errorf("the file has %d bytes, it had %d", bytes, most)
			}
			if failed > 0 {
				t.Errorf("%d batches were not written", failed)
			}
			if held := count * int64(size); held < limit/3 {
				t.Errorf("only %d bytes are held", held)
			}
			// The newest are all there, the oldest gone.
			for _, at := range []struct {
				i    int
				held bool
			}{{n - 1, true}, {n - int(count)/2, true}, {0, false}, {n / 2, false}} {
				v, err := e.get(t.Context(), entry(at.i, begun, 0).Key)
				if err != nil || (v != nil) != at.held {
					t.Errorf("entry %d of %d: held %v, %v", at.i, n, v != nil, err)
				}
			}
		})
	}
}

// TestReplacedEntries are counted once, and an older answer never takes the place
// of a newer one.
func TestReplacedEntries(t *testing.T) {
	e, _ := openFile(t, t.TempDir(), 16<<20)
	now := time.Now()
	for i := range 20 {
		if err := e.put(t.Context(), []Entry{entry(1, now.Add(time.Duration(i)*time.Second), 100+i)}, time.Hour); err != nil {
			t.Fatal(err)
		}
	}
	if err := e.put(t.Context(), []Entry{entry(1, now, 999)}, time.Hour); err != nil {
		t.Fatal(err)
	}
	v, err := e.get(t.Context(), entry(1, now, 0).Key)
	if err != nil || len(v) != entryHeader+119 {
		t.Errorf("%d bytes, %v", len(v), err)
	}
	if n, _, _ := e.size(); n != 1 {
		t.Errorf("%d entries", n)
	}
	if err := e.sweep(t.Context(), now.Add(19*time.Second)); err != nil {
		t.Fatal(err)
	}
	if n, _, _ := e.size(); n != 1 {
		t.Errorf("%d entries after a sweep of older ones", n)
	}
	if err := e.sweep(t.Context(), now.Add(20*time.Second)); err != nil {
		t.Fatal(err)
	}
	if n, _, _ := e.size(); n != 0 {
		t.Errorf("%d entries after a sweep", n)
	}
}

// TestADamagedFile is started again, empty, whenever the damage is found: when it
// is opened or while it is in use.
func TestADamagedFile(t *testing.T) {
	fill := func(t *testing.T, e *embedded) {
		t.Helper()
		for i := range 20 {
			var batch []Entry
			for j := range 100 {
				batch = append(batch, entry(i*100+j, time.Now(), 500))
			}
			if err := e.put(t.Context(), batch, time.Hour); err != nil {
				t.Fatal(err)
			}
		}
	}
	works := func(t *testing.T, e *embedded) {
		t.Helper()
		en := entry(7, time.Now(), 100)
		if err := e.put(t.Context(), []Entry{en}, time.Hour); err != nil {
			t.Fatal(err)
		}
		if v, err := e.get(t.Context(), en.Key); err != nil || v == nil {
			t.Fatalf("%v, %v", v, err)
		}
	}
	overwrite := func(t *testing.T, path string, from, n int64) {
		t.Helper()
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		junk := make([]byte, n)
		for i := range junk {
			junk[i] = byte(i*7 + 3)
		}
		if _, err := f.WriteAt(junk, from); err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		name string
		harm func(t *testing.T, path string)
	}{
		{"no database", func(t *testing.T, path string) {
			if err := os.WriteFile(path, []byte("hello"), 0o600); err != nil {
				t.Fatal(err)
			}
		}},
		{"both meta pages", func(t *testing.T, path string) { overwrite(t, path, 0, 8192) }},
		{"cut", func(t *testing.T, path string) {
			if err := os.Truncate(path, 8192); err != nil {
				t.Fatal(err)
			}
		}},
		{"another format", func(t *testing.T, path string) {
			db, err := bbolt.Open(path, 0o600, nil)
			if err != nil {
				t.Fatal(err)
			}
			err = db.Update(func(tx *bbolt.Tx) error { return tx.Bucket(bucketAbout).Put(keyFormat, []byte{99}) })
			if err != nil {
				t.Fatal(err)
			}
			if err := db.Close(); err != nil {
				t.Fatal(err)
			}
		}},
		{"torn when the machine stopped", func(t *testing.T, path string) {
			db, err := bbolt.Open(path, 0o600, nil)
			if err != nil {
				t.Fatal(err)
			}
			err = db.Update(func(tx *bbolt.Tx) error { return tx.Bucket(bucketAbout).Put(keyBoot, []byte("another")) })
			if err != nil {
				t.Fatal(err)
			}
			if err := db.Close(); err != nil {
				t.Fatal(err)
			}
			overwrite(t, path, 40*4096, 100*4096)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			e, _ := openFile(t, dir, 16<<20)
			fill(t, e)
			if err := e.close(); err != nil {
				t.Fatal(err)
			}
			c.harm(t, filepath.Join(dir, fileName))
			again, rebuilt := openFile(t, dir, 16<<20)
			if *rebuilt != 1 {
				t.Errorf("started again %d times", *rebuilt)
			}
			works(t, again)
		})
	}
	t.Run("a machine that stopped without harm", func(t *testing.T) {
		dir := t.TempDir()
		e, _ := openFile(t, dir, 16<<20)
		e.boot = []byte("another")
		if err := e.trust(e.db); err != nil {
			t.Fatal(err)
		}
		fill(t, e)
		// Not closed by us: no mark that it is whole.
		if err := e.db.Close(); err != nil {
			t.Fatal(err)
		}
		e.db = nil
		again, rebuilt := openFile(t, dir, 16<<20)
		if n, _, _ := again.size(); *rebuilt != 0 || n != 2000 {
			t.Errorf("started again %d times, %d entries", *rebuilt, n)
		}
	})
	t.Run("while it is in use", func(t *testing.T) {
		dir := t.TempDir()
		e, rebuilt := openFile(t, dir, 16<<20)
		fill(t, e)
		overwrite(t, filepath.Join(dir, fileName), 2*4096, 300*4096)
		for i := range 2000 {
			_, _ = e.get(t.Context(), entry(i, time.Now(), 0).Key) // some fail
		}
		if *rebuilt == 0 {
			t.Error("nobody noticed")
		}
		works(t, e)
	})
	t.Run("cut while it is in use", func(t *testing.T) {
		dir := t.TempDir()
		e, rebuilt := openFile(t, dir, 16<<20)
		fill(t, e)
		if err := os.Truncate(filepath.Join(dir, fileName), 2*4096); err != nil {
			t.Fatal(err)
		}
		for i := range 2000 {
			_, _ = e.get(t.Context(), entry(i, time.Now(), 0).Key) // some fail
		}
		if *rebuilt == 0 {
			t.Error("nobody noticed")
		}
		works(t, e)
	})
}
