package journal

import (
	"errors"
	"fmt"
	"log/slog"
	"math"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// MaxStreams bounds the streams of one log.
const MaxStreams = 1024

// Defaults of Options.
const (
	DefaultSegmentBytes = 64 << 20
	DefaultBudgetBytes  = 4 << 30
	DefaultFreeFloor    = 256 << 20
	DefaultTailBytes    = 16 << 20
)

// Options of a log. Dir, Clock, Logger and Registerer are required.
type Options struct {
	Dir        string // made when absent; the data directory's lock is held by the caller
	Clock      *HLC
	Logger     *slog.Logger
	Registerer prometheus.Registerer

	SegmentBytes int64 // a file is closed beyond it; 0: DefaultSegmentBytes
	BudgetBytes  int64 // see Shrink; 0: DefaultBudgetBytes
	// FreeFloor is the room on the disk below which submissions are refused; copies are
	// below half of it, and other own records below a quarter, so that jobs in flight
	// can end. 0: DefaultFreeFloor; negative: no floor.
	FreeFloor int64
	TailBytes int64 // of recent frames kept in memory, of all streams; 0: DefaultTailBytes

	// Durable is told of records that have become durable, in order for each stream and
	// before those who appended them. It may keep the records, and must not change
	// them. While it blocks, the stream takes no more. It may read and Trim, but must
	// not wait for a call of the Log that writes to the same stream.
	Durable func(Stream, []Record)
}

// Log is the journals of one node: its own streams and copies of others'. It is
// safe for many goroutines.
type Log struct {
	o       Options
	log     *slog.Logger
	clock   *HLC
	metrics *metrics
	disk    disk
	store   storeID
	room    room
	tails   tails
	moved   notice
	actives actives
	marks   *marks

	making sync.Mutex // held while streams are made and dropped; before mu

	bytes, segments atomic.Int64

	mu      sync.RWMutex // guards streams, closed
	streams map[Stream]*stream
	closed  bool

	committers sync.WaitGroup

	fail   sync.Once
	failed chan struct{}
	cause  atomic.Pointer[error]
}

// End says what is held of a stream: the records First to Durable, none when
// First is Durable+1.
type End struct {
	First   uint64
	Durable uint64
	// Damaged is the last record that is known to have been here when damage cut the
	// stream behind Durable; 0 when there is none. It goes when Durable gets there.
	Damaged uint64
	Own     bool // takes Append: of this process, and not frozen
}

// stream is one stream's state.
type stream struct {
	id  Stream
	dir string

	// Locks are taken in the order write, prune, mu.

	write  sync.Mutex // held while writing to the end, and while Durable is told; guards what follows
	active file       // the last segment, nil until it is needed
	// allocated is the active file's size: zeros from the segment's own size on.
	allocated int64
	gone      bool
	slot      int       // of its mark, 0 for none yet
	warned    time.Time // of its origin's clock

	prune sync.Mutex // held while files other than the last are deleted or replaced

	mu       sync.Mutex // guards what follows
	segments []*segment // never empty, rising
	dropped  bool       // its files are gone, or about to go
	durable  uint64
	damaged  uint64
	queue    *queue // nil where nobody may append
}

func (s *stream) end() End {
	s.mu.Lock()
	defer s.mu.Unlock()
	return End{First: s.segments[0].first, Durable: s.durable, Damaged: s.damaged, Own: s.queue != nil}
}

// last is the segment that is written to.
func (s *stream) last() *segment {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.segments[len(s.segments)-1]
}

// Open opens the journals of a directory, or makes them. Every record is
// checked; what that means and what is done about damage stands in DESIGN.md.
// The error is ErrNewerFormat, ErrDamaged for what can't be helped, or the file
// system's.
func Open(o Options) (*Log, error) { return open(o, osDisk{}) }

func open(o Options, d disk) (*Log, error) {
	def := func(v *int64, d int64) {
		if *v == 0 {
			*v = d
		}
	}
	def(&o.SegmentBytes, DefaultSegmentBytes)
	def(&o.BudgetBytes, DefaultBudgetBytes)
	def(&o.FreeFloor, DefaultFreeFloor)
	def(&o.TailBytes, DefaultTailBytes)
	if o.Durable == nil {
		o.Durable = func(Stream, []Record) {}
	}
	l := &Log{
		o: o, log: o.Logger, clock: o.Clock, disk: d,
		streams: map[Stream]*stream{},
		failed:  make(chan struct{}),
	}
	l.metrics = newMetrics(o.Registerer, l)
	l.room = room{dir: o.Dir, floor: o.FreeFloor, disk: d, began: time.Now()}
	l.tails = tails{limit: o.TailBytes, of: map[Stream][]*chunk{}}
	if err := l.recover(); err != nil {
		return nil, fmt.Errorf("open the journal %s: %w", o.Dir, err)
	}
	l.log.Info("journal opened", "path", o.Dir, "streams", len(l.streams), "segments", l.segments.Load(), "bytes", l.bytes.Load())
	return l, nil
}

// Failed is closed when a write or sync has failed, or a stored record turned
// out to be damaged. The node must stop then. Err says why.
func (l *Log) Failed() <-chan struct{} { return l.failed }

// Err is nil until Failed is closed; then it wraps ErrFailed and the cause.
func (l *Log) Err() error {
	if p := l.cause.Load(); p != nil {
		return *p
	}
	return nil
}

func (l *Log) setFailed(what string, cause error) error {
	l.fail.Do(func() {
		err := fmt.Errorf("%w: %s: %w", ErrFailed, what, cause)
		l.cause.Store(&err)
		l.metrics.failures.Inc()
		if errors.Is(cause, ErrDamaged) {
			l.metrics.damaged.Inc()
		}
		l.log.Error("journal failed; the node must stop", "doing", what, "err", cause)
		close(l.failed)
	})
	return l.Err()
}

// usable says whether the log may still be asked.
func (l *Log) usable() error {
	l.mu.RLock()
	closed := l.closed
	l.mu.RUnlock()
	if closed {
		return ErrClosed
	}
	return l.Err()
}

// Close waits for what is being written and closes the files. It is safe to
// call twice.
func (l *Log) Close() error {
	l.making.Lock()
	defer l.making.Unlock()
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return nil
	}
	l.closed = true
	streams := l.all()
	l.mu.Unlock()
	for _, s := range streams {
		s.freeze(ErrClosed)
	}
	l.committers.Wait()
	var err error
	for _, s := range streams {
		s.write.Lock()
		s.prune.Lock()
		err = errors.Join(err, l.closeActive(s))
		s.gone = true
		s.prune.Unlock()
		s.write.Unlock()
	}
	err = errors.Join(err, l.marks.close())
	if l.Err() != nil {
		return err // the next start trusts nothing that was not settled before
	}
	return errors.Join(err, l.settle(streams))
}

