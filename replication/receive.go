package replication

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/dsnode/dsnode/replication/replicationpb"
	"github.com/dsnode/dsnode/storage/journal"
	"github.com/dsnode/dsnode/storage/keyring"
)

const (
	// maxQueued bounds the bytes of one session that wait to be written: the source's
	// windows, and the largest record beyond each.
	maxQueued = liveWindow + bulkWindow + 2*(journal.MaxPayload+(1<<20))
	// maxStored bounds the bytes of one stream that are written by one sync.
	maxStored = 4 << 20
	fullPause = time.Second
)

var (
	errWindowExceeded  = errors.New("the source sent more than its windows allow")
	errMalformedFrames = errors.New("the source sent malformed frames")
)

// recordReceiver writes the records that a source sends. Each stream has a goroutine while
// there is something to write, so that a large backlog of one stream doesn't delay
// others. Records that arrive during one sync are written together by the next.
type recordReceiver struct {
	c *pullSession

	mu      sync.Mutex // guards the fields below
	streams map[journal.Stream]*receiveBuffer
	queued  int
}

// receiveBuffer holds the records of one stream that are not durable yet.
type receiveBuffer struct {
	batches   []batch
	partial   []byte // of a record in several messages
	busy      bool   // a goroutine is writing
	refused   bool   // the stream is ignored for the rest of the session
	requested bool   // the source was asked to continue after another record
}

type batch struct {
	first, last uint64
	frames      []byte
}

// put adds the frames of one message.
func (in *recordReceiver) put(f *replicationpb.Frames) error {
	s, err := readStream(f.GetStream())
	if err != nil {
		return err
	}
	data := f.GetData()
	in.mu.Lock()
	defer in.mu.Unlock()
	b := in.streams[s]
	if b == nil {
		if len(in.streams) >= maxMarks {
			return fmt.Errorf("%w: too many streams", errWindowExceeded)
		}
		b = &receiveBuffer{}
		in.streams[s] = b
	}
	if b.refused {
		return nil
	}
	if in.queued += len(data); in.queued > maxQueued {
		return fmt.Errorf("%w: %d bytes wait", errWindowExceeded, in.queued)
	}
	if f.GetMore() || len(b.partial) > 0 {
		b.partial = append(b.partial, data...)
		if f.GetMore() {
			return nil
		}
		data, b.partial = b.partial, nil
	}
	if f.GetFirst() == 0 || f.GetLast() < f.GetFirst() || len(data) == 0 {
		return fmt.Errorf("%w: %s from %d to %d", errMalformedFrames, s, f.GetFirst(), f.GetLast())
	}
	b.batches = append(b.batches, batch{f.GetFirst(), f.GetLast(), data})
	if !b.busy {
		b.busy = true
		in.c.group.Go(func() error { return in.write(s, b) })
	}
	return nil
}

// write stores the records of a stream until none are left. An error ends the session.
func (in *recordReceiver) write(s journal.Stream, b *receiveBuffer) error {
	for {
		next, ok := in.next(b)
		if !ok {
			return nil
		}
		err := in.store(in.c.ctx, s, b, next)
		in.mu.Lock()
		in.queued -= len(next.frames)
		if err != nil && in.c.ctx.Err() == nil {
			err = in.refuse(s, b, err)
		}
		in.mu.Unlock()
		if err != nil {
			return err
		}
	}
}

// next returns the batches for one sync, joined as long as there is no gap.
func (in *recordReceiver) next(b *receiveBuffer) (batch, bool) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if len(b.batches) == 0 || in.c.ctx.Err() != nil {
		b.busy = false
		return batch{}, false
	}
	n, bytes := 1, len(b.batches[0].frames)
	for n < len(b.batches) && b.batches[n].first == b.batches[n-1].last+1 && bytes+len(b.batches[n].frames) <= maxStored {
		bytes += len(b.batches[n].frames)
		n++
	}
	out := batch{first: b.batches[0].first, last: b.batches[n-1].last, frames: b.batches[0].frames}
	if n > 1 {
		out.frames = make([]byte, 0, bytes)
		for _, x := range b.batches[:n] {
			out.frames = append(out.frames, x.frames...)
		}
	}
	clear(b.batches[:n])
	b.batches = b.batches[n:]
	return out, true
}

