package serving

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/dsnode/dsnode/node/cache"
)

const (
	// maxFlights bounds the answers that are shared at once, and maxFlightBytes the
	// memory of all of them together. Beyond the latter each keeps scarceBytes only.
	maxFlights     = 8192
	maxFlightBytes = 256 << 20
	scarceBytes    = 64 << 10
	// maxStep bounds how much a reader takes at once.
	maxStep = 64 << 10
	// blockBytes is the size of the blocks that pieces are copied into.
	blockBytes = 4 << 10
)

var (
	errFlightLost = errors.New("the shared request was lost")
	// ErrLagging ends the answer of a client that reads it so much more slowly than
	// others who share it that it can't be kept for this one any longer.
	ErrLagging = errors.New("the client reads too slowly")
)

// flights are the answers that are on their way, by what was asked.
type flights struct {
	work sync.WaitGroup // of their fetches

	mu    sync.Mutex // guards count and byKey; taken before a flight's
	count int
	byKey map[cache.Key]*flight

	bytesMu sync.Mutex // guards bytes
	bytes   int
}

// flight is one answer on its way to all who asked for it. A fetch of its own writes
// it, as a sink; each request reads it at its own pace. The request that began the
// flight reads like all others, so it may be slow or leave without harm to them. When
// the last reader has left, ctx ends.
//
// All of the answer is held until it is larger than may be kept, and from then on only
// what some reader has still to take: the fastest reader sets the pace, and one that
// falls behind it by more than the bound is cut off.
type flight struct {
	of    *flights
	key   cache.Key
	purge uint64 // the count of purges when it began
	limit int
	ctx   context.Context
	stop  context.CancelFunc

	mu      sync.Mutex // guards all below
	moved   sync.Cond
	open    bool // others may join
	whole   bool // pieces are all of it so far
	headed  bool
	head    Head
	pieces  [][]byte
	block   []byte // that the next pieces go into
	base    int    // pieces that were dropped
	size    int    // bytes of pieces
	ended   bool
	err     error
	readers map[*reader]struct{}
	waiting bool // the fetch waits for readers
}

// reader is one request that gets the answer.
type reader struct {
	at     int  // next piece, counted from the first of all
	taken  int  // pieces that were taken and may not have been delivered
	joined bool // another request began the flight
	headed bool // it has the head
	cut    bool // it was too slow
}

// join reads along with the flight that brings the answer, or begins one; then leads is
// true, and the caller must fetch its answer. The flight is nil when there are too many.
// Without share the request gets a flight that no other one joins.
func (s *flights) join(ctx context.Context, key cache.Key, purge uint64, share bool, limit int) (f *flight, r *reader, leads bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if f := s.byKey[key]; f != nil && share && f.purge == purge {
		if r := f.join(); r != nil {
			return f, r, false
		}
	}
	if s.count >= maxFlights {
		return nil, nil, false
	}
	s.count++
	f = &flight{of: s, key: key, purge: purge, limit: limit, open: true, whole: true, readers: map[*reader]struct{}{}}
	f.moved.L = &f.mu
	// The request that begins it may end before the others.
	f.ctx, f.stop = context.WithCancel(context.WithoutCancel(ctx))
	r = &reader{}
	f.readers[r] = struct{}{}
	if share {
		if s.byKey == nil {
			s.byKey = map[cache.Key]*flight{}
		}
		s.byKey[key] = f
	}
	return f, r, true
}

// join adds a reader. It is nil when the answer's beginning was dropped or all readers
// have left.
func (f *flight) join() *reader {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.open || len(f.readers) == 0 {
		return nil
	}
	r := &reader{joined: true}
	f.readers[r] = struct{}{}
	return r
}

// remove ends the joining of a flight, before it ends.
func (s *flights) remove(f *flight) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.count--
	if s.byKey[f.key] == f {
		delete(s.byKey, f.key)
	}
}

// hold counts n more bytes, and returns how many a flight may hold.
func (s *flights) hold(n, limit int) int {
	s.bytesMu.Lock()
	defer s.bytesMu.Unlock()
	s.bytes += n
	if s.bytes > maxFlightBytes {
		return min(limit, scarceBytes)
	}
	return limit
}

// Head implements Sink for the fetch.
func (f *flight) Head(h Head) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.ctx.Err(); err != nil {
		return err
	}
	f.head, f.headed = h, true
	f.moved.Broadcast()
	return nil
}

// Data implements Sink.
func (f *flight) Data(b []byte) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.put(b); err != nil {
		return err
	}
	f.moved.Broadcast()
	return nil
}

// Hold implements Batcher.
func (f *flight) Hold(b []byte) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.put(b)
}

// Flush implements Batcher.
func (f *flight) Flush() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.moved.Broadcast()
	return f.ctx.Err()
}