// all lists the streams; the caller holds l.mu.
func (l *Log) all() []*stream {
	all := make([]*stream, 0, len(l.streams))
	for _, s := range l.streams {
		all = append(all, s)
	}
	return all
}

func (l *Log) streamCount() int {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return len(l.streams)
}

// find gives a stream of a log that can be used.
func (l *Log) find(id Stream) (*stream, error) {
	l.mu.RLock()
	s, closed := l.streams[id], l.closed
	l.mu.RUnlock()
	switch {
	case closed:
		return nil, ErrClosed
	case l.Err() != nil:
		return nil, l.Err()
	case s == nil:
		return nil, fmt.Errorf("%w: %s", ErrNoStream, id)
	}
	return s, nil
}

// StoreEpoch is higher each time that the directory was made anew, or lost
// records to damage: the Unix milliseconds of that moment, or more. What others
// know of this node's streams under a lower one counts no more.
func (l *Log) StoreEpoch() uint64 { return l.store.epoch }

// Ends says what is held of every stream.
func (l *Log) Ends() map[Stream]End {
	l.mu.RLock()
	defer l.mu.RUnlock()
	ends := make(map[Stream]End, len(l.streams))
	for id, s := range l.streams {
		ends[id] = s.end()
	}
	return ends
}

// End says what is held of one stream.
func (l *Log) End(id Stream) (End, bool) {
	l.mu.RLock()
	s := l.streams[id]
	l.mu.RUnlock()
	if s == nil {
		return End{}, false
	}
	return s.end(), true
}

// Changed is closed at the next change of what Ends says. Take it before
// looking, else a change in between goes unnoticed.
func (l *Log) Changed() <-chan struct{} { return l.moved.next() }

// isDropped says whether Drop has begun to delete the stream's files.
func (s *stream) isDropped() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.dropped
}

// notice tells many waiters of a change, and costs little without one.
type notice struct {
	mu sync.Mutex // guards ch
	ch chan struct{}
}

func (n *notice) next() <-chan struct{} {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.ch == nil {
		n.ch = make(chan struct{})
	}
	return n.ch
}

func (n *notice) give() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.ch != nil {
		close(n.ch)
		n.ch = nil
	}
}

// room watches the free bytes of the disk.
type room struct {
	dir   string
	floor int64
	disk  disk
	began time.Time

	mu      sync.Mutex // guards what follows
	free    int64
	checked time.Duration
	known   bool
}

// A disk that fills at 1 GB/s loses a tenth of the default floor in this time.
const roomEvery = 25 * time.Millisecond

// left is the free bytes above the floor divided by part. What can't be
// measured is not held against the caller: the write itself will tell.
func (r *room) left(part int64) int64 {
	if r.floor < 0 {
		return math.MaxInt64
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if since := time.Since(r.began); !r.known || since-r.checked >= roomEvery {
		free, err := r.disk.free(r.dir)
		if err != nil {
			return math.MaxInt64
		}
		r.free, r.checked, r.known = free, since, true
	}
	return r.free - r.floor/part
}

func (l *Log) roomFor(part int64) error {
	if l.room.left(part) > 0 {
		return nil
	}
	l.metrics.refused.Inc()
	return fmt.Errorf("%w: %s has less than %d MiB left", ErrFull, l.o.Dir, l.o.FreeFloor/part>>20)
}

// dirOf is where a stream's segments are. Origins are names that an operator
// chose; whatever a file system could take amiss is escaped.
func (l *Log) dirOf(id Stream) string {
	return filepath.Join(l.o.Dir, escape(id.Origin), id.Incarnation.String())
}
