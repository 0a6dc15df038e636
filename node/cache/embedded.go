package cache

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync"
	"time"

	"go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"

	"github.com/dsnode/dsnode/storage/boltfile"
)

const (
	pageSize = 4096
	// Two pieces with their names fill a page.
	pieceBytes = 1960
	nameBytes  = 8 + 32 + 2
	fileName   = "cache.db"
	bootFile   = "/proc/sys/kernel/random/boot_id"
	// Of the file's bound, so much is in use before the oldest go, and after.
	// The rest is what bbolt needs to write at all.
	highWater, lowWater = 0.80, 0.75
)

var (
	// Entries stand in the order of their age: new ones go to the one end of the
	// file's tree and old ones from the other, so that a write copies few pages.
	bucketEntries = []byte("entries") // milliseconds, key, number of the piece → piece of a value
	bucketIndex   = []byte("index")   // key → milliseconds
	bucketAbout   = []byte("about")   // what the file is
	keyFormat     = []byte("format")
	keyBoot       = []byte("boot")  // of the machine, while the file is open
	keyCount      = []byte("count") // of entries
	fileFormat    = []byte{1}
)

// errDamaged says that the file is not what was written.
var errDamaged = errors.New("the cache's file is damaged")

// embedded is a shared tier in a file of this node alone. Nothing in it is
// fsynced: a machine that loses its power may lose the file, which is then found
// damaged and started again, empty.
type embedded struct {
	path    string
	limit   int64
	boot    []byte
	log     *slog.Logger
	rebuilt func()

	mu sync.RWMutex // guards db against being replaced
	db *bbolt.DB
}

func openEmbedded(dir string, limit int64, log *slog.Logger, rebuilt func()) (*embedded, error) {
	e := &embedded{path: filepath.Join(dir, fileName), limit: limit, log: log, rebuilt: rebuilt, boot: bootID()}
	err := e.open()
	if err == nil {
		return e, nil
	}
	if errors.Is(err, berrors.ErrTimeout) || errors.Is(err, fs.ErrPermission) {
		return nil, err
	}
	if err = e.restart(err); err != nil {
		return nil, err
	}
	return e, nil
}

// bootID tells whether the machine was up all the time since the file was
// written: then the kernel has all of it, else it may be torn.
func bootID() []byte {
	b, err := os.ReadFile(bootFile)
	if err != nil {
		return nil // no Linux: the file is looked through at each start
	}
	return bytes.TrimSpace(b)
}

// open opens the file and makes sure that it can be trusted.
func (e *embedded) open() (err error) {
	defer boltfile.Contain(&err, debug.SetPanicOnFault(true))
	// bbolt may only open what can't crash it.
	if err := e.look(boltfile.Branches); err != nil {
		return err
	}
	db, err := bbolt.Open(e.path, 0o600, &bbolt.Options{
		Timeout: time.Second, PageSize: pageSize, NoSync: true, NoGrowSync: true, FreelistType: bbolt.FreelistMapType,
		MaxSize: int(e.limit), InitialMmapSize: int(e.limit),
	})
	if err != nil {
		return fmt.Errorf("open the cache's file: %w", err)
	}
	db.AllocSize = int(max(64<<10, min(e.limit/64, 16<<20)))
	if err := e.trust(db); err != nil {
		_ = db.Close() // it is thrown away
		return err
	}
	e.db = db
	return nil
}

func (e *embedded) trust(db *bbolt.DB) error {
	torn, fresh := false, false
	err := db.View(func(tx *bbolt.Tx) error {
		about := tx.Bucket(bucketAbout)
		if fresh = about == nil; fresh {
			return nil
		}
		if !bytes.Equal(about.Get(keyFormat), fileFormat) {
			return fmt.Errorf("%w: its format is not known", errDamaged)
		}
		if tx.Size() > e.limit {
			return fmt.Errorf("%w: %d bytes are more than the bound of %d", errDamaged, tx.Size(), e.limit)
		}
		was := about.Get(keyBoot)
		torn = was != nil && (e.boot == nil || !bytes.Equal(was, e.boot))
		return nil
	})
	if err == nil && torn {
		e.log.Info("the machine stopped while the cache was in use, looking through its file", "path", e.path)
		err = e.look(boltfile.Whole)
	}
	if err != nil {
		return err
	}
	return db.Update(func(tx *bbolt.Tx) error {
		for _, name := range [][]byte{bucketAbout, bucketEntries, bucketIndex} {
			if _, err := tx.CreateBucketIfNotExists(name); err != nil {
				return fmt.Errorf("make bucket %s: %w", name, err)
			}
		}
		if err := tx.Bucket(bucketAbout).Put(keyFormat, fileFormat); err != nil {
			return fmt.Errorf("write the format: %w", err)
		}
		return tx.Bucket(bucketAbout).Put(keyBoot, e.boot)
	})
}

