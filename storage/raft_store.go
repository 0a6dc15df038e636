package storage

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hashicorp/raft"
	"go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"

	"github.com/dsnode/dsnode/storage/atomicfile"
	"github.com/dsnode/dsnode/storage/boltfile"
	"github.com/dsnode/dsnode/storage/keyring"
)

// Files of the Raft store inside the data directory.
const (
	RaftFile     = "raft.db"
	raftMarkFile = "raft.mark"
	raftTempFile = "raft.db.tmp"
)

var (
	bucketLog    = []byte("log")
	bucketMeta   = []byte("meta")
	bucketStable = []byte("stable")
	keyStore     = []byte("store")

	_ raft.LogStore    = (*RaftStore)(nil)
	_ raft.StableStore = (*RaftStore)(nil)
)

// storeFormat is the version of the whole file: its buckets and their content.
const storeFormat = 1

// RaftStore is Raft's log and stable store. A call that returned nil has been
// synced to the disk.
//
// It does not implement raft.MonotonicLogStore: raft v1.8 empties such a store
// when it installs a snapshot but keeps the old last index in memory, and panics
// later (hashicorp/raft#697).
type RaftStore struct {
	db      *bbolt.DB
	sealer  keyring.Sealer
	log     *slog.Logger
	metrics storeMetrics
	before  func() error // Options.BeforeWrite
	mark    *os.File

	writing sync.Mutex // guards the fields below up to the blank line; one transaction at a time
	now     raftMark
	arena   []byte // sealed values of the running transaction
	plain   []byte // one entry before it is sealed
	stuck   bool   // bbolt panicked while it held its locks; it can't be closed

	unbroken uint64 // first index after the last gap in the log, at open

	closed  atomic.Bool
	entries atomic.Pointer[indexRange]
	staged  atomic.Uint64 // commit index to write with the next entries
	syncs   atomic.Uint64

	fail   sync.Once
	failed chan struct{}
	cause  atomic.Pointer[error]
}

// indexRange is the first and the last index stored; both are 0 for none.
type indexRange struct{ first, last uint64 }

// Options of a store. All but BeforeWrite are required.
type Options struct {
	Dir     string // the data directory; the caller holds its lock
	Sealer  keyring.Sealer
	Logger  *slog.Logger
	Metrics *Metrics
	// BeforeWrite is called before each write, with no lock held. It may block, and its error is
	// that of the write. Nil: nothing.
	BeforeWrite func() error
}

// OpenRaftStore opens the Raft store of a data directory, or creates one.
//
// It checks every page, every record's seal, the order of all entries, and that
// the file is not older than what was acknowledged. If the store was not closed in
// order it rewrites the file, because pages that a failed sync dropped may exist
// in the page cache only. The error wraps ErrDamaged, ErrForeign, ErrWrongKey,
// ErrNewerFormat, ErrLocked, or is an error of the file system; then the files are
// unchanged.
func OpenRaftStore(o Options) (*RaftStore, error) {
	s := &RaftStore{
		sealer:  o.Sealer,
		log:     o.Logger,
		metrics: o.Metrics.of("raft"),
		before:  o.BeforeWrite,
		failed:  make(chan struct{}),
	}
	path := filepath.Join(o.Dir, RaftFile)
	if err := s.open(o.Dir, path); err != nil {
		if errors.Is(err, ErrDamaged) {
			s.metrics.damaged.Inc()
		}
		return nil, fmt.Errorf("open %s: %w", path, withHint(err))
	}
	s.log.Info("raft store opened", "path", path, "first", s.now.first, "last", s.now.last)
	return s, nil
}

// withHint adds what an operator can do.
func withHint(err error) error {
	switch {
	case errors.Is(err, ErrWrongKey):
		return fmt.Errorf("%w; was %s of this directory lost or replaced?", err, keyring.NodeKeyFile)
	case errors.Is(err, ErrDamaged):
		return fmt.Errorf("%w; the other nodes hold the same state: remove this node from the cluster, "+
			"empty its data directory and let it join again", err)
	}
	return err
}

