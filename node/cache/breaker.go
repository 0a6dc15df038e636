package cache

import (
	"context"
	"errors"
	"sync/atomic"
)

// patience is how many failures in a row a shared tier is forgiven. One good
// command makes up for a third of a failure: of a cluster, one server in three
// that hangs is too much in the end, one failure now and then is not.
const patience = 3

// breaker leaves a shared tier alone that fails. No request ever tries whether it
// is back, which would cost that request the whole deadline: Cache.Run does, and
// only mend closes the breaker.
type breaker struct {
	score atomic.Int32
	why   atomic.Pointer[string] // it is open; nil: it is not
	moved func(open bool, why error)
}

// resting reports that the tier is left alone.
func (b *breaker) resting() bool { return b.why.Load() != nil }

// reason is why the tier is left alone, "" when it is not.
func (b *breaker) reason() string {
	if why := b.why.Load(); why != nil {
		return *why
	}
	return ""
}

// note takes the end of a command.
func (b *breaker) note(err error) {
	if err != nil {
		if b.score.Add(patience) >= patience*patience {
			b.trip(err)
		}
		return
	}
	for {
		n := b.score.Load()
		if n == 0 || b.score.CompareAndSwap(n, n-1) {
			return
		}
	}
}

// trip opens the breaker, or tells an open one why it still is. That nothing
// answered in time takes the place of no other reason.
func (b *breaker) trip(err error) {
	why := err.Error()
	if b.why.CompareAndSwap(nil, &why) {
		b.moved(true, err)
	} else if was := b.why.Load(); was != nil && !errors.Is(err, context.DeadlineExceeded) {
		b.why.CompareAndSwap(was, &why)
	}
}

// mend closes it: somebody made sure that the tier answers.
func (b *breaker) mend() {
	b.score.Store(0)
	if b.why.Swap(nil) != nil {
		b.moved(false, nil)
	}
}
