package cache

import (
	"context"
	"errors"
	"fmt"
	"time"
)

const (
	// commandTime bounds every command of a shared tier.
	commandTime = 50 * time.Millisecond
	// batchTime bounds one of many writes, which nobody waits for.
	batchTime = time.Second
	// maxCommands bounds the lookups that wait at once: a disk or a server that
	// hangs holds no more goroutines than this.
	maxCommands = 128
	// tryEvery is how often a tier that rests is tried.
	tryEvery = 500 * time.Millisecond
)

// Why a shared tier was not asked, or gave nothing.
var (
	errResting = errors.New("the shared tier rests after failures")
	errBusy    = errors.New("too many lookups wait for the shared tier")
	errSlow    = fmt.Errorf("no answer within %s", commandTime)
)

// store is a kind of shared tier. Its methods may hang; nobody trusts them.
type store interface {
	// get gives a value that is the caller's, nil when there is none.
	get(ctx context.Context, k Key) ([]byte, error)
	// put keeps values; each may be dropped after the time.
	put(ctx context.Context, batch []Entry, keep time.Duration) error
	// sweep drops what is older than the time.
	sweep(ctx context.Context, before time.Time) error
	// ping says whether it would answer.
	ping(ctx context.Context) error
	size() (entries, bytes int64, known bool)
	close() error
}

// shared guards a store: a deadline for each command, however it hangs, and a
// breaker.
type shared struct {
	store   store
	breaker breaker
	slots   chan struct{}
}

func newShared(s store, moved func(open bool, why error)) *shared {
	return &shared{store: s, breaker: breaker{moved: moved}, slots: make(chan struct{}, maxCommands)}
}

type fetched struct {
	value []byte
	err   error
}

// get looks a key up, for at most commandTime.
func (s *shared) get(ctx context.Context, k Key) ([]byte, error) {
	if s.breaker.resting() {
		return nil, errResting
	}
	select {
	case s.slots <- struct{}{}:
	default:
		return nil, errBusy
	}
	limited, cancel := context.WithTimeout(ctx, commandTime)
	defer cancel()
	done := make(chan fetched, 1)
	// A page fault on a disk that hangs heeds no context.
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
		return nil, ctx.Err() // who asked has gone, which says nothing of the tier
	}
	s.breaker.note(got.err)
	return got.value, got.err
}

// put writes a batch, in the writer's own time.
func (s *shared) put(ctx context.Context, batch []Entry, keep time.Duration) error {
	if s.breaker.resting() {
		return errResting
	}
	return s.guarded(ctx, batchTime, func(ctx context.Context) error { return s.store.put(ctx, batch, keep) })
}

func (s *shared) sweep(ctx context.Context, before time.Time) error {
	if s.breaker.resting() {
		return errResting
	}
	return s.guarded(ctx, batchTime, func(ctx context.Context) error { return s.store.sweep(ctx, before) })
}

// try asks a tier that rests whether it is back.
func (s *shared) try(ctx context.Context) {
	if s.breaker.resting() {
		_ = s.guarded(ctx, commandTime, s.store.ping) // noted by the breaker
	}
}

func (s *shared) guarded(ctx context.Context, within time.Duration, f func(context.Context) error) error {
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
	var err error
	select {
	case err = <-done:
	case <-limited.Done():
		err = fmt.Errorf("%w: %w", errSlow, limited.Err())
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	s.breaker.note(err)
	return err
}
