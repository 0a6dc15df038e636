package serving

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/dsnode/dsnode/node/cache"
)

const (
	// maxFlights bounds the answers that are shared at once, and maxAloft the
	// bytes that all of them hold. Beyond the latter each keeps a little only.
	maxFlights  = 8192
	maxAloft    = 256 << 20
	scarceBytes = 64 << 10
	// bite is how much a reader takes at once.
	bite = 64 << 10
	// blockBytes is what pieces are copied into.
	blockBytes = 4 << 10
)

var (
	errFlightLost = errors.New("the shared request was lost")
	// ErrLagging ends the answer of a client that takes it so much more slowly
	// than others who share it that it can't be held for it any longer.
	ErrLagging = errors.New("the client reads too slowly")
)

// flights are the answers that are on their way, by what was asked.
type flights struct {
	work sync.WaitGroup // of those who lead

	mu    sync.Mutex // guards aloft and byKey; taken before a flight's
	aloft int
	byKey map[cache.Key]*flight

	bytesMu sync.Mutex // guards bytes
	bytes   int
}

// flight is one answer on its way to all who asked for it. Who leads writes it,
// as a sink; who follows reads at their own pace. The one that leads has no
// client of its own: the request that began the flight follows like all others,
// so it may be slow or leave without harm to them. When the last has left, ctx
// ends.
//
// All of the answer is held until it is larger than may be kept. From then on
// only what some reader has still to take: the fastest one sets the pace, and
// who falls behind it by more than the bound is cut off.
type flight struct {
	of    *flights
	key   cache.Key
	purge uint64 // purges that were agreed on when it began
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
	base    int    // pieces that are gone
	size    int    // bytes of pieces
	ended   bool
	err     error
	seats   map[*seat]struct{}
	waiting bool // who leads waits for readers
}

// seat is one reader.
type seat struct {
	at     int // next piece, counted from the first of all
	taken  int // pieces that were taken and may not have been delivered
	joined bool
	headed bool
	cut    bool
}

// board finds the flight that brings the answer, or begins one, which the caller
// must lead. The flight is nil when there is no room for more. With share false
// nobody else's flight is good enough.
func (s *flights) board(ctx context.Context, key cache.Key, purge uint64, share bool, limit int) (f *flight, at *seat, leads bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if f := s.byKey[key]; f != nil && share && f.purge == purge {
		if at := f.join(); at != nil {
			return f, at, false
		}
	}
	if s.aloft >= maxFlights {
		return nil, nil, false
	}
	s.aloft++
	f = &flight{of: s, key: key, purge: purge, limit: limit, open: true, whole: true, seats: map[*seat]struct{}{}}
	f.moved.L = &f.mu
	// Who asks first may leave first.
	f.ctx, f.stop = context.WithCancel(context.WithoutCancel(ctx))
	at = &seat{}
	f.seats[at] = struct{}{}
	if share {
		if s.byKey == nil {
			s.byKey = map[cache.Key]*flight{}
		}
		s.byKey[key] = f
	}
	return f, at, true
}

// join takes a seat, nil when the beginning is gone or everybody has left.
func (f *flight) join() *seat {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.open || len(f.seats) == 0 {
		return nil
	}
	at := &seat{joined: true}
	f.seats[at] = struct{}{}
	return at
}

// leave lets nobody else join, before the flight ends.
func (s *flights) leave(f *flight) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.aloft--
	if s.byKey[f.key] == f {
		delete(s.byKey, f.key)
	}
}

// hold counts bytes and tells what a flight may hold.
func (s *flights) hold(n, limit int) int {
	s.bytesMu.Lock()
	defer s.bytesMu.Unlock()
	s.bytes += n
	if s.bytes > maxAloft {
		return min(limit, scarceBytes)
	}
	return limit
}

// Head implements Sink for who leads.
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

// put copies a piece, after room was made for it.
func (f *flight) put(b []byte) error {
	limit := f.of.hold(len(b), f.limit)
	if f.size+len(b) > limit {
		f.whole, f.open = false, false
	}
	for f.size > limit && f.ctx.Err() == nil {
		if !f.trim() {
			f.waiting = true
			f.moved.Broadcast() // they must not wait for Flush
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

// trim lets go of what all readers have. When that is nothing, and some reader
// has everything, those who hold the rest up are cut off. It is false when
// there is nothing to do but to wait.
func (f *flight) trim() bool {
	first, last := f.base+len(f.pieces), f.base
	for s := range f.seats {
		first, last = min(first, s.at), max(last, s.at)
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
	for s := range f.seats {
		if s.at == f.base {
			s.cut, cut = true, true
			delete(f.seats, s)
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

// vacate: a reader leaves, and takes the flight with it when it was the last.
func (f *flight) vacate(s *seat) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.seats, s)
	if len(f.seats) == 0 && !f.ended {
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
	more   bool // there is more at hand
	ended  bool
	err    error
}

// next waits for the reader's next step.
func (f *flight) next(ctx context.Context, s *seat) step {
	f.mu.Lock()
	defer f.mu.Unlock()
	if s.taken > 0 {
		s.at += s.taken
		s.taken = 0
		if f.waiting {
			f.moved.Broadcast()
		}
	}
	for {
		switch {
		case ctx.Err() != nil:
			return step{ended: true, err: context.Cause(ctx)}
		case s.cut:
			return step{ended: true, err: fmt.Errorf("%w: others who share its answer are %d bytes ahead", ErrLagging, f.size)}
		case f.headed && !s.headed:
			s.headed = true
			h := f.head
			if s.joined && h.Cache.Status == Miss {
				h.Cache.Status = Coalesced
			}
			return step{head: &h}
		case s.at < f.base+len(f.pieces):
			rest := f.pieces[s.at-f.base:]
			n, size := 1, len(rest[0])
			for n < len(rest) && size+len(rest[n]) <= bite {
				size += len(rest[n])
				n++
			}
			s.taken = n
			return step{pieces: rest[:n:n], more: n < len(rest)}
		case f.ended:
			return step{ended: true, err: f.err}
		}
		f.moved.Wait()
	}
}

// follow gives the answer to one reader as it comes.
func (f *flight) follow(ctx context.Context, s *seat, sink Sink) error {
	defer f.vacate(s)
	// A Cond knows no context. The lock orders this with the reader's look at ctx.
	defer context.AfterFunc(ctx, func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.moved.Broadcast()
	})()
	batch, batches := sink.(Batcher)
	stream := false
	for {
		st := f.next(ctx, s)
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