// put makes room for a piece and copies it; f.mu is held.
func (f *flight) put(b []byte) error {
	limit := f.of.hold(len(b), f.limit)
	if f.size+len(b) > limit {
		f.whole, f.open = false, false
	}
	for f.size > limit && f.ctx.Err() == nil {
		if !f.trim() {
			f.waiting = true
			f.moved.Broadcast() // the readers must not wait for Flush
			f.moved.Wait()
			f.waiting = false
		}
	}
	if err := f.ctx.Err(); err != nil {
		f.of.hold(-len(b), f.limit)
		return err
	}
	if cap(f.block)-len(f.block) < len(b) {
		f.block = make([]byte, 0, max(blockBytes, len(b)))
	}
	from := len(f.block)
	f.block = append(f.block, b...)
	f.pieces = append(f.pieces, f.block[from:len(f.block):len(f.block)])
	f.size += len(b)
	return nil
}

// trim drops what all readers have. When that is nothing, and some reader has
// everything, the slowest readers are cut off. It is false when there is nothing to do
// but to wait; f.mu is held.
func (f *flight) trim() bool {
	first, last := f.base+len(f.pieces), f.base
	for r := range f.readers {
		first, last = min(first, r.at), max(last, r.at)
	}
	if first > f.base {
		freed := 0
		for _, p := range f.pieces[:first-f.base] {
			freed += len(p)
		}
		f.pieces = append([][]byte(nil), f.pieces[first-f.base:]...)
		f.base = first
		f.size -= freed
		f.of.hold(-freed, f.limit)
		return true
	}
	if last < f.base+len(f.pieces) {
		return false
	}
	cut := false
	for r := range f.readers {
		if r.at == f.base {
			r.cut, cut = true, true
			delete(f.readers, r)
		}
	}
	f.moved.Broadcast()
	return cut
}

// begun reports that readers may have seen something.
func (f *flight) begun() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.headed
}

// end tells the readers that nothing more comes.
func (f *flight) end(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ended, f.err, f.open = true, err, false
	f.of.hold(-f.size, f.limit)
	f.moved.Broadcast()
	f.stop()
}

// leave removes a reader. The last one ends the flight.
func (f *flight) leave(r *reader) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.readers, r)
	if len(f.readers) == 0 && !f.ended {
		f.open = false
		f.stop()
	}
	if f.waiting {
		f.moved.Broadcast()
	}
}

// step is what a reader gets next.
type step struct {
	head   *Head
	pieces [][]byte
	more   bool // more is there already
	ended  bool
	err    error
}

// next waits for the reader's next step.
func (f *flight) next(ctx context.Context, r *reader) step {
	f.mu.Lock()
	defer f.mu.Unlock()
	if r.taken > 0 {
		r.at += r.taken
		r.taken = 0
		if f.waiting {
			f.moved.Broadcast()
		}
	}
	for {
		switch {
		case ctx.Err() != nil:
			return step{ended: true, err: context.Cause(ctx)}
		case r.cut:
			return step{ended: true, err: fmt.Errorf("%w: others who share the answer are %d bytes ahead", ErrLagging, f.size)}
		case f.headed && !r.headed:
			r.headed = true
			h := f.head
			if r.joined && h.Cache.Status == Miss {
				h.Cache.Status = Coalesced
			}
			return step{head: &h}
		case r.at < f.base+len(f.pieces):
			rest := f.pieces[r.at-f.base:]
			n, size := 1, len(rest[0])
			for n < len(rest) && size+len(rest[n]) <= maxStep {
				size += len(rest[n])
				n++
			}
			r.taken = n
			return step{pieces: rest[:n:n], more: n < len(rest)}
		case f.ended:
			return step{ended: true, err: f.err}
		}
		f.moved.Wait()
	}
}

// follow passes the answer on to one reader's sink as it comes.
func (f *flight) follow(ctx context.Context, r *reader, sink Sink) error {
	defer f.leave(r)
	// A Cond knows no context. The lock makes sure that next, which looks at ctx with
	// the lock held, doesn't miss this call.
	defer context.AfterFunc(ctx, func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.moved.Broadcast()
	})()
	batch, batches := sink.(Batcher)
	stream := false
	for {
		st := f.next(ctx, r)
		if st.ended {
			return st.err
		}
		if st.head != nil {
			stream = st.head.Stream
			if err := sink.Head(*st.head); err != nil {
				return err
			}
			continue
		}
		if err := deliver(st, sink, batch, batches && stream); err != nil {
			return err
		}
	}
}

func deliver(st step, sink Sink, batch Batcher, batches bool) error {
	if !batches {
		for _, p := range st.pieces {
			if err := sink.Data(p); err != nil {
				return err
			}
		}
		return nil
	}
	for _, p := range st.pieces {
		if err := batch.Hold(p); err != nil {
			return err
		}
	}
	if st.more {
		return nil
	}
	return batch.Flush()
}
