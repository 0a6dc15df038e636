package jobtable

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"os"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"

	"go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"

	"github.com/dsnode/dsnode/storage/boltfile"
	"github.com/dsnode/dsnode/storage/journal"
	"github.com/dsnode/dsnode/storage/keyring"
	"github.com/dsnode/dsnode/storage/notify"
)

// Table stores the rows of all jobs. Changes are in memory (overlay.go) until Run
// commits them (commit.go). It is safe for concurrent use.
type Table struct {
	o       Options
	metrics *metrics
	file    sync.RWMutex // locked while replaceFile replaces db, mark, now; else they don't change
	db      *bbolt.DB
	mark    *os.File
	now     boltfile.Mark // state of the file; after Open only the committer changes it
	fresh   bool
	partial atomic.Bool
	proven  atomic.Bool

	stripes [stripeCount]stripe
	pending atomic.Int64 // bytes in the stripes
	// retired counts the commits whose entries leave the stripes. It is incremented
	// before the first entry leaves.
	retired atomic.Uint64
	space   notify.Broadcast // sent by each commit

	counts [len(statuses)]atomic.Int64 // of the visible state
	watch  atomic.Pointer[[]func(Row)]
	tenant atomic.Pointer[keyring.MAC]
	recent atomic.Pointer[tenantSum] // cache of one: jobs of a tenant mostly come in series

	mu      sync.Mutex // guards the fields below, up to the blank line
	streams map[journal.Stream]*position
	live    map[journal.Stream]int64
	begun   uint64 // number of the last commit that has begun
	done    uint64 // number of the last commit that is durable
	damage  error  // found in this file, for the committer; nil: none
	// rebuilding: the file lacks records of the journals, so no position is written to it.
	rebuilding bool

	number     atomic.Uint64    // how often the file was replaced; increased while mu is locked
	committing atomic.Bool      // Run runs
	replaced   notify.Broadcast // sent by replaceFile, and when Run ends
	refill     chan struct{}    // capacity 1: the file is empty

	kick     chan struct{}    // capacity 1: there is something to commit
	urgent   chan struct{}    // capacity 1: commit at once
	finished notify.Broadcast // sent when a commit is done

	fail   sync.Once
	failed chan struct{} // closed by setFailed and Close
	cause  atomic.Pointer[error]
}

// position is how far a stream was applied.
type position struct {
	seen    uint64 // visible
	durable uint64
}

// Open opens the table of a directory, or creates one; the caller holds the
// directory's lock. The error wraps ErrDamaged or ErrNewerFormat, or is one of the
// file system; then the files are unchanged.
//
// A new table is empty and Partial: other nodes may have rows of records that this node's
// journals don't have.
func Open(o Options) (*Table, error) {
	t := &Table{
		o:       o.withDefaults(),
		streams: map[journal.Stream]*position{},
		live:    map[journal.Stream]int64{},
		kick:    make(chan struct{}, 1),
		urgent:  make(chan struct{}, 1),
		refill:  make(chan struct{}, 1),
		failed:  make(chan struct{}),
	}
	t.metrics = newMetrics()
	for i := range t.stripes {
		t.stripes[i].init()
	}
	if err := t.openFile(); err != nil {
		return nil, fmt.Errorf("open the job table in %s: %w", o.Dir, err)
	}
	// Last, so that the caller can discard a damaged table and open another one with
	// the same registry.
	t.metrics.register(o.Registerer)
	t.o.Logger.Info("job table opened", "dir", o.Dir, "fresh", t.fresh, "partial", t.partial.Load(), "jobs", t.Counts())
	return t, nil
}

// Fresh reports whether Open created the file. Then every journal has to be applied
// from its first record.
func (t *Table) Fresh() bool { return t.fresh }

// Close closes the files. Changes that Run has not committed are applied again from
// the journals at the next start. No other call may be running. It is safe to call
// twice.
func (t *Table) Close() error {
	first := false
	t.fail.Do(func() {
		first = true
		t.cause.Store(&ErrClosed)
		close(t.failed)
	})
	if t.db == nil {
		return nil
	}
	var err error
	switch {
	case first: // a failed table keeps its mark
		t.now.State = boltfile.MarkClosed
		err = markFormat.Write(t.mark, t.now)
	case isDamage(t.usable()): // found while Run did not run: the next Open must not use the file
		t.now.State = boltfile.MarkDamaged
		err = markFormat.Write(t.mark, t.now)
	}
	err = errors.Join(err, t.mark.Close(), t.db.Close())
	t.db = nil
	return err
}

// usable returns nil, ErrClosed, or an error that wraps ErrFailed.
func (t *Table) usable() error {
	if p := t.cause.Load(); p != nil {
		return *p
	}
	return nil
}

// setFailed makes the table fail permanently and returns the error.
func (t *Table) setFailed(what string, cause error) error {
	t.fail.Do(func() {
		err := fmt.Errorf("%w: %s: %w", ErrFailed, what, asDamaged(cause))
		t.cause.Store(&err)
		t.metrics.failures.Inc()
		t.o.Logger.Error("job table failed; the node must stop", "doing", what, "err", cause)
		close(t.failed)
	})
	return t.usable()
}

