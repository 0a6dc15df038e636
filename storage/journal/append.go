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

	"golang.org/x/sys/unix"
)

// Bounds of one write, and of the records that wait to be written.
const (
	// batchBytes and batchRecords bound a batch, which several appends share.
	batchBytes   = 4 << 20
	batchRecords = 4096
	// MaxAppend bounds the frames of one Append or Receive.
	MaxAppend = 32 << 20
	// prewriteBytes is how many zeros a write that extends the file adds. Later writes
	// then overwrite allocated blocks, and their syncs need not touch the file system's
	// own journal: measured 1.3 to 2 times as many syncs.
	prewriteBytes = 512 << 10
	// maxBatches bounds the batches that wait for one stream's committer. Beyond it,
	// callers block before their records are queued.
	maxBatches = 8
)

// queue holds the records that wait to be written to one own stream.
type queue struct {
	mu      sync.Mutex // guards what follows
	filled  sync.Cond
	batches []*batch
	closed  error
	lastLen int // records of the previous batch
}

// batch is written and synced at once.
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

// add queues the records. It returns their batch and the index in it after the last
// of them. It blocks while maxBatches wait.
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
					return nil, 0, fmt.Errorf("wait for space in the journal's queue: %w", ctx.Err())
				}
			}
		}
		b = &batch{done: make(chan struct{}), records: make([]Record, 0, q.lastLen+q.lastLen/8)}
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
	q.lastLen = len(b.records)
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

