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
	// put keeps values, unless a newer one of the key is there; each may be
	// dropped after the time.
	put(ctx context.Context, batch []Entry, keep time.Duration) error
	// drop forgets what stands under the keys.
	drop(ctx context.Context, keys []Key) error
	// sweep drops what is older than the time.
	sweep(ctx context.Context, before time.Time) error
	// ping says whether it would answer, whatever it was asked.
	ping(ctx context.Context) error
	size() (entries, bytes int64, known bool)
	close() error
}

// shared guards a store: a deadline for each command, however it hangs, and two
// breakers, since a full disk and a full Redis give answers still.
type shared struct {
	store  store
	reads  breaker
	writes breaker
	// again allows one write while writes rest: nobody waits for it.
	again atomic.Bool
	slots chan struct{}
}

func newShared(s store, reads, writes func(open bool, why error)) *shared {
	return &shared{store: s, reads: breaker{moved: reads}, writes: breaker{moved: writes}, slots: make(chan struct{}, maxCommands)}
}

type fetched struct {
	value []byte
	err   error
}

// get looks a key up, for at most commandTime.
func (s *shared) get(ctx context.Context, k Key) ([]byte, error) {
	if s.reads.resting() {
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
	s.reads.note(got.err)
	return got.value, got.err
}

// put writes a batch, in the writer's own time.
func (s *shared) put(ctx context.Context, batch []Entry, keep time.Duration) error {
	return s.write(ctx, func(ctx context.Context) error { return s.store.put(ctx, batch, keep) })
}

func (s *shared) drop(ctx context.Context, keys []Key) error {
	return s.write(ctx, func(ctx context.Context) error { return s.store.drop(ctx, keys) })
}

func (s *shared) sweep(ctx context.Context, before time.Time) error {
	return s.write(ctx, func(ctx context.Context) error { return s.store.sweep(ctx, before) })
}

func (s *shared) write(ctx context.Context, f func(context.Context) error) error {
	if s.reads.resting() || s.writes.resting() && !s.again.Swap(false) {
		return errResting
	}
	err := s.guarded(ctx, batchTime, f)
	switch {
	case ctx.Err() != nil, errors.Is(err, errBusy): // says nothing of the tier
	case err == nil && s.writes.resting():
		s.writes.mend()
	default:
		s.writes.note(err)
	}
	return err
}

// begin asks a tier that was just opened, and lets it rest when it does not
// answer. That it is slow the first time, when it has to connect, says nothing.
func (s *shared) begin(ctx context.Context) {
	for range patience {
		if s.ask(ctx); !s.reads.resting() {
			return
		}
	}
}

// try asks a tier that rests whether it is back.
func (s *shared) try(ctx context.Context) {
	if s.writes.resting() {
		s.again.Store(true)
	}
	if s.reads.resting() {
		s.ask(ctx)
	}
}

func (s *shared) ask(ctx context.Context) {
	err := s.guarded(ctx, commandTime, s.store.ping)
	switch {
	case ctx.Err() != nil, errors.Is(err, errBusy):
	case err == nil:
		s.reads.mend()
	default:
		s.reads.trip(err)
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
	select {
	case err := <-done:
		return err
	case <-limited.Done():
		return fmt.Errorf("no answer within %s: %w", within, limited.Err())
	}
}
