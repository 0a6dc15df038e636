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
	"strings"
	"sync"
	"time"

	"go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
)

const (
	fileName = "cache.db"
	bootFile = "/proc/sys/kernel/random/boot_id"
	// Of the file's bound, so much is in use before the oldest go, and after.
	// The rest is what bbolt needs to write at all.
	highWater, lowWater = 0.80, 0.75
	// sweepBatch bounds how many entries one transaction deletes.
	sweepBatch = 4096
)

var (
	bucketEntries = []byte("entries") // key → value
	bucketOrder   = []byte("order")   // milliseconds, key → size of the value
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
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer recovered(&err)
	db, err := bbolt.Open(e.path, 0o600, &bbolt.Options{
		Timeout: time.Second, NoSync: true, NoGrowSync: true, NoFreelistSync: true, FreelistType: bbolt.FreelistMapType,
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
		err = e.check(db)
	}
	if err != nil {
		return err
	}
	return db.Update(func(tx *bbolt.Tx) error {
		for _, name := range [][]byte{bucketEntries, bucketOrder, bucketAbout} {
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

func (e *embedded) check(db *bbolt.DB) error {
	return db.View(func(tx *bbolt.Tx) error {
		var first error
		for err := range tx.Check() {
			if first == nil {
				first = fmt.Errorf("%w: %w", errDamaged, err)
			}
		}
		return first
	})
}

// recovered turns what bbolt panics with on a damaged page, and a fault in the
// mapping, into an error. The caller has set the goroutine to panic on faults.
func recovered(err *error) {
	if r := recover(); r != nil {
		*err = fmt.Errorf("%w: %v", errDamaged, r)
	}
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
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer recovered(&err)
	e.mu.RLock()
	defer e.mu.RUnlock()
	if e.db == nil {
		return nil, fs.ErrClosed
	}
	db = e.db // also when f panics
	return db, f(db)
}

func damage(err error) bool {
	for _, bad := range []error{errDamaged, berrors.ErrInvalid, berrors.ErrChecksum, berrors.ErrInvalidMapping, berrors.ErrVersionMismatch} {
		if errors.Is(err, bad) {
			return true
		}
	}
	return strings.Contains(err.Error(), "page ") && strings.Contains(err.Error(), "freed")
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
		defer recovered(&err)
		_ = old.Close() // it is thrown away
	}()
	e.db = nil
	return e.restart(why)
}

func (e *embedded) get(_ context.Context, k Key) (value []byte, err error) {
	err = e.with(func(db *bbolt.DB) error {
		return db.View(func(tx *bbolt.Tx) error {
			value = bytes.Clone(tx.Bucket(bucketEntries).Get(k[:]))
			return nil
		})
	})
	if err != nil {
		return nil, fmt.Errorf("cache file: %w", err)
	}
	return value, nil
}

// put writes a batch. When it does not fit, the oldest make room.
func (e *embedded) put(ctx context.Context, batch []Entry, _ time.Duration) error {
	err := e.with(func(db *bbolt.DB) error {
		size := int64(0)
		for i := range batch {
			size += cost(len(batch[i].Sealed))
		}
		if err := e.makeRoom(ctx, db, size, highWater, lowWater); err != nil {
			return err
		}
		err := write(db, batch)
		if errors.Is(err, berrors.ErrMaxSizeReached) {
			// Free pages there are, but not enough in a row.
			if err = e.makeRoom(ctx, db, size, 0, lowWater/2); err == nil {
				err = write(db, batch)
			}
		}
		return err
	})
	if errors.Is(err, berrors.ErrMaxSizeReached) {
		return fmt.Errorf("%w: %w", errNoRoom, err)
	}
	if err != nil {
		return fmt.Errorf("cache file: %w", err)
	}
	return nil
}

// errNoRoom is no fault of the tier: a batch was too large for it now.
var errNoRoom = errors.New("no room in the cache's file")

func write(db *bbolt.DB, batch []Entry) error {
	return db.Update(func(tx *bbolt.Tx) error {
		entries, order := tx.Bucket(bucketEntries), tx.Bucket(bucketOrder)
		added := 0
		for i := range batch {
			en := &batch[i]
			if old := entries.Get(en.Key[:]); old != nil {
				was, err := parseEntry(en.Key, old)
				switch {
				case err != nil: // its place in the order is lost, and goes with its turn
				case was.StoredAt.After(en.StoredAt):
					continue // a newer answer is here already
				default:
					if err := order.Delete(orderKey(was.StoredAt, en.Key)); err != nil {
						return fmt.Errorf("delete the order: %w", err)
					}
				}
			}
			if entries.Get(en.Key[:]) == nil {
				added++
			}
			value := en.value()
			if err := entries.Put(en.Key[:], value); err != nil {
				return fmt.Errorf("put an entry: %w", err)
			}
			if err := order.Put(orderKey(en.StoredAt, en.Key), binary.BigEndian.AppendUint32(nil, uint32(len(value)))); err != nil { //nolint:gosec // 17 MiB at most
				return fmt.Errorf("put the order: %w", err)
			}
		}
		return count(tx, added)
	})
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

func orderKey(at time.Time, k Key) []byte {
	b := binary.BigEndian.AppendUint64(make([]byte, 0, 8+len(k)), uint64(at.UnixMilli())) //nolint:gosec // after 1970
	return append(b, k[:]...)
}

// cost is about what a value takes of the file: pages of its own when it is
// large, else a part of pages that are two thirds full.
func cost(value int) int64 {
	const page = 4096
	if value > page/4 {
		return int64((value/page+1)*page + 256)
	}
	return int64(value+160) * 3 / 2
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
	return deleteOldest(ctx, db, used+size-int64(low*float64(e.limit)), time.Time{})
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
func deleteOldest(ctx context.Context, db *bbolt.DB, want int64, before time.Time) error {
	for more := true; more && ctx.Err() == nil; {
		err := db.Update(func(tx *bbolt.Tx) error {
			entries, order := tx.Bucket(bucketEntries), tx.Bucket(bucketOrder)
			c := order.Cursor()
			n, gone := 0, 0
			k, v := c.First()
			for ; k != nil && n < sweepBatch; k, v = c.First() {
				if len(k) != 8+len(Key{}) || len(v) != 4 {
					return fmt.Errorf("%w: an odd record of the order", errDamaged)
				}
				if !before.IsZero() && int64(binary.BigEndian.Uint64(k)) >= before.UnixMilli() || before.IsZero() && want <= 0 { //nolint:gosec // written by us
					more = false
					break
				}
				want -= cost(int(binary.BigEndian.Uint32(v)))
				// An order whose entry was replaced or lost stands for nothing.
				if value := entries.Get(k[8:]); value != nil && bytes.HasPrefix(value[1:], k[:8]) {
					if err := entries.Delete(k[8:]); err != nil {
						return fmt.Errorf("delete an entry: %w", err)
					}
					gone++
				}
				if err := c.Delete(); err != nil {
					return fmt.Errorf("delete the order: %w", err)
				}
				n++
			}
			more = more && k != nil
			return count(tx, -gone)
		})
		if err != nil {
			return err
		}
	}
	return ctx.Err()
}

func (e *embedded) sweep(ctx context.Context, before time.Time) error {
	return e.with(func(db *bbolt.DB) error { return deleteOldest(ctx, db, 0, before) })
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