// look reads the file without bbolt. There may be none, or an empty one.
func (e *embedded) look(depth boltfile.Depth) error {
	info, err := os.Stat(e.path)
	if errors.Is(err, fs.ErrNotExist) || err == nil && info.Size() == 0 {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look at the cache's file: %w", err)
	}
	_, err = boltfile.CheckFile(e.path, boltfile.Layout{
		PageSize: pageSize, Buckets: []string{string(bucketAbout), string(bucketEntries), string(bucketIndex)},
		MaxEntry: pageSize, Freelist: true, Depth: depth,
	})
	if err != nil {
		return fmt.Errorf("look through the cache's file: %w", err)
	}
	return nil
}

// restart throws the file away and begins an empty one.
func (e *embedded) restart(why error) error {
	e.log.Warn("the cache's file can't be used and is started again, empty", "path", e.path, "err", why)
	e.rebuilt()
	if err := os.Remove(e.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the cache's file: %w", err)
	}
	return e.open()
}

// with runs f on the file; damage found meanwhile replaces the file.
func (e *embedded) with(f func(*bbolt.DB) error) error {
	db, err := e.use(f)
	if err != nil && damage(err) {
		return errors.Join(err, e.replace(db, err))
	}
	return err
}

func (e *embedded) use(f func(*bbolt.DB) error) (db *bbolt.DB, err error) {
	defer boltfile.Contain(&err, debug.SetPanicOnFault(true))
	e.mu.RLock()
	defer e.mu.RUnlock()
	if e.db == nil {
		return nil, fs.ErrClosed
	}
	db = e.db // also when f panics
	return db, f(db)
}

func damage(err error) bool {
	for _, bad := range []error{errDamaged, boltfile.ErrDamaged, berrors.ErrInvalid, berrors.ErrChecksum, berrors.ErrInvalidMapping, berrors.ErrVersionMismatch} {
		if errors.Is(err, bad) {
			return true
		}
	}
	return false
}

// replace puts an empty file in the place of one that was found damaged. The old
// one may never close: nobody waits for it.
func (e *embedded) replace(broken *bbolt.DB, why error) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.db == nil || broken != nil && e.db != broken {
		return nil // closed, or replaced by another
	}
	old := e.db
	go func() {
		var err error
		defer boltfile.Contain(&err, debug.SetPanicOnFault(true))
		err = old.Close() // it is thrown away
	}()
	e.db = nil
	return e.restart(why)
}

func (e *embedded) get(_ context.Context, k Key) (value []byte, err error) {
	err = e.with(func(db *bbolt.DB) error {
		return db.View(func(tx *bbolt.Tx) error {
			at := tx.Bucket(bucketIndex).Get(k[:])
			if at == nil {
				return nil
			}
			start := append(bytes.Clone(at), k[:]...)
			c := tx.Bucket(bucketEntries).Cursor()
			for name, piece := c.Seek(start); bytes.HasPrefix(name, start); name, piece = c.Next() {
				value = append(value, piece...)
			}
			return nil
		})
	})
	if err != nil {
		return nil, fmt.Errorf("cache file: %w", err)
	}
	return value, nil
}