// refuse ignores the stream for the rest of the session, or returns why the session must
// end. The caller holds mu.
func (in *recordReceiver) refuse(s journal.Stream, b *receiveBuffer, err error) error {
	switch {
	case errors.Is(err, journal.ErrFrozen):
		// The source has a copy of a stream that this node writes; it is not needed.
	case errors.Is(err, journal.ErrDiverged), errors.Is(err, journal.ErrTooManyStreams):
		in.c.r.metrics.refused.Inc()
		in.c.r.opts.Logger.Error("a stream can't be stored; ignoring it until the next pull call", "stream", s.String(), "source", in.c.source, "err", err)
	default:
		return fmt.Errorf("store stream %s: %w", s, err)
	}
	for _, x := range b.batches {
		in.queued -= len(x.frames)
	}
	b.batches, b.refused = nil, true
	in.c.requestAfter(s, never) // otherwise unacknowledged batches would fill the source's window
	return nil
}

// store makes one batch durable and acknowledges it.
func (in *recordReceiver) store(ctx context.Context, s journal.Stream, b *receiveBuffer, x batch) error {
	r := in.c.r
	for {
		held, rest, err := r.openable(x.frames)
		if err != nil {
			return err
		}
		for len(held) > 0 {
			durable, err := r.opts.Log.Receive(ctx, s, held)
			switch {
			case errors.Is(err, journal.ErrGap):
				// Earlier records were lost, on the way or here. Request them once.
				if !b.requested {
					b.requested = true
					r.opts.Logger.Info("records are missing before those received; requesting them", "stream", s.String(), "source", in.c.source, "held", durable, "came", x.first)
					in.c.requestAfter(s, durable)
				}
				return nil
			case journal.Refused(err):
				r.opts.Logger.Warn("no disk space for the copy of a stream; waiting", "stream", s.String(), "err", err)
				if !pause(ctx, fullPause) {
					return ctx.Err()
				}
				continue
			case err != nil:
				return err
			}
			b.requested = false
			r.metrics.received.Add(float64(len(held)))
			r.advanced(map[journal.Stream]uint64{s: durable})
			in.c.acknowledge(s)
			held = nil
		}
		if len(rest) == 0 {
			return nil
		}
		x.frames = rest
		if err := r.awaitKey(ctx, s, in.c.source, rest); err != nil {
			return err
		}
	}
}

func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// openable splits frames before the first record that is sealed with a key this node
// doesn't have. Acknowledging a record that this node can't open would be wrong: its copy
// would be useless.
func (r *Replication) openable(frames []byte) (can, rest []byte, err error) {
	var known keyring.KeyID
	for rest = frames; len(rest) > 0; {
		rec, after, err := journal.NextFrame(rest)
		if err != nil {
			return nil, nil, fmt.Errorf("%w: %w", errMalformedFrames, err)
		}
		if len(rec.Payload) > 0 {
			id, err := keyring.SealedWith(rec.Payload)
			if err != nil {
				return nil, nil, fmt.Errorf("%w: %w", errMalformedFrames, err)
			}
			if id != known && !r.opts.Ring.Has(id) {
				return frames[:len(frames)-len(rest)], rest, nil
			}
			known = id
		}
		rest = after
	}
	return frames, nil, nil
}

// awaitKey waits until the first record can be opened.
func (r *Replication) awaitKey(ctx context.Context, s journal.Stream, source string, frames []byte) error {
	r.metrics.keyWaits.Inc()
	defer r.metrics.keyWaits.Dec()
	logged := false
	for {
		changed := r.opts.Ring.Changed()
		can, _, err := r.openable(frames)
		if err != nil || len(can) > 0 {
			return err
		}
		if !logged {
			logged = true
			r.opts.Logger.Error("a stream waits: its next record is sealed with a key that this node does not have", "stream", s.String(), "source", source)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		}
	}
}
