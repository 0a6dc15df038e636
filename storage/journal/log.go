package journal

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/dsnode/dsnode/storage/notify"
)

// MaxStreams bounds the streams of one log.
const MaxStreams = 1024

// Options of a log. Dir, Clock, Logger and Registerer are required.
type Options struct {
	Dir        string // created if it does not exist; the caller holds the data directory's lock
	Clock      *HLC
	Logger     *slog.Logger
	Registerer prometheus.Registerer

	SegmentBytes int64 // size at which a new file is begun; 0: 64 MiB
	BudgetBytes  int64 // see Shrink; 0: 4 GiB
	// FreeFloor is the free space on the disk below which submissions are refused. Copies
	// are refused below half of it, other own records below a quarter, so that running
	// jobs can finish. 0: 256 MiB; negative: no floor.
	FreeFloor int64
	TailBytes int64 // recent frames of all streams kept in memory; 0: 16 MiB

	// Durable is called with records that have become durable, in order for each stream,
	// before Append returns them. It may keep the records, and must not change them.
	// While it blocks, nothing more is written to the stream. It may call Read and Trim, but must not
	// wait for a call that writes to the same stream.
	Durable func(Stream, []Record)

	// BeforeWrite is called before records are written and before a stream is created, with
	// no lock held. It may block, and its error is that of the write. Nil: nothing.
	BeforeWrite func() error
	// Intact is nil while this directory is where its path says. Otherwise nothing is
	// accepted (ErrReplaced): no later process would find it. Nil: not asked.
	Intact func() error
	// FreeBytes has the free bytes of a directory's file system; nil: asks the operating
	// system.
	FreeBytes func(dir string) (int64, error)
}

// Log stores the journals of one node: its own streams and copies of others'. It is
// safe for concurrent use.
type Log struct {
	o          Options
	log        *slog.Logger
	clock      *HLC
	metrics    *metrics
	disk       disk
	epoch      uint64 // see StoreEpoch
	space      freeSpace
	tails      tails
	changed    notify.Broadcast
	openSegs   openSegments
	watermarks *watermarks

	creating sync.Mutex // held while a stream is created or dropped; locked before mu

	bytes, segments atomic.Int64

	mu      sync.RWMutex // guards streams, closed
	streams map[Stream]*stream
	closed  bool

	committers sync.WaitGroup

	fail   sync.Once
	failed chan struct{}
	cause  atomic.Pointer[error]
}

// End says which records of a stream this node holds: First to Durable, none when
// First is Durable+1.
type End struct {
	First   uint64
	Durable uint64
	// Damaged is not 0 when the stream was truncated at damage after Durable: it is the
	// last record known to have existed. It is reset when Durable reaches it.
	Damaged uint64
	Own     bool // takes Append: created by this process, and not frozen
	// Writing: Own, or frozen while records are still queued. When it is false, this
	// process adds no record of its own after Durable.
	Writing bool
}

// stream is the state of one stream.
type stream struct {
	id  Stream
	dir string

	// Locks are taken in the order write, prune, mu.

	write  sync.Mutex // held while writing to the end and during Options.Durable; guards what follows
	active file       // the last segment, nil while it is not open
	// allocated is the size of the active file: zeros follow the segment's own size.
	allocated int64
	gone      bool
	slot      int       // of its watermark, 0: none yet
	warned    time.Time // when a warning about its origin's clock was logged

	prune sync.Mutex // held while files other than the last one are deleted or replaced

	mu       sync.Mutex // guards what follows
	segments []*segment // never empty, in rising order
	dropped  bool       // Drop has begun to delete its files
	durable  uint64
	damaged  uint64
	queue    *queue // nil: the stream does not take appends
	writing  bool   // commit runs
}

func (s *stream) end() End {
	s.mu.Lock()
	defer s.mu.Unlock()
	return End{First: s.segments[0].first, Durable: s.durable, Damaged: s.damaged, Own: s.queue != nil, Writing: s.writing}
}

// last returns the segment at the end of the stream, which is written to.
func (s *stream) last() *segment {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.segments[len(s.segments)-1]
}

// Open opens the journals of a directory, or creates them. It checks every record;
// DESIGN.md says how, and what happens with damage. The error wraps ErrNewerFormat,
// ErrDamaged for damage that can't be isolated, or is one of the file system.
func Open(o Options) (*Log, error) { return open(o, osDisk{}) }

func open(o Options, d disk) (*Log, error) {
	o.SegmentBytes = cmp.Or(o.SegmentBytes, 64<<20)
	o.BudgetBytes = cmp.Or(o.BudgetBytes, 4<<30)
	o.FreeFloor = cmp.Or(o.FreeFloor, 256<<20)
	o.TailBytes = cmp.Or(o.TailBytes, 16<<20)
	if o.Durable == nil {
		o.Durable = func(Stream, []Record) {}
	}
	if o.FreeBytes == nil {
		o.FreeBytes = d.free
	}
	l := &Log{
		o: o, log: o.Logger, clock: o.Clock, disk: d,
		streams: map[Stream]*stream{},
		failed:  make(chan struct{}),
	}
	l.metrics = newMetrics(o.Registerer, l)
	l.space = freeSpace{dir: o.Dir, floor: o.FreeFloor, bytes: o.FreeBytes}
	l.tails = tails{limit: o.TailBytes, chunks: map[Stream][]*chunk{}}
	if err := l.recover(); err != nil {
		return nil, fmt.Errorf("open the journal %s: %w", o.Dir, err)
	}
	l.log.Info("journal opened", "path", o.Dir, "streams", len(l.streams), "segments", l.segments.Load(), "bytes", l.bytes.Load())
	return l, nil
}