// view runs fn in a read transaction. Bytes that fn reads are valid only in it. It
// must be short: a commit that grows the file waits for it.
func (t *Table) view(fn func(*bbolt.Tx) error) error {
	if err := t.usable(); err != nil {
		return err
	}
	t.file.RLock()
	defer t.file.RUnlock()
	return t.transact(fn)
}

// transact is view for a caller who holds t.file.
func (t *Table) transact(fn func(*bbolt.Tx) error) (err error) {
	if t.db == nil {
		return ErrClosed // or the file could not be replaced: then the table has failed
	}
	defer boltfile.Contain(&err, debug.SetPanicOnFault(true))
	err = t.db.View(fn)
	if errors.Is(err, berrors.ErrDatabaseNotOpen) {
		return ErrClosed
	}
	return err
}

// read is view; when fn finds damage, it is called again on another file. The caller holds
// no lock of a stripe.
func (t *Table) read(what string, fn func(*bbolt.Tx) error) error {
	for {
		number := t.number.Load()
		err := t.view(fn)
		if err == nil {
			return nil
		}
		if err = t.damaged(what, err, number); err != nil {
			return err
		}
	}
}

func bucket(tx *bbolt.Tx, n int) *bbolt.Bucket { return tx.Bucket([]byte(bucketNames[n])) }

// readCounts reads what is kept in memory: a few numbers per stream, none per job.
func (t *Table) readCounts(tx *bbolt.Tx) error {
	if b := bucket(tx, tableMeta).Get(keyCounts); b != nil {
		if len(b) != 8*len(statuses) {
			return fmt.Errorf("%w: counts of %d bytes", ErrDamaged, len(b))
		}
		for i := range statuses {
			t.counts[i].Store(int64(binary.BigEndian.Uint64(b[8*i:])))
		}
	}
	err := bucket(tx, tableStreams).ForEach(func(k, v []byte) error {
		s, ok := parseStreamKey(k)
		if !ok || len(v) != 8 {
			return fmt.Errorf("%w: a stream's key is %x", ErrDamaged, k)
		}
		n := binary.BigEndian.Uint64(v)
		t.streams[s] = &position{seen: n, durable: n}
		return nil
	})
	if err != nil {
		return err
	}
	// This takes time in proportion to the jobs that are queued or running.
	return bucket(tx, indexLive).ForEach(func(k, _ []byte) error {
		s, ok := parseStreamKey(k[:max(0, len(k)-16)])
		if !ok {
			return fmt.Errorf("%w: a live job's key is %x", ErrDamaged, k)
		}
		t.live[s]++
		return nil
	})
}

// Applied returns the sequence number up to which the stream's records are durable
// in the table's file; the journal may be trimmed up to there. It is 0 for an
// unknown stream.
func (t *Table) Applied(s journal.Stream) uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	if p := t.streams[s]; p != nil {
		return p.durable
	}
	return 0
}

// Visible returns the sequence number up to which the stream's records are visible; they
// may not be durable yet.
func (t *Table) Visible(s journal.Stream) uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	if p := t.streams[s]; p != nil {
		return p.seen
	}
	return 0
}

// AppliedAll returns Applied of every stream.
func (t *Table) AppliedAll() map[journal.Stream]uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	all := make(map[journal.Stream]uint64, len(t.streams))
	for s, p := range t.streams {
		if p.durable > 0 {
			all[s] = p.durable
		}
	}
	return all
}

// SetApplied records that merged rows include the stream's records up to seq. It is
// durable when it returns, and never decreases.
func (t *Table) SetApplied(ctx context.Context, s journal.Stream, seq uint64) error {
	return t.SetAppliedAll(ctx, map[journal.Stream]uint64{s: seq})
}

// SetAppliedAll is SetApplied for several streams at once.
func (t *Table) SetAppliedAll(ctx context.Context, applied map[journal.Stream]uint64) error {
	t.mu.Lock()
	for s, seq := range applied {
		p := t.position(s)
		p.seen = max(p.seen, seq)
	}
	t.mu.Unlock()
	return t.flush(ctx)
}

// position returns the stream's position, and creates it if needed. The caller holds
// t.mu.
func (t *Table) position(s journal.Stream) *position {
	p := t.streams[s]
	if p == nil {
		p = &position{}
		t.streams[s] = p
	}
	return p
}

// Counts returns the number of jobs by status, without deleted ones.
func (t *Table) Counts() map[journal.Status]int64 {
	n := make(map[journal.Status]int64, len(statuses))
	for i, s := range statuses {
		n[s] = t.counts[i].Load()
	}
	return n
}

// Jobs returns the number of jobs, without deleted ones.
func (t *Table) Jobs() int64 {
	n := int64(0)
	for i := range statuses {
		n += t.counts[i].Load()
	}
	return n
}

// LiveCounts returns for each stream the number of jobs that it accepted and that
// are not final; streams without any are left out.
func (t *Table) LiveCounts() map[journal.Stream]int64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return maps.Clone(t.live)
}

// Watch registers f. It is called with the row at every change of a visible job, in
// order for each job, without any lock held, on the goroutine that made the change. f
// must be quick, and must not call Apply, Merge or Reseal. It is not called for rows
// that the sweeper removes. Register before the first Apply.
func (t *Table) Watch(f func(Row)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	var all []func(Row)
	if p := t.watch.Load(); p != nil {
		all = slices.Clone(*p)
	}
	all = append(all, f)
	t.watch.Store(&all)
}
