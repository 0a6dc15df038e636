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
)

// Table keeps the rows of all jobs. What Apply changed is in memory (overlay.go)
// until Run has committed it (commit.go). It is safe for many goroutines.
type Table struct {
	o       Options
	metrics *metrics
	db      *bbolt.DB
	mark    *os.File
	now     boltfile.Mark // where the file stands; the committer's alone after Open
	fresh   bool
	partial atomic.Bool

	stripes [stripeCount]stripe
	pending atomic.Int64 // bytes in the stripes
	// retired counts the commits whose entries leave the stripes: it moves before
	// the first does.
	retired atomic.Uint64
	room    gate // opened by each commit

	counts [len(statuses)]atomic.Int64 // as they are visible
	watch  atomic.Pointer[[]func(Row)]
	tenant atomic.Pointer[keyring.MAC]
	recent atomic.Pointer[tenantSum] // most jobs come in a row

	mu      sync.Mutex // guards all below
	streams map[journal.Stream]*position
	live    map[journal.Stream]int64
	begun   uint64 // number of the last commit that was begun
	done    uint64 // and of the last that is durable

	kick     chan struct{} // capacity 1: there is something to commit
	urgent   chan struct{} // capacity 1: somebody waits for it
	finished gate          // opened when a commit is done

	fail   sync.Once
	failed chan struct{} // closed by fail, and by Close
	cause  atomic.Pointer[error]
}

// position says how far a stream was applied.
type position struct {
	seen    uint64 // visible
	durable uint64
}

// Open opens the table of a directory, or makes one; the caller holds the
// directory's lock. The error is ErrDamaged, ErrNewerFormat, or what the file
// system said; the files are left as they are then.
//
// An empty table is right only where all journals are whole: see Fresh.
func Open(o Options) (*Table, error) {
	t := &Table{
		o:       o.withDefaults(),
		streams: map[journal.Stream]*position{},
		live:    map[journal.Stream]int64{},
		kick:    make(chan struct{}, 1),
		urgent:  make(chan struct{}, 1),
		failed:  make(chan struct{}),
	}
	t.metrics = newMetrics()
	t.room.init()
	t.finished.init()
	for i := range t.stripes {
		t.stripes[i].init()
	}
	if err := t.openFile(); err != nil {
		return nil, fmt.Errorf("open the job table in %s: %w", o.Dir, err)
	}
	// Last: who discards a damaged table opens another one with the same registry.
	t.metrics.register(o.Registerer)
	t.o.Logger.Info("job table opened", "dir", o.Dir, "fresh", t.fresh, "partial", t.partial.Load(), "jobs", t.Counts())
	return t, nil
}

// Fresh reports whether Open made the file: then every journal has to be
// applied from its first record, and where that was trimmed already, rows have
// to come from another node before the jobs are served.
func (t *Table) Fresh() bool { return t.fresh }

// Close closes the files; what Run has not committed is applied again from the
// journals at the next start. All calls must have ended. It is safe to call twice.
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
	if first { // else it stays marked as what it is
		t.now.State = boltfile.MarkClosed
		err = markFormat.Write(t.mark, t.now)
	}
	err = errors.Join(err, t.mark.Close(), t.db.Close())
	t.db = nil
	return err
}

// usable is nil, ErrClosed, or wraps ErrFailed.
func (t *Table) usable() error {
	if p := t.cause.Load(); p != nil {
		return *p
	}
	return nil
}

// setFailed makes the table fail for good and gives the error to return.
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

// view runs fn in a read transaction, whose bytes are valid only inside. It
// must be short: a growing file waits for it.
func (t *Table) view(fn func(*bbolt.Tx) error) (err error) {
	if err := t.usable(); err != nil {
		return err
	}
	defer boltfile.Contain(&err, debug.SetPanicOnFault(true))
	err = t.db.View(fn)
	if errors.Is(err, berrors.ErrDatabaseNotOpen) {
		return ErrClosed
	}
	return err
}

// read is view, and fails the table when damage is found.
func (t *Table) read(what string, fn func(*bbolt.Tx) error) error {
	err := t.view(fn)
	if err = asDamaged(err); errors.Is(err, ErrDamaged) {
		return t.setFailed(what, err)
	}
	return err
}

func bucket(tx *bbolt.Tx, n int) *bbolt.Bucket { return tx.Bucket([]byte(bucketNames[n])) }

// readCounts fills what is kept in memory: a few numbers a stream, none a job.
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
			return fmt.Errorf("%w: a stream %x", ErrDamaged, k)
		}
		n := binary.BigEndian.Uint64(v)
		t.streams[s] = &position{seen: n, durable: n}
		return nil
	})
	if err != nil {
		return err
	}
	// As long as jobs are queued or running.
	return bucket(tx, indexLive).ForEach(func(k, _ []byte) error {
		s, ok := parseStreamKey(k[:max(0, len(k)-16)])
		if !ok {
			return fmt.Errorf("%w: a live job %x", ErrDamaged, k)
		}
		t.live[s]++
		return nil
	})
}

// Applied is up to where the stream's records are durable in the table's file;
// its journal may be trimmed up to there. 0 for an unknown stream.
func (t *Table) Applied(s journal.Stream) uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	if p := t.streams[s]; p != nil {
		return p.durable
	}
	return 0
}

// AppliedAll is Applied of every stream.
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

// SetApplied notes that all of a stream up to seq came in with merged rows. It
// is durable when it returns, and never goes down.
func (t *Table) SetApplied(ctx context.Context, s journal.Stream, seq uint64) error {
	t.mu.Lock()
	p := t.position(s)
	p.seen = max(p.seen, seq)
	t.mu.Unlock()
	return t.flush(ctx)
}

// position gives the stream's, making it. The caller holds t.mu.
func (t *Table) position(s journal.Stream) *position {
	p := t.streams[s]
	if p == nil {
		p = &position{}
		t.streams[s] = p
	}
	return p
}

// Counts says how many jobs there are of each status; deleted ones don't count.
func (t *Table) Counts() map[journal.Status]int64 {
	n := make(map[journal.Status]int64, len(statuses))
	for i, s := range statuses {
		n[s] = t.counts[i].Load()
	}
	return n
}

// LiveCounts says how many jobs that are not final have a home in each stream;
// streams without any are left out.
func (t *Table) LiveCounts() map[journal.Stream]int64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return maps.Clone(t.live)
}

// Watch calls f with the row at every change of a visible job, in order per job
// and outside of all locks, from the goroutine that made the change: f must be
// quick, and must not call Apply, Merge or Reseal. What the sweeper forgets is
// not told. Register before the first Apply.
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

// gate lets waiters through each time it is opened.
type gate struct {
	mu sync.Mutex // guards ch
	ch chan struct{}
}

func (g *gate) init() { g.ch = make(chan struct{}) }

// wait is closed at the next open.
func (g *gate) wait() <-chan struct{} {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.ch
}

func (g *gate) open() {
	g.mu.Lock()
	defer g.mu.Unlock()
	close(g.ch)
	g.ch = make(chan struct{})
}
