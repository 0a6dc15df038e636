package journal

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"time"
)

// Bounds of what is written at once and of what waits for it.
const (
	// batchBytes and batchRecords bound a batch that several appends share.
	batchBytes   = 4 << 20
	batchRecords = 4096
	// MaxAppend bounds the frames of one Append, and of one Receive.
	MaxAppend = 32 << 20
	// prewriteBytes is how far a write reaches beyond what it has to, in zeros, when
	// it reaches beyond the end of the file at all. The next ones then fall on
	// blocks that the disk has, and their syncs need not touch the file system's
	// own journal: measured 1.3 to 2 times as many of them.
	prewriteBytes = 512 << 10
	// maxBatches wait in front of one stream's committer; further callers wait
	// without having queued anything.
	maxBatches = 8
)

// queue is what waits to be written to one own stream.
type queue struct {
	mu      sync.Mutex // guards what follows
	filled  sync.Cond
	batches []*batch
	closed  error
	usual   int // records of the batch before
}

// batch is what one write and one sync make durable.
type batch struct {
	records []Record
	bytes   int
	done    chan struct{}
	err     error
}

func newQueue() *queue {
	q := &queue{}
	q.filled.L = &q.mu
	return q
}

// add queues the records and gives the batch they are in and how many of it come
// after them: none when full, but for what was queued later.
func (q *queue) add(ctx context.Context, records []Record, bytes int) (b *batch, upTo int, err error) {
	for {
		q.mu.Lock()
		if q.closed != nil {
			q.mu.Unlock()
			return nil, 0, q.closed
		}
		if n := len(q.batches); n > 0 {
			if b = q.batches[n-1]; b.bytes+bytes <= batchBytes && len(b.records)+len(records) <= batchRecords {
				break
			}
			if n >= maxBatches {
				first := q.batches[0]
				q.mu.Unlock()
				select {
				case <-first.done:
					continue
				case <-ctx.Done():
					return nil, 0, fmt.Errorf("wait for room in the journal: %w", ctx.Err())
				}
			}
		}
		b = &batch{done: make(chan struct{}), records: make([]Record, 0, q.usual+q.usual/8)}
		q.batches = append(q.batches, b)
		q.filled.Signal()
		break
	}
	defer q.mu.Unlock()
	b.records = append(b.records, records...)
	b.bytes += bytes
	return b, len(b.records), nil
}

// next waits for a batch; nil when the queue is closed and empty.
func (q *queue) next() *batch {
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(q.batches) == 0 {
		if q.closed != nil {
			return nil
		}
		q.filled.Wait()
	}
	b := q.batches[0]
	q.batches[0] = nil
	q.batches = q.batches[1:]
	q.usual = len(b.records)
	return b
}

func (q *queue) close(why error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed == nil {
		q.closed = why
	}
	q.filled.Broadcast()
}

// Create makes a new stream of this node, which is on the disk when it returns.
// Only streams that were created in this process take Append.
func (l *Log) Create(ctx context.Context, id Stream) error {
	if err := l.roomFor(4); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if _, err := l.add(id, 1, 0, newQueue()); err != nil {
		return fmt.Errorf("create stream %s: %w", id, err)
	}
	l.log.Info("stream created", "stream", id.String())
	return nil
}

// add makes a stream with an empty segment, and with a queue if it is to take
// appends.
func (l *Log) add(id Stream, first uint64, flags byte, q *queue) (*stream, error) {
	if id.Origin == "" || len(id.Origin) > MaxOrigin || len(escape(id.Origin)) > maxFileName {
		return nil, fmt.Errorf("%w: a node's name of %d bytes", ErrTooLarge, len(id.Origin))
	}
	l.making.Lock()
	defer l.making.Unlock()
	if err := l.mayAdd(id); err != nil {
		return nil, err
	}
	s := &stream{id: id, dir: l.dirOf(id), durable: first - 1, queue: q}
	if err := l.makeStream(s, first, flags); err != nil {
		return nil, l.setFailed("make a stream", err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil, errors.Join(ErrClosed, s.active.Close())
	}
	l.streams[id] = s
	if q != nil {
		l.committers.Go(func() { l.commit(s, q) })
	}
	l.moved.give()
	return s, nil
}

func (l *Log) mayAdd(id Stream) error {
	l.mu.RLock()
	defer l.mu.RUnlock()
	switch {
	case l.closed:
		return ErrClosed
	case l.Err() != nil:
		return l.Err()
	case l.streams[id] != nil:
		return ErrStreamExists
	case len(l.streams) >= MaxStreams:
		return fmt.Errorf("%w: %d", ErrTooManyStreams, len(l.streams))
	}
	return nil
}

func (l *Log) makeStream(s *stream, first uint64, flags byte) error {
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return err
	}
	g, f, err := l.newSegment(s, first, flags)
	if err != nil {
		return err
	}
	s.active, s.allocated, s.segments = f, g.size, []*segment{g}
	if err := l.actives.add(s); err != nil {
		return err
	}
	origin := filepath.Dir(s.dir)
	if err := l.disk.syncDir(origin); err != nil {
		return err
	}
	return l.disk.syncDir(l.o.Dir)
}