// Failed is closed when a write or sync failed, or when a stored record is damaged.
// The node must stop then. Err returns the cause.
func (l *Log) Failed() <-chan struct{} { return l.failed }

// Err is nil until Failed is closed. Then it wraps ErrFailed and the cause.
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

func (l *Log) beforeWrite() error {
	if l.o.BeforeWrite == nil {
		return nil
	}
	if err := l.o.BeforeWrite(); err != nil {
		return l.noRoom("write", err)
	}
	return nil
}

// usable returns ErrClosed, an error that wraps ErrFailed, or nil.
func (l *Log) usable() error {
	l.mu.RLock()
	closed := l.closed
	l.mu.RUnlock()
	if closed {
		return ErrClosed
	}
	return l.Err()
}

// Close waits for the writes that are in progress and closes the files. It is safe to
// call twice.
func (l *Log) Close() error {
	l.creating.Lock()
	defer l.creating.Unlock()
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
	err = errors.Join(err, l.watermarks.close())
	if l.Err() != nil {
		return err // keep the old checkpoint: later bytes may not be on the disk
	}
	return errors.Join(err, l.writeCheckpoint(streams))
}

// all lists the streams. The caller holds l.mu.
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

// find returns a stream, or an error if the log can't be used.
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

// StoreEpoch increases each time the directory is created again or loses records to
// damage: it is the Unix milliseconds of that moment, or more. What peers recorded
// about this node's streams under a lower epoch is obsolete.
func (l *Log) StoreEpoch() uint64 { return l.epoch }

// Ends returns what is held of every stream.
func (l *Log) Ends() map[Stream]End {
	l.mu.RLock()
	defer l.mu.RUnlock()
	ends := make(map[Stream]End, len(l.streams))
	for id, s := range l.streams {
		ends[id] = s.end()
	}
	return ends
}

// End returns what is held of one stream.
func (l *Log) End(id Stream) (End, bool) {
	l.mu.RLock()
	s := l.streams[id]
	l.mu.RUnlock()
	if s == nil {
		return End{}, false
	}
	return s.end(), true
}

// Changed is closed at the next change of Ends. Call it before Ends, or a change in
// between goes unnoticed.
func (l *Log) Changed() <-chan struct{} { return l.changed.Next() }

// isDropped reports whether Drop has begun to delete the stream's files.
func (s *stream) isDropped() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.dropped
}

// freeSpace checks the free bytes of the disk, from time to time.
type freeSpace struct {
	dir   string
	floor int64
	bytes func(dir string) (int64, error)

	mu      sync.Mutex // guards what follows
	free    int64
	checked time.Time
}

// A disk that fills at 1 GB/s loses a tenth of the default floor in this time.
const spaceCheckEvery = 25 * time.Millisecond

// aboveFloor returns the free bytes above the floor divided by part. When the free
// space is unknown there is no limit: a write to a full disk will fail anyway.
func (r *freeSpace) aboveFloor(part int64) int64 {
	if r.floor < 0 {
		return math.MaxInt64
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if time.Since(r.checked) >= spaceCheckEvery {
		free, err := r.bytes(r.dir)
		if err != nil {
			return math.MaxInt64
		}
		r.free, r.checked = free, time.Now()
	}
	return r.free - r.floor/part
}

// Space returns the free bytes of the disk and the floor below which submissions are
// refused. known is false when there is no floor or the free space can't be read.
func (l *Log) Space() (free, floor int64, known bool) {
	above := l.space.aboveFloor(1)
	if above == math.MaxInt64 {
		return 0, 0, false
	}
	return above + l.space.floor, l.space.floor, true
}

// checkIntact returns an error that wraps ErrReplaced when the directory is gone.
func (l *Log) checkIntact() error {
	if l.o.Intact == nil {
		return nil
	}
	if err := l.o.Intact(); err != nil {
		return fmt.Errorf("%w: %w", ErrReplaced, err)
	}
	return nil
}

func (l *Log) checkSpace(part int64) error {
	if err := l.checkIntact(); err != nil {
		l.metrics.refused.Inc()
		return err
	}
	if l.space.aboveFloor(part) > 0 {
		return nil
	}
	l.metrics.refused.Inc()
	return fmt.Errorf("%w: %s has less than %d MiB left", ErrFull, l.o.Dir, l.o.FreeFloor/part>>20)
}

// dirOf returns the directory of a stream's segments. Origins are names that an
// operator chose, so special characters are escaped.
func (l *Log) dirOf(id Stream) string {
	return filepath.Join(l.o.Dir, escape(id.Origin), id.Incarnation.String())
}