func (s *RaftStore) open(dir, path string) error {
	// A crash may have left a temporary file; nothing uses its content.
	if err := os.Remove(filepath.Join(dir, raftTempFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	markPath := filepath.Join(dir, raftMarkFile)
	mark, marked, err := raftMarkFormat.Read(markPath)
	if err != nil {
		return err
	}
	_, err = os.Stat(path)
	isNew := errors.Is(err, fs.ErrNotExist)
	switch {
	case isNew && marked:
		return fmt.Errorf("%w: it is gone, but %s says that this node has voted or stored entries", ErrDamaged, raftMarkFile)
	case isNew:
		if err := s.createRaftFile(dir, path); err != nil {
			return err
		}
	case err != nil:
		return err
	}

	pages, err := boltfile.CheckFile(path, raftLayout())
	if err != nil {
		return err
	}
	if !isNew && (!marked || mark.State != boltfile.MarkClosed) {
		if err := rewriteRaftFile(dir, path, int64(pages.HighWater)*pageSize); err != nil {
			return fmt.Errorf("rewrite it: %w", err)
		}
	}
	if s.db, err = openBolt(path); err != nil {
		return err
	}
	s.now, err = s.verify()
	if err == nil && marked {
		err = decodeRaftMark(mark).allows(s.now)
	}
	if err == nil {
		s.now.State = boltfile.MarkOpen
		s.publish()
		s.mark, err = os.OpenFile(markPath, os.O_RDWR|os.O_CREATE, 0o600)
	}
	if err == nil {
		err = s.writeMark()
	}
	if err != nil {
		if s.mark != nil {
			err = errors.Join(err, s.mark.Close())
		}
		return errors.Join(err, s.db.Close())
	}
	return nil
}

func openBolt(path string) (db *bbolt.DB, err error) {
	defer boltfile.Contain(&err, debug.SetPanicOnFault(true))
	db, err = bbolt.Open(path, 0o600, &bbolt.Options{
		// The caller holds the data directory's lock, so bbolt's own lock is free.
		Timeout:        time.Millisecond,
		PageSize:       pageSize,
		NoFreelistSync: true,
		FreelistType:   bbolt.FreelistMapType,
		NoStatistics:   true,
	})
	if errors.Is(err, berrors.ErrTimeout) {
		err = fmt.Errorf("%w: %w", ErrLocked, err)
	}
	return db, err
}

// createRaftFile makes a file with empty buckets.
func (s *RaftStore) createRaftFile(dir, path string) error {
	id := make([]byte, 16)
	_, _ = rand.Read(id) // never fails; it ends the process instead
	return boltfile.Create(path, filepath.Join(dir, raftTempFile), openBolt, func(tx *bbolt.Tx) error {
		for _, name := range [][]byte{bucketLog, bucketMeta, bucketStable} {
			if _, err := tx.CreateBucketIfNotExists(name); err != nil {
				return err
			}
		}
		record := appendRecord(nil, s.sealer, append([]byte{storeFormat}, id...), placeOf(bucketMeta, keyStore))
		return tx.Bucket(bucketMeta).Put(keyStore, record)
	})
}

// rewriteRaftFile copies the used part of the file to a new one, syncs that and
// renames it over the old one. When a sync fails, the kernel marks the pages
// clean and never writes them again, but still shows them to readers. Writing
// them again is the only way to be sure that they are on the disk.
func rewriteRaftFile(dir, path string, size int64) error {
	from, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { _ = from.Close() }() // only read from
	// The caller holds the directory's lock. In case it doesn't: don't replace a
	// file that another store has open.
	if err := syscall.Flock(int(from.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return fmt.Errorf("%w: %w", ErrLocked, err)
	}
	return atomicfile.Write(path, filepath.Join(dir, raftTempFile), func(to io.Writer) error {
		_, err := io.Copy(to, io.NewSectionReader(from, 0, size))
		return err
	})
}

// Failed is closed when a write or sync failed, or when a stored record is
// damaged. The node must stop then: it can't keep what it acknowledged to its
// peers. Err returns the cause.
func (s *RaftStore) Failed() <-chan struct{} { return s.failed }

// Err is nil until Failed is closed. Then it wraps ErrFailed and the cause.
func (s *RaftStore) Err() error {
	if p := s.cause.Load(); p != nil {
		return *p
	}
	return nil
}

// setFailed makes the store fail permanently and returns the error.
func (s *RaftStore) setFailed(what string, cause error) error {
	s.fail.Do(func() {
		err := fmt.Errorf("%w: %s: %w", ErrFailed, what, cause)
		s.cause.Store(&err)
		s.metrics.failures.Inc()
		if errors.Is(cause, ErrDamaged) {
			s.metrics.damaged.Inc()
		}
		s.log.Error("raft store failed; the node must stop", "doing", what, "err", cause)
		close(s.failed)
	})
	return s.Err()
}

// Close closes the files. No other call may be running. It is safe to call twice.
func (s *RaftStore) Close() error {
	s.writing.Lock()
	defer s.writing.Unlock()
	if s.closed.Swap(true) {
		return nil
	}
	var err error
	// A failed store stays marked as open, so that the next start rewrites the file.
	if s.Err() == nil {
		s.now.State = boltfile.MarkClosed
		err = s.writeMark()
	}
	err = errors.Join(err, s.mark.Close())
	if s.stuck {
		return err
	}
	return errors.Join(err, s.db.Close())
}

// beforeWrite is called without s.writing.
func (s *RaftStore) beforeWrite(what string) error {
	if s.before == nil {
		return nil
	}
	if err := s.before(); err != nil {
		return s.setFailed(what, err)
	}
	return nil
}

// update runs one transaction and makes it durable. after is the state that the
// transaction leads to. An error of fn fails the store, so the caller checks
// everything that it can beforehand. The caller holds s.writing.
func (s *RaftStore) update(what string, after raftMark, fn func(*bbolt.Tx) error) error {
	if err := s.usable(); err != nil {
		return err
	}
	txid, err := s.commit(fn)
	if err == nil {
		after.Txid = txid
		s.now = after
		err = s.writeMark()
	}
	if err != nil {
		return s.setFailed(what, err)
	}
	s.publish()
	return nil
}

func (s *RaftStore) publish() {
	entries := s.now.indexRange
	s.entries.Store(&entries)
}

// Syncs is the number of transactions written to the disk since the store was
// opened: as long as it rises, the disk works.
func (s *RaftStore) Syncs() uint64 { return s.syncs.Load() }

func (s *RaftStore) commit(fn func(*bbolt.Tx) error) (txid uint64, err error) {
	s.stuck = true
	defer boltfile.Contain(&err, debug.SetPanicOnFault(true))
	tx, err := s.db.Begin(true)
	if err == nil {
		txid = uint64(tx.ID())
		if err = fn(tx); err == nil {
			err = tx.Commit()
		} else {
			err = errors.Join(err, tx.Rollback())
		}
	}
	s.stuck = false // bbolt did not panic
	if err != nil {
		return 0, err
	}
	stats := tx.Stats()
	s.metrics.fsync.Observe(stats.GetWriteTime().Seconds())
	s.syncs.Add(1)
	return txid, nil
}

// view runs fn in a read transaction. Bytes that fn reads are valid only in it.
func (s *RaftStore) view(fn func(*bbolt.Tx) error) (err error) {
	if err := s.usable(); err != nil {
		return err
	}
	defer boltfile.Contain(&err, debug.SetPanicOnFault(true))
	err = s.db.View(fn)
	if errors.Is(err, berrors.ErrDatabaseNotOpen) {
		return ErrClosed
	}
	return err
}

func (s *RaftStore) usable() error {
	if s.closed.Load() {
		return ErrClosed
	}
	return s.Err()
}

func (s *RaftStore) writeMark() error { return raftMarkFormat.Write(s.mark, s.now.encode()) }

// placeOf is a record's additional data: the bucket's name, a zero byte, the key.
func placeOf(bucket, key []byte) []byte {
	return slices.Concat(bucket, []byte{0}, key)
}
