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
	// maxQueued bounds the bytes of one session that wait for the disk: the
	// source's windows, and the largest record beyond each.
	maxQueued = liveWindow + bulkWindow + 2*(journal.MaxPayload+(1<<20))
	// maxStored bounds what one sync takes of a stream.
	maxStored = 4 << 20
	fullPause = time.Second
)

var (
	errFlooded   = errors.New("the source sent more than its windows allow")
	errNotFrames = errors.New("the source sent what are no frames")
)

// intake writes what a source sends. Each stream is written by a goroutine of
// its own while there is something to write, so that a large backlog of one
// doesn't hold up another; what has gathered during one sync goes into the next.
type intake struct {
	c       *session
	workers sync.WaitGroup
	failed  chan error // has room for one: the session can't go on

	mu      sync.Mutex // guards what follows
	streams map[journal.Stream]*inbox
	queued  int
}

// inbox is what has come of one stream and isn't durable.
type inbox struct {
	batches []batch
	partial []byte // of a record that comes in pieces
	busy    bool
	refused bool // nothing of it is taken in this session
	asked   bool // the source was asked to go on elsewhere
}

type batch struct {
	first, last uint64
	frames      []byte
}

func newIntake(c *session) *intake {
	return &intake{c: c, streams: map[journal.Stream]*inbox{}, failed: make(chan error, 1)}
}

func (in *intake) fail(err error) {
	select {
	case in.failed <- err:
	default:
	}
}

// put takes a message's frames.
func (in *intake) put(f *replicationpb.Frames) error {
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
			return fmt.Errorf("%w: too many streams", errFlooded)
		}
		b = &inbox{}
		in.streams[s] = b
	}
	if b.refused {
		return nil
	}
	if in.queued += len(data); in.queued > maxQueued {
		return fmt.Errorf("%w: %d bytes wait", errFlooded, in.queued)
	}
	if f.GetMore() || len(b.partial) > 0 {
		b.partial = append(b.partial, data...)
		if f.GetMore() {
			return nil
		}
		data, b.partial = b.partial, nil
	}
	if f.GetFirst() == 0 || f.GetLast() < f.GetFirst() || len(data) == 0 {
		return fmt.Errorf("%w: %s from %d to %d", errNotFrames, s, f.GetFirst(), f.GetLast())
	}
	b.batches = append(b.batches, batch{f.GetFirst(), f.GetLast(), data})
	if !b.busy {
		b.busy = true
		in.workers.Go(func() { in.write(s, b) })
	}
	return nil
}

// write stores what has come of a stream until nothing is left.
func (in *intake) write(s journal.Stream, b *inbox) {
	for {
		next, ok := in.next(s, b)
		if !ok {
			return
		}
		err := in.store(in.c.ctx, s, b, next)
		in.mu.Lock()
		in.queued -= len(next.frames)
		if err != nil && in.c.ctx.Err() == nil {
			in.refuse(s, b, err)
		}
		in.mu.Unlock()
	}
}

// next is what one sync takes: batches that join without a gap.
func (in *intake) next(s journal.Stream, b *inbox) (batch, bool) {
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

// refuse takes no more of a stream in this session, or ends the session; with
// mu held.
func (in *intake) refuse(s journal.Stream, b *inbox, err error) {
	switch {
	case errors.Is(err, journal.ErrFrozen):
		// The source has a copy of what this node writes; nothing is lacking.
	case errors.Is(err, journal.ErrDiverged), errors.Is(err, journal.ErrTooManyStreams):
		in.c.r.metrics.refused.Inc()
		in.c.r.opts.Logger.Error("a stream can't be stored; it is left alone until the call is made again", "stream", s.String(), "source", in.c.source, "err", err)
	default:
		in.fail(fmt.Errorf("store stream %s: %w", s, err))
		return
	}
	for _, x := range b.batches {
		in.queued -= len(x.frames)
	}
	b.batches, b.refused = nil, true
	in.c.again(s, never) // else what is on its way fills the source's window
}

// store makes one batch durable and acknowledges it.
func (in *intake) store(ctx context.Context, s journal.Stream, b *inbox, x batch) error {
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
				// Something before it was lost on the way, or here: once is asked for it.
				if !b.asked {
					b.asked = true
					r.opts.Logger.Info("records are missing in front of those that came", "stream", s.String(), "source", in.c.source, "held", durable, "came", x.first)
					in.c.again(s, durable)
				}
				return nil
			case errors.Is(err, journal.ErrFull):
				r.opts.Logger.Warn("no room for the copy of a stream; it waits", "stream", s.String(), "err", err)
				if !pause(ctx, fullPause) {
					return ctx.Err()
				}
				continue
			case err != nil:
				return err
			}
			b.asked = false
			r.metrics.received.Add(float64(len(held)))
			r.advanced(map[journal.Stream]uint64{s: durable})
			in.c.stored(s)
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

// openable splits frames before the first record that is sealed with a key this
// node doesn't have: a copy that nobody here can open would be acknowledged in
// vain.
func (r *Replication) openable(frames []byte) (can, rest []byte, err error) {
	var known keyring.KeyID
	for rest = frames; len(rest) > 0; {
		rec, after, err := journal.NextFrame(rest)
		if err != nil {
			return nil, nil, fmt.Errorf("%w: %w", errNotFrames, err)
		}
		if len(rec.Payload) > 0 {
			id, err := keyring.SealedWith(rec.Payload)
			if err != nil {
				return nil, nil, fmt.Errorf("%w: %w", errNotFrames, err)
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
	said := false
	for {
		changed := r.opts.Ring.Changed()
		can, _, err := r.openable(frames)
		if err != nil || len(can) > 0 {
			return err
		}
		if !said {
			said = true
			r.opts.Logger.Error("a stream waits: its next record is sealed with a key that this node can't open", "stream", s.String(), "source", source)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		}
	}
}