// put writes a batch, in steps. When it does not fit, the oldest make room.
func (e *embedded) put(ctx context.Context, batch []Entry, _ time.Duration) error {
	err := e.with(func(db *bbolt.DB) error {
		for len(batch) > 0 {
			n, size := 0, int64(0)
			for n < len(batch) && n < e.step() && (n == 0 || size < e.limit/32) {
				size += cost(len(batch[n].Sealed))
				n++
			}
			if err := e.putStep(ctx, db, batch[:n], size); err != nil {
				return err
			}
			batch = batch[n:]
		}
		return nil
	})
	if errors.Is(err, berrors.ErrMaxSizeReached) {
		return fmt.Errorf("%w: %w", errNoRoom, err)
	}
	if err != nil {
		return fmt.Errorf("cache file: %w", err)
	}
	return nil
}

func (e *embedded) putStep(ctx context.Context, db *bbolt.DB, batch []Entry, size int64) error {
	if err := e.makeRoom(ctx, db, size, highWater, lowWater); err != nil {
		return err
	}
	err := write(db, batch)
	// Free pages there are, but perhaps not enough in a row.
	for _, low := range []float64{lowWater / 2, 0} {
		if !errors.Is(err, berrors.ErrMaxSizeReached) {
			return err
		}
		if err = e.makeRoom(ctx, db, size, 0, low); err == nil {
			err = write(db, batch)
		}
	}
	return err
}

// step is how many entries one transaction may touch. Their places in the index
// are random, so each costs the copy of a page, and of those there must be enough
// free ones.
func (e *embedded) step() int { return int(min(max(e.limit/pageSize/16, 16), 1024)) }

// errNoRoom is no fault of the tier: a batch was too large for it now.
var errNoRoom = errors.New("no room in the cache's file")

func write(db *bbolt.DB, batch []Entry) error {
	return db.Update(func(tx *bbolt.Tx) error {
		entries, index := tx.Bucket(bucketEntries), tx.Bucket(bucketIndex)
		entries.FillPercent = 0.95 // they are added at the end
		added := 0
		for i := range batch {
			e := &batch[i]
			at := binary.BigEndian.AppendUint64(nil, uint64(e.StoredAt.UnixMilli())) //nolint:gosec // after 1970
			was := index.Get(e.Key[:])
			switch {
			case bytes.Compare(was, at) > 0:
				continue // a newer answer is here already
			case was != nil:
				if err := deletePieces(entries, append(bytes.Clone(was), e.Key[:]...)); err != nil {
					return err
				}
			default:
				added++
			}
			if err := index.Put(e.Key[:], at); err != nil {
				return fmt.Errorf("put into the index: %w", err)
			}
			if err := putPieces(entries, append(at, e.Key[:]...), e.value()); err != nil {
				return err
			}
		}
		return count(tx, added)
	})
}

func (e *embedded) drop(_ context.Context, keys []Key) error {
	return e.with(func(db *bbolt.DB) error {
		return db.Update(func(tx *bbolt.Tx) error {
			entries, index := tx.Bucket(bucketEntries), tx.Bucket(bucketIndex)
			gone := 0
			for _, k := range keys {
				at := bytes.Clone(index.Get(k[:]))
				if at == nil {
					continue
				}
				if err := deletePieces(entries, append(at, k[:]...)); err != nil {
					return err
				}
				if err := index.Delete(k[:]); err != nil {
					return fmt.Errorf("delete from the index: %w", err)
				}
				gone++
			}
			return count(tx, -gone)
		})
	})
}

// putPieces writes a value in pieces of which two fill a page. A large one in a
// row of pages would be copied with its neighbours at each change near it, and
// need free pages in a row.
func putPieces(entries *bbolt.Bucket, start, value []byte) error {
	for n := 0; len(value) > 0; n++ {
		piece := value[:min(len(value), pieceBytes)]
		value = value[len(piece):]
		name := binary.BigEndian.AppendUint16(bytes.Clone(start), uint16(n)) //nolint:gosec // 20 MiB are 11,000 pieces
		if err := entries.Put(name, piece); err != nil {
			return fmt.Errorf("put an entry: %w", err)
		}
	}
	return nil
}

func deletePieces(entries *bbolt.Bucket, start []byte) error {
	c := entries.Cursor()
	for name, _ := c.Seek(start); bytes.HasPrefix(name, start); name, _ = c.Seek(start) {
		if err := c.Delete(); err != nil {
			return fmt.Errorf("delete an entry: %w", err)
		}
	}
	return nil
}

