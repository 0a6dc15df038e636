package cache

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"
)

const (
	// commandTime bounds every command of a shared tier.
	commandTime = 50 * time.Millisecond
	// batchTime bounds a batch of writes, which no request waits for.
	batchTime = time.Second
	// maxCommands bounds the commands that run at once, and so the goroutines that
	// a disk or a server that hangs can hold.
	maxCommands = 128
	// tryEvery is how often a tier is tried whose breaker is open.
	tryEvery = 500 * time.Millisecond
)

// Why a shared tier was not asked, or gave no result.
var (
	errOpen = errors.New("the shared tier is not used after failures")
	errBusy = errors.New("too many commands wait for the shared tier")
	errSlow = fmt.Errorf("no answer within %s", commandTime)
)

// store is a kind of shared tier. Its methods may hang, and what get returns may be
// anything.
type store interface {
	// get gives the value of a key, nil when there is none. The caller owns it.
	get(ctx context.Context, k Key) ([]byte, error)
	// put writes entries, except where a newer one of the key is there. The store may
	// drop each of them once it is older than keep.
	put(ctx context.Context, batch []Entry, keep time.Duration) error
	drop(ctx context.Context, keys []Key) error
	// sweep drops entries that are older than before.
	sweep(ctx context.Context, before time.Time) error
	// ping reports whether get would work now.
	ping(ctx context.Context) error
	size() (entries, bytes int64, known bool)
	close() error
}

// shared wraps a store. Each command has a deadline, also when the store ignores its
// context. Reads and writes have a breaker each, since a full disk or a full Redis can
// still be read.
type shared struct {
	store  store
	reads  breaker
	writes breaker
	// tryWrite lets one write through while the breaker of writes is open. No request
	// waits for a write, so a write itself may find out whether writing works again.
	tryWrite atomic.Bool
	slots    chan struct{}
}

func newShared(s store, reads, writes func(open bool, why error)) *shared {
	return &shared{store: s, reads: breaker{changed: reads}, writes: breaker{changed: writes}, slots: make(chan struct{}, maxCommands)}
}

type fetched struct {
	value []byte
	err   error
}

// get looks a key up, for at most commandTime.
func (s *shared) get(ctx context.Context, k Key) ([]byte, error) {
	if s.reads.isOpen() {
		return nil, errOpen
	}
	select {
	case s.slots <- struct{}{}:
	default:
		return nil, errBusy
	}
	limited, cancel := context.WithTimeout(ctx, commandTime)
	defer cancel()
	done := make(chan fetched, 1)
	// In a goroutine, because a read from a disk that hangs ignores the context.
	go func() {
		defer func() { <-s.slots }()
		value, err := s.store.get(limited, k)
		done <- fetched{value, err}
	}()
	var got fetched
	select {
	case got = <-done:
	case <-limited.Done():
		got.err = errSlow
	}
	if ctx.Err() != nil {
		return nil, ctx.Err() // the client went away: not a failure of the tier
	}
	s.reads.note(got.err)
	return got.value, got.err
}

func (s *shared) put(ctx context.Context, batch []Entry, keep time.Duration) error {
	return s.write(ctx, func(ctx context.Context) error { return s.store.put(ctx, batch, keep) })
}

func (s *shared) drop(ctx context.Context, keys []Key) error {
	return s.write(ctx, func(ctx context.Context) error { return s.store.drop(ctx, keys) })
}

func (s *shared) sweep(ctx context.Context, before time.Time) error {
	return s.write(ctx, func(ctx context.Context) error { return s.store.sweep(ctx, before) })
}

// write runs a command that changes the store, for at most batchTime.
func (s *shared) write(ctx context.Context, f func(context.Context) error) error {
	if s.reads.isOpen() || s.writes.isOpen() && !s.tryWrite.Swap(false) {
		return errOpen
	}
	err := s.run(ctx, batchTime, f)
	switch {
	case ctx.Err() != nil, errors.Is(err, errBusy): // not a failure of the tier
	case err == nil && s.writes.isOpen():
		s.writes.reset()
	default:
		s.writes.note(err)
	}
	return err
}

// begin tries a tier that was just opened, and opens the breaker when it does not
// answer. It tries more than once: a store that has to connect first may be slow.
func (s *shared) begin(ctx context.Context) {
	for range failureLimit {
		if s.tryRead(ctx); !s.reads.isOpen() {
			return
		}
	}
}

// try finds out whether a tier whose breakers are open works again.
func (s *shared) try(ctx context.Context) {
	if s.writes.isOpen() {
		s.tryWrite.Store(true)
	}
	if s.reads.isOpen() {
		s.tryRead(ctx)
	}
}

func (s *shared) tryRead(ctx context.Context) {
	err := s.run(ctx, commandTime, s.store.ping)
	switch {
	case ctx.Err() != nil, errors.Is(err, errBusy):
	case err == nil:
		s.reads.reset()
	default:
		s.reads.trip(err)
	}
}

// run runs a command, in a goroutine since it may ignore its context.
func (s *shared) run(ctx context.Context, within time.Duration, f func(context.Context) error) error {
	select {
	case s.slots <- struct{}{}:
	default:
		return errBusy
	}
	limited, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	done := make(chan error, 1)
	go func() {
		defer func() { <-s.slots }()
		done <- f(limited)
	}()
	select {
	case err := <-done:
		return err
	case <-limited.Done():
		return fmt.Errorf("no answer within %s: %w", within, limited.Err())
	}
}
