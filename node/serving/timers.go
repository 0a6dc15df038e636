package serving

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dsnode/dsnode/cluster/config"
)

// timers are the four of one attempt, and the least pace of its stream. Connect
// is the transport's own.
//
// A plain answer has no tokens to watch. A server sends it once all is
// generated, so a long silence before it is no sign of a fault: when firstToken
// has passed, the attempt goes on for as long as the server answers its probes
// (a peer: for as long as it lives), until total. A machine that is gone shows
// in TCP's own timers before that. White space is no beginning; once the body
// has begun, betweenTokens runs between its pieces. Plain answers that are not
// generated (embeddings, tokens) have no excuse to be late: there firstToken is
// the last word.
type timers struct {
	firstToken, betweenTokens, total time.Duration
	pace                             int // tokens a second, 0: any
}

func timersOf(t config.Timeouts) timers {
	return timers{t.FirstToken.D(), t.BetweenTokens.D(), t.Total.D(), t.MinTokensPerSecond}
}

const (
	// paceWindow is what the pace is measured over, at the least.
	paceWindow = 10 * time.Second
	// lookAgain is how often a late plain answer's server is judged anew.
	lookAgain = time.Second
)

// timerError is a timer that ran out, by its name.
type timerError struct {
	result result
	name   string
	limit  time.Duration
	pace   int // of resultTooSlow
}

func (e *timerError) Error() string {
	if e.result == resultTooSlow {
		return fmt.Sprintf("%v: fewer than min_tokens_per_second (%d) for %s", ErrTimeout, e.pace, paceWindow)
	}
	return fmt.Sprintf("%v: %s timer of %s", ErrTimeout, e.name, e.limit)
}
func (e *timerError) Unwrap() error { return ErrTimeout }

var errPeerGone = fmt.Errorf("%w: the peer was lost while it was asked", ErrNoUpstream)

// watch is the context of one attempt and the one timer that ends it. Only
// progress moves the timer on: content, never comments, blank lines or empty
// deltas.
type watch struct {
	context.Context
	cancel context.CancelCauseFunc
	limits timers
	end    time.Time   // when the total timer runs out
	detach func() bool // from the peer's life, nil for upstreams
	// alive says whether a late answer is worth waiting for; nil: never.
	alive func() bool
	pace  pace
	// writing: the client is being written to. How long that takes says nothing
	// of the upstream; the client's own deadline ends it. missed: a timer ran
	// out meanwhile, and the upstream gets its time anew.
	writing, missed atomic.Bool

	mu      sync.Mutex // guards all below
	timer   *time.Timer
	running result // whose timer runs
	due     time.Time
}

// newWatch starts with the first token's timer.
func newWatch(parent context.Context, limits timers, end time.Time, gone context.Context, alive func() bool) *watch {
	w := &watch{limits: limits, end: end, alive: alive, pace: pace{floor: float64(limits.pace)}}
	w.Context, w.cancel = context.WithCancelCause(parent)
	if gone != nil {
		w.detach = context.AfterFunc(gone, func() { w.cancel(errPeerGone) })
	}
	w.arm(resultFirstToken, time.Now().Add(limits.firstToken))
	return w
}

// progress starts the timer between tokens again.
func (w *watch) progress() { w.arm(resultBetweenTokens, time.Now().Add(w.limits.betweenTokens)) }

// content is progress of a stream by so many tokens.
func (w *watch) content(tokens int) {
	if w.pace.floor <= 0 {
		w.progress()
		return
	}
	now := time.Now()
	w.pace.add(now, tokens)
	w.await(now)
}

// await waits for more content, no longer than the pace allows.
func (w *watch) await(now time.Time) {
	r, due := resultBetweenTokens, now.Add(w.limits.betweenTokens)
	if slow, ok := w.pace.until(); ok && slow.Before(due) {
		r, due = resultTooSlow, slow
	}
	w.arm(r, due)
}

// beginWrite says that the client is being written to, endWrite that it was.
func (w *watch) beginWrite() (from time.Time) {
	if w.pace.floor > 0 {
		from = time.Now()
	}
	w.writing.Store(true)
	return from
}

func (w *watch) endWrite(from time.Time) {
	w.writing.Store(false)
	if w.pace.floor > 0 {
		w.pace.pause(time.Since(from))
	}
	if w.missed.Load() {
		w.await(time.Now())
		w.missed.Store(false) // not before: a timer that runs out just now looks at it
	}
}

// committed says that the client has seen something: no other backend can take
// over, so a peer that is said to be lost is given its chance.
func (w *watch) committed() {
	if w.detach != nil {
		w.detach()
	}
}

// atMost bounds what is left to do after the answer's end.
func (w *watch) atMost(d time.Duration) { w.arm(resultBetweenTokens, time.Now().Add(d)) }

func (w *watch) arm(r result, due time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.set(r, due)
}

// set is arm for who holds the lock.
func (w *watch) set(r result, due time.Time) {
	if w.end.Before(due) {
		r, due = resultTotal, w.end
	}
	w.running, w.due = r, due
	left := time.Until(due)
	if w.timer == nil {
		w.timer = time.AfterFunc(left, w.expire)
		return
	}
	w.timer.Reset(left)
}

func (w *watch) expire() {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := time.Now()
	if now.Before(w.due) {
		return // it was moved on just now
	}
	e := &timerError{result: w.running}
	switch w.running {
	case resultFirstToken:
		if w.alive != nil && w.alive() {
			w.set(resultFirstToken, now.Add(lookAgain))
			return
		}
		e.name, e.limit = "first_token", w.limits.firstToken
	case resultBetweenTokens, resultTooSlow:
		switch {
		case w.writing.Load():
			w.missed.Store(true)
			w.set(w.running, now.Add(lookAgain))
			return
		case w.missed.Swap(false):
			w.set(resultBetweenTokens, now.Add(w.limits.betweenTokens))
			return
		}
		e.name, e.limit, e.pace = "between_tokens", w.limits.betweenTokens, w.limits.pace
	default:
		e.name, e.limit = "total", w.limits.total
	}
	w.cancel(e)
}

// stop ends the attempt: whatever still works for it stops.
func (w *watch) stop() {
	w.mu.Lock()
	w.timer.Stop()
	w.mu.Unlock()
	if w.detach != nil {
		w.detach()
	}
	w.cancel(context.Canceled)
}

// pace measures how fast a stream's tokens come, over a window that is never
// shorter than paceWindow. It belongs to who reads the stream.
type pace struct {
	floor       float64 // tokens a second
	count       int
	from, later mark // the window's beginning, and the next one's
}

type mark struct {
	at    time.Time
	count int
}

func (p *pace) add(now time.Time, tokens int) {
	if p.from.at.IsZero() {
		p.from = mark{now, 0}
		p.later = p.from
	}
	if now.Sub(p.later.at) >= paceWindow {
		p.from, p.later = p.later, mark{now, p.count}
	}
	p.count += tokens
}

// pause takes time out that the stream is not to blame for.
func (p *pace) pause(d time.Duration) {
	if !p.from.at.IsZero() {
		p.from.at, p.later.at = p.from.at.Add(d), p.later.at.Add(d)
	}
}

// until is when the window's pace falls below the floor if nothing more comes.
func (p *pace) until() (time.Time, bool) {
	if p.floor <= 0 || p.from.at.IsZero() {
		return time.Time{}, false
	}
	enough := time.Duration(float64(p.count-p.from.count) / p.floor * float64(time.Second))
	return p.from.at.Add(max(enough, paceWindow)), true
}