// count keeps the number of entries, which bbolt only learns by a walk.
func count(tx *bbolt.Tx, more int) error {
	about := tx.Bucket(bucketAbout)
	n := 0
	if was := about.Get(keyCount); len(was) == 8 {
		n = int(binary.BigEndian.Uint64(was)) //nolint:gosec // written by us
	}
	return about.Put(keyCount, binary.BigEndian.AppendUint64(nil, uint64(max(0, n+more)))) //nolint:gosec // not negative
}

// cost is about what a value takes of the file.
func cost(value int) int64 {
	if value <= pieceBytes/2 {
		return int64(value+200) * 5 / 4
	}
	return int64((value+pieceBytes-1)/pieceBytes*pageSize/2 + 128)
}

// makeRoom deletes the oldest entries when the file with size more bytes would
// be in use beyond high, until it is below low.
func (e *embedded) makeRoom(ctx context.Context, db *bbolt.DB, size int64, high, low float64) error {
	used, err := inUse(db)
	if err != nil {
		return err
	}
	if float64(used+size) <= high*float64(e.limit) {
		return nil
	}
	return e.deleteOldest(ctx, db, used+size-int64(low*float64(e.limit)), time.Time{})
}

// inUse is the file without its free pages.
func inUse(db *bbolt.DB) (int64, error) {
	var size int64
	err := db.View(func(tx *bbolt.Tx) error {
		size = tx.Size()
		return nil
	})
	stats := db.Stats()
	return size - int64(stats.FreePageN+stats.PendingPageN)*int64(db.Info().PageSize), err
}

// deleteOldest deletes entries until so many bytes are free, or all that are
// older than before when it is set.
func (e *embedded) deleteOldest(ctx context.Context, db *bbolt.DB, want int64, before time.Time) error {
	for more := true; more && ctx.Err() == nil; {
		err := db.Update(func(tx *bbolt.Tx) error {
			entries, index := tx.Bucket(bucketEntries), tx.Bucket(bucketIndex)
			c := entries.Cursor()
			n, freed := 0, int64(0)
			for more = false; n < e.step() && freed < e.limit/16; {
				k, v := c.First()
				if k == nil || before.IsZero() && freed >= want {
					return count(tx, -n)
				}
				if len(k) != nameBytes {
					return fmt.Errorf("%w: an odd key", errDamaged)
				}
				if !before.IsZero() && int64(binary.BigEndian.Uint64(k)) >= before.UnixMilli() { //nolint:gosec // written by us
					return count(tx, -n)
				}
				freed += cost(len(v))
				if key := k[8 : 8+len(Key{})]; k[nameBytes-2] == 0 && k[nameBytes-1] == 0 {
					if err := index.Delete(key); err != nil {
						return fmt.Errorf("delete from the index: %w", err)
					}
					n++
				}
				if err := c.Delete(); err != nil {
					return fmt.Errorf("delete an entry: %w", err)
				}
			}
			more = true
			want -= freed
			return count(tx, -n)
		})
		if err != nil {
			return err
		}
	}
	return ctx.Err()
}

func (e *embedded) sweep(ctx context.Context, before time.Time) error {
	return e.with(func(db *bbolt.DB) error { return e.deleteOldest(ctx, db, 0, before) })
}

func (e *embedded) ping(ctx context.Context) error {
	_, err := e.get(ctx, Key{})
	return err
}

func (e *embedded) size() (entries, size int64, known bool) {
	err := e.with(func(db *bbolt.DB) error {
		return db.View(func(tx *bbolt.Tx) error {
			size = tx.Size()
			if n := tx.Bucket(bucketAbout).Get(keyCount); len(n) == 8 {
				entries = int64(binary.BigEndian.Uint64(n)) //nolint:gosec // written by us
			}
			return nil
		})
	})
	return entries, size, err == nil
}

// close writes all of it out and marks the file as whole.
func (e *embedded) close() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.db == nil {
		return nil
	}
	db := e.db
	e.db = nil
	err := db.Update(func(tx *bbolt.Tx) error { return tx.Bucket(bucketAbout).Delete(keyBoot) })
	if err := errors.Join(err, db.Sync(), db.Close()); err != nil {
		return fmt.Errorf("close the cache's file: %w", err)
	}
	return nil
}
