package serving

import (
	"context"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/dsnode/dsnode/cluster"
)

// timers are the four of one attempt. Connect is the transport's own.
//
// A plain answer has no tokens to watch: for it firstToken runs until the body
// begins (white space is no beginning; servers send it once all is generated)
// and betweenTokens runs between pieces of the body.
type timers struct {
	firstToken, betweenTokens, total time.Duration
}

func timersOf(t cluster.Timeouts) timers {
	return timers{t.FirstToken.D(), t.BetweenTokens.D(), t.Total.D()}
}

// timerError is a timer that ran out, by its name.
type timerError struct {
	result result
	name   string
	limit  time.Duration
}

func (e *timerError) Error() string {
	return fmt.Sprintf("%v: %s timer of %s", ErrTimeout, e.name, e.limit)
}
func (e *timerError) Unwrap() error { return ErrTimeout }

var errPeerGone = fmt.Errorf("%w: the peer was lost while it was asked", ErrNoUpstream)

// watch is the context of one attempt and the one timer that ends it. Only
// progress moves the timer on: content, never comments, blank lines or empty
// deltas.
type watch struct {
	context.Context
	cancel  context.CancelCauseFunc
	timer   *time.Timer
	limits  timers
	end     time.Time // when the total timer runs out
	running atomic.Int32
	detach  func() bool // from the peer's life, nil for upstreams
}

// newWatch starts with the first token's timer.
func newWatch(parent context.Context, limits timers, end time.Time, gone context.Context) *watch {
	w := &watch{limits: limits, end: end}
	w.Context, w.cancel = context.WithCancelCause(parent)
	if gone != nil {
		w.detach = context.AfterFunc(gone, func() { w.cancel(errPeerGone) })
	}
	w.timer = time.AfterFunc(w.phase(resultFirstToken, limits.firstToken), w.expire)
	return w
}

// progress starts the timer between tokens again.
func (w *watch) progress() {
	w.timer.Reset(w.phase(resultBetweenTokens, w.limits.betweenTokens))
}

// committed says that the client has seen something: no other backend can take
// over, so a peer that is said to be lost is given its chance.
func (w *watch) committed() {
	if w.detach != nil {
		w.detach()
	}
}

// atMost bounds what is left to do after the answer's end.
func (w *watch) atMost(d time.Duration) { w.timer.Reset(d) }

func (w *watch) phase(r result, limit time.Duration) time.Duration {
	if left := time.Until(w.end); left < limit {
		r, limit = resultTotal, left
	}
	w.running.Store(int32(r)) //nolint:gosec // a handful of results
	return limit
}

func (w *watch) expire() {
	e := &timerError{result: result(w.running.Load())}
	switch e.result {
	case resultFirstToken:
		e.name, e.limit = "first_token", w.limits.firstToken
	case resultBetweenTokens:
		e.name, e.limit = "between_tokens", w.limits.betweenTokens
	default:
		e.name, e.limit = "total", w.limits.total
	}
	w.cancel(e)
}

// stop ends the attempt: whatever still works for it stops.
func (w *watch) stop() {
	w.timer.Stop()
	if w.detach != nil {
		w.detach()
	}
	w.cancel(context.Canceled)
}
