package cache

import (
	"context"
	"errors"
	"sync/atomic"
)

// failureLimit is how many failures in a row open a breaker. A success makes up for a
// third of a failure: the breaker opens when one server of a cluster of three
// hangs, but not when a command fails now and then.
const failureLimit = 3

// breaker stops the use of a shared tier that fails. While it is open no request tries
// the tier, since that would cost the request the whole deadline. Cache.Run tries it
// and calls reset; nothing else closes the breaker.
type breaker struct {
	score   atomic.Int32
	why     atomic.Pointer[string]     // of the failure; nil: the breaker is closed
	changed func(open bool, why error) // is called when it opens or closes
}

func (b *breaker) isOpen() bool { return b.why.Load() != nil }

// reason is why the breaker is open, "" when it is closed.
func (b *breaker) reason() string {
	if why := b.why.Load(); why != nil {
		return *why
	}
	return ""
}

// note counts the result of a command.
func (b *breaker) note(err error) {
	if err != nil {
		if b.score.Add(failureLimit) >= failureLimit*failureLimit {
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

// trip opens the breaker. If it is open, trip replaces the reason, except by a timeout,
// which tells an operator the least.
func (b *breaker) trip(err error) {
	why := err.Error()
	if b.why.CompareAndSwap(nil, &why) {
		b.changed(true, err)
	} else if was := b.why.Load(); was != nil && !errors.Is(err, context.DeadlineExceeded) {
		b.why.CompareAndSwap(was, &why)
	}
}

// reset closes the breaker. The caller has seen the tier answer.
func (b *breaker) reset() {
	b.score.Store(0)
	if b.why.Swap(nil) != nil {
		b.changed(false, nil)
	}
}