// Create makes a new stream of this node, durably. Only streams that were created in
// this process take Append.
func (l *Log) Create(ctx context.Context, id Stream) error {
	if err := l.checkSpace(4); err != nil {
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

// add makes a stream with an empty segment. With a queue the stream takes appends.
func (l *Log) add(id Stream, first uint64, flags byte, q *queue) (*stream, error) {
	if id.Origin == "" || len(id.Origin) > MaxOrigin || len(escape(id.Origin)) > maxFileName {
		return nil, fmt.Errorf("%w: a node name of %d bytes", ErrTooLarge, len(id.Origin))
	}
	if err := l.beforeWrite(); err != nil {
		return nil, err
	}
	l.creating.Lock()
	defer l.creating.Unlock()
	if err := l.mayAdd(id); err != nil {
		return nil, err
	}
	s := &stream{id: id, dir: l.dirOf(id), durable: first - 1, queue: q, writing: q != nil}
	if err := l.createFiles(s, first, flags); err != nil {
		return nil, l.noRoom("make a stream", err)
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
	l.changed.Send()
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

func (l *Log) createFiles(s *stream, first uint64, flags byte) error {
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return err
	}
	g, f, err := l.newSegment(s, first, flags)
	if err != nil {
		return err
	}
	s.active, s.allocated, s.segments = f, g.size, []*segment{g}
	if err := l.openSegs.add(s); err != nil {
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
	header := segmentHeader(s.id, first, flags)
	if _, err = f.WriteAt(header, 0); err == nil {
		if err = f.sync(); err == nil {
			err = l.disk.syncDir(s.dir)
		}
	}
	if err != nil {
		_ = f.Close() // the caller fails the log, or the disk is full
		if errors.Is(err, unix.ENOSPC) {
			err = errors.Join(err, l.disk.remove(path)) // so that it can be made later
		}
		return nil, nil, err
	}
	l.segments.Add(1)
	l.bytes.Add(int64(len(header)))
	return &segment{path: path, first: first, last: first - 1, size: int64(len(header))}, f, nil
}

// Append writes records to a stream of this node. When it returns they are durable,
// and Options.Durable was called with them; last is the Seq of the last one. It sets
// Stream, Seq and Clock. The caller must not use the payloads afterwards.
//
// The error wraps ErrFull, ErrFailed, ErrClosed, ErrFrozen, ErrNoStream, ErrTooLarge
// or, for a record with an invalid field, ErrDamaged. When ctx ends it wraps
// ErrUncertain or, if nothing was written, only ctx's error.
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
	if err := l.checkSpace(part); err != nil {
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

// commit is the only goroutine that writes to an own stream.
func (l *Log) commit(s *stream, q *queue) {
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.writing = false
	}()
	for b := q.next(); b != nil; b = q.next() {
		if b.err = l.writeBatch(s, b); b.err == nil {
			// Deleted during the write: nobody may rely on these records.
			if gone := l.checkIntact(); gone != nil {
				b.err = fmt.Errorf("%w: %w", ErrUncertain, gone)
			}
		}
		close(b.done)
		// Callers that have just been answered append again, and others are about to.
		// Yield, so that they share the next sync instead of the one after it. Don't stop
		// as soon as the queue has as many records as this batch: batches that were small
		// once would stay small. When no other goroutine can run this takes no time.
		for range 3 {
			runtime.Gosched()
		}
	}
}

func (l *Log) writeBatch(s *stream, b *batch) error {
	if err := l.beforeWrite(); err != nil {
		return err
	}
	s.write.Lock()
	defer s.write.Unlock()
	if err := l.Err(); err != nil {
		return err
	}
	if s.gone {
		return fmt.Errorf("%w: %s", ErrNoStream, s.id)
	}
	buf := make([]byte, batchHeaderSize, batchHeaderSize+b.bytes)
	seq := s.durable // only changes under s.write
	for i := range b.records {
		r := &b.records[i]
		seq++
		r.Seq, r.Clock = seq, l.clock.Now()
		var err error
		if buf, err = AppendFrame(buf, r); err != nil {
			return l.setFailed("encode a record", err) // Append has checked the record
		}
	}
	return l.put(s, buf, b.records, &l.metrics.own)
}

// put writes a batch, syncs it, and makes it visible. buf is space for the batch
// header and the frames. The caller holds s.write.
func (l *Log) put(s *stream, buf []byte, records []Record, counts *written) error {
	began := time.Now()
	g, err := l.activate(s, int64(len(buf)))
	if err != nil {
		return l.noRoom("open a segment", err)
	}
	putBatchHeader(buf, s.id, g.size, records[0].Seq)
	if err := l.write(s, g, buf); err != nil {
		// What a full disk took of the batch is removed, or a later, shorter batch would have
		// its frames after it. Nothing was synced, so nothing can be lost.
		if cut := s.active.Truncate(g.size); cut != nil {
			return l.setFailed("write records", errors.Join(err, cut))
		}
		s.allocated = g.size
		return l.noRoom("write records", err)
	}
	if err := s.active.sync(); err != nil {
		return l.setFailed("sync records", err)
	}
	took := time.Since(began)
	if err := l.watermarks.put(s, records[len(records)-1].Seq); err != nil {
		return l.setFailed("write a watermark", err)
	}

	s.mu.Lock()
	at := g.size + batchHeaderSize
	for i := range records {
		g.add(&records[i], at)
		at += int64(frameSize(&records[i]))
	}
	g.size += int64(len(buf))
	s.durable = records[len(records)-1].Seq
	healed := s.damaged != 0 && s.durable >= s.damaged
	s.mu.Unlock()

	l.bytes.Add(int64(len(buf)))
	l.tails.add(s.id, records[0].Seq, s.durable, buf[batchHeaderSize:])
	l.changed.Send()
	l.metrics.fsync.Observe(took.Seconds())
	l.metrics.batch.Observe(float64(len(records)))
	counts.records.Add(float64(len(records)))
	counts.bytes.Add(float64(len(buf)))
	if healed {
		if err := l.clearDamage(s); err != nil {
			return l.setFailed("clear a stream's damage", err)
		}
		l.log.Info("a damaged stream has all its records again", "stream", s.id.String())
	}
	l.o.Durable(s.id, records)
	return nil
}

// write writes buf at the end of the segment and, if that extends the file, zeros
// after it. A crash in between leaves fewer zeros.
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
	_, err := s.active.WriteAt(zeroBytes[:s.allocated-end], end)
	if errors.Is(err, unix.ENOSPC) { // the zeros are for speed only
		s.allocated = end
		return s.active.Truncate(end)
	}
	return err
}

// noRoom fails the log because of a write, unless the disk is only full: then the write can
// be done later, and the error wraps ErrFull.
func (l *Log) noRoom(what string, cause error) error {
	if !errors.Is(cause, unix.ENOSPC) {
		return l.setFailed(what, cause)
	}
	l.metrics.refused.Inc()
	return fmt.Errorf("%w: %s: %w", ErrFull, what, cause)
}

// zeroBytes is never written to.
var zeroBytes [prewriteBytes]byte

// activate returns the segment for the next bytes, opened for writing.
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
		if err := l.openSegs.add(s); err != nil {
			return nil, err
		}
		if s.allocated, err = f.size(); err != nil {
			return nil, err
		}
	}
	return g, nil
}

// rotate begins a new segment. The caller holds s.write.
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
	return l.openSegs.add(s)
}

// Freeze ends appends to an own stream, which is then a closed incarnation. Records
// that are queued are still written.
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