// newSegment makes an empty segment, durably.
func (l *Log) newSegment(s *stream, first uint64, flags byte) (*segment, file, error) {
	path := filepath.Join(s.dir, segmentName(first))
	f, err := l.disk.open(path, os.O_RDWR|os.O_CREATE|os.O_EXCL)
	if err != nil {
		return nil, nil, err
	}
	header := appendHeader(nil, s.id, first, flags)
	if _, err = f.WriteAt(header, 0); err == nil {
		if err = f.sync(); err == nil {
			err = l.disk.syncDir(s.dir)
		}
	}
	if err != nil {
		_ = f.Close() // the log fails
		return nil, nil, err
	}
	l.segments.Add(1)
	l.bytes.Add(int64(len(header)))
	return &segment{path: path, first: first, last: first - 1, size: int64(len(header))}, f, nil
}

// Append writes records to a stream of this node and returns when they are
// durable and Durable was told; last is the Seq of the last one. It fills in
// Stream, Seq and Clock. The payloads belong to the log from then on.
//
// The errors are ErrFull, ErrFailed, ErrClosed, ErrFrozen, ErrNoStream,
// ErrTooLarge, ErrDamaged for a record that is none, or, when ctx ended,
// ErrUncertain or, when nothing was written, ctx's own.
func (l *Log) Append(ctx context.Context, id Stream, records []Record) (last uint64, err error) {
	s, err := l.find(id)
	if err != nil {
		return 0, err
	}
	s.mu.Lock()
	q := s.queue
	s.mu.Unlock()
	if q == nil {
		return 0, fmt.Errorf("%w: append to %s", ErrFrozen, id)
	}
	if len(records) == 0 {
		return s.end().Durable, nil
	}
	bytes, part := 0, int64(4)
	for i := range records {
		r := &records[i]
		r.Stream, r.Seq = id, 1
		if err := r.check(); err != nil {
			return 0, err
		}
		bytes += frameSize(r)
		if r.Kind == Submitted {
			part = 1
		}
	}
	if bytes > MaxAppend {
		return 0, fmt.Errorf("%w: %d bytes in one append", ErrTooLarge, bytes)
	}
	if err := l.roomFor(part); err != nil {
		return 0, err
	}
	b, upTo, err := q.add(ctx, records, bytes)
	if err != nil {
		return 0, err
	}
	select {
	case <-b.done:
	case <-ctx.Done():
		select {
		case <-b.done:
		default:
			return 0, fmt.Errorf("%w: %w", ErrUncertain, ctx.Err())
		}
	}
	if b.err != nil {
		return 0, b.err
	}
	copy(records, b.records[upTo-len(records):upTo])
	return records[len(records)-1].Seq, nil
}

// commit is the only writer of an own stream.
func (l *Log) commit(s *stream, q *queue) {
	for b := q.next(); b != nil; b = q.next() {
		b.err = l.writeBatch(s, b)
		close(b.done)
		// Those who have just been answered come again, and others are on their way:
		// let them, so that they share the next sync and not the one after it. Not
		// only until as many wait as were in this batch: once few, it would stay few.
		// With nobody to run it takes no time.
		for range 3 {
			runtime.Gosched()
		}
	}
}

func (l *Log) writeBatch(s *stream, b *batch) error {
	s.write.Lock()
	defer s.write.Unlock()
	if err := l.Err(); err != nil {
		return err
	}
	if s.gone {
		return fmt.Errorf("%w: %s", ErrNoStream, s.id)
	}
	buf := make([]byte, markSize, markSize+b.bytes)
	seq := s.durable // only changes under s.write
	for i := range b.records {
		r := &b.records[i]
		seq++
		r.Seq, r.Clock = seq, l.clock.Now()
		var err error
		if buf, err = AppendFrame(buf, r); err != nil {
			return l.setFailed("encode a record", err) // checked before
		}
	}
	return l.put(s, buf, b.records, &l.metrics.own)
}

// put writes frames, which stand behind the room for a mark, syncs, and shows
// them. The caller holds s.write.
func (l *Log) put(s *stream, buf []byte, records []Record, counts *written) error {
	began := time.Now()
	g, err := l.activate(s, int64(len(buf)))
	if err != nil {
		return l.setFailed("open a segment", err)
	}
	putMark(buf, s.id, g.size, records[0].Seq)
	if err := l.write(s, g, buf); err != nil {
		return l.setFailed("write records", err)
	}
	if err := s.active.sync(); err != nil {
		return l.setFailed("sync records", err)
	}
	took := time.Since(began)
	if err := l.marks.put(s, records[len(records)-1].Seq); err != nil {
		return l.setFailed("mark what is durable", err)
	}

	s.mu.Lock()
	at := g.size + markSize
	for i := range records {
		g.note(&records[i], at)
		at += int64(frameSize(&records[i]))
	}
	g.size += int64(len(buf))
	s.durable = records[len(records)-1].Seq
	healed := s.damaged != 0 && s.durable >= s.damaged
	s.mu.Unlock()

	l.bytes.Add(int64(len(buf)))
	l.tails.add(s.id, records[0].Seq, s.durable, buf[markSize:])
	l.moved.give()
	l.metrics.fsync.Observe(took.Seconds())
	l.metrics.batch.Observe(float64(len(records)))
	counts.records.Add(float64(len(records)))
	counts.bytes.Add(float64(len(buf)))
	if healed {
		if err := l.heal(s); err != nil {
			return l.setFailed("heal a stream", err)
		}
		l.log.Info("a damaged stream is whole again", "stream", s.id.String())
	}
	l.o.Durable(s.id, records)
	return nil
}

// write writes buf at the end of the segment, and zeros ahead of it where the
// file ends. After a crash in between there are fewer zeros.
func (l *Log) write(s *stream, g *segment, buf []byte) error {
	if _, err := s.active.WriteAt(buf, g.size); err != nil {
		return err
	}
	end := g.size + int64(len(buf))
	if end <= s.allocated {
		return nil
	}
	s.allocated = max(min((end/prewriteBytes+1)*prewriteBytes, l.o.SegmentBytes), end)
	if s.allocated == end {
		return nil
	}
	_, err := s.active.WriteAt(ahead[:s.allocated-end], end)
	return err
}

// ahead is never written to.
var ahead [prewriteBytes]byte

// activate gives the segment to write the next bytes to, open.
func (l *Log) activate(s *stream, bytes int64) (*segment, error) {
	g := s.last()
	if g.last >= g.first && g.size+bytes > l.o.SegmentBytes {
		if err := l.rotate(s); err != nil {
			return nil, err
		}
		g = s.last()
	}
	if s.active == nil {
		f, err := l.disk.open(g.path, os.O_RDWR)
		if err != nil {
			return nil, err
		}
		s.active = f
		if err := l.actives.add(s); err != nil {
			return nil, err
		}
		if s.allocated, err = f.size(); err != nil {
			return nil, err
		}
	}
	return g, nil
}

// rotate makes the next records go to a new segment. The caller holds s.write.
func (l *Log) rotate(s *stream) error {
	if err := l.closeActive(s); err != nil {
		return err
	}
	next, f, err := l.newSegment(s, s.durable+1, 0)
	if err != nil {
		return err
	}
	s.active, s.allocated = f, next.size
	s.mu.Lock()
	s.segments = append(s.segments, next)
	s.mu.Unlock()
	return l.actives.add(s)
}

// Freeze ends appends to an own stream: what is queued is still written. It is
// a closed incarnation then.
func (l *Log) Freeze(id Stream) error {
	s, err := l.find(id)
	if err != nil {
		return err
	}
	s.freeze(fmt.Errorf("%w: append to %s", ErrFrozen, id))
	return nil
}

func (s *stream) freeze(why error) {
	s.mu.Lock()
	q := s.queue
	s.queue = nil
	s.mu.Unlock()
	if q != nil {
		q.close(why)
	}
}
