package serving

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dsnode/dsnode/cluster/cause"
	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/node/upstream"
)

const (
	// paceWindow is what the pace is measured over, at the least.
	paceWindow = 10 * time.Second
	// lookAgain is the time between two decisions whether to wait on.
	lookAgain = time.Second
)

// timerError says which timer ended an attempt.
type timerError struct {
	result upstream.Result
	text   string
}

func (e *timerError) Error() string { return e.text }

const errPeerGone = cause.Words("the peer was lost while it was asked")

// watch is the context of one attempt, and runs the timers that end it: first token,
// between tokens, total, and the least pace of a stream. (Connect is the transport's.)
// Only progress moves a timer on: content, never comments, blank lines or empty deltas.
//
// A plain answer has no tokens to watch. A server sends it once all is generated, so
// a long silence before it is no sign of a fault: when the first token's timer has run
// out, the attempt goes on while the server answers its probes (a peer: while it
// lives), until total. A machine that is gone shows in TCP's own timers before that.
// White space is not the beginning of an answer; once the body has begun, the timer
// between tokens runs between its pieces. Plain answers that are not generated
// (embeddings, tokens) have no reason to be late: the first token's timer ends them.
type watch struct {
	context.Context
	cancel context.CancelCauseFunc
	limits config.Timeouts
	end    time.Time   // when the total timer runs out
	detach func() bool // from the peer's loss, nil for the own site's servers
	// alive says whether a late answer is worth waiting for; nil: it is not.
	alive func() bool
	pace  pace
	// writing: a write to the client is under way. Its time doesn't count against the
	// upstream; the client's own deadline ends it. missed: a timer ran out meanwhile,
	// and the upstream gets its time anew.
	writing, missed atomic.Bool

	mu      sync.Mutex // guards all below
	timer   *time.Timer
	running upstream.Result // whose timer runs
	due     time.Time
}

// newWatch starts with the first token's timer. lost ends when a peer is lost, and is
// nil for the own site's servers.
func newWatch(parent context.Context, limits config.Timeouts, end time.Time, lost context.Context, alive func() bool) *watch {
	w := &watch{limits: limits, end: end, alive: alive, pace: pace{floor: float64(limits.MinTokensPerSecond)}}
	w.Context, w.cancel = context.WithCancelCause(parent)
	if lost != nil {
		w.detach = context.AfterFunc(lost, func() { w.cancel(errPeerGone) })
	}
	w.arm(upstream.FirstTokenTimeout, time.Now().Add(limits.FirstToken.D()))
	return w
}

// progress restarts the timer between tokens.
func (w *watch) progress() {
	w.arm(upstream.BetweenTokensTimeout, time.Now().Add(w.limits.BetweenTokens.D()))
}

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
	r, due := upstream.BetweenTokensTimeout, now.Add(w.limits.BetweenTokens.D())
	if slow, ok := w.pace.until(); ok && slow.Before(due) {
		r, due = upstream.TooSlow, slow
	}
	w.arm(r, due)
}

// beginWrite and endWrite enclose a write to the client.
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

// committed says that the client has seen something. No other server can take over
// then, so a peer that is said to be lost is waited for.
func (w *watch) committed() {
	if w.detach != nil {
		w.detach()
	}
}

// atMost bounds what is left to do after the end of the answer.
func (w *watch) atMost(d time.Duration) { w.arm(upstream.BetweenTokensTimeout, time.Now().Add(d)) }

func (w *watch) arm(r upstream.Result, due time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.set(r, due)
}

// set is arm with the lock held.
func (w *watch) set(r upstream.Result, due time.Time) {
	if w.end.Before(due) {
		r, due = upstream.TotalTimeout, w.end
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
	case upstream.FirstTokenTimeout:
		if w.alive != nil && w.alive() {
			w.set(upstream.FirstTokenTimeout, now.Add(lookAgain))
			return
		}
		e.text = fmt.Sprintf("no first token within first_token (%s)", w.limits.FirstToken.D())
	case upstream.BetweenTokensTimeout, upstream.TooSlow:
		switch {
		case w.writing.Load():
			w.missed.Store(true)
			w.set(w.running, now.Add(lookAgain))
			return
		case w.missed.Swap(false):
			w.set(upstream.BetweenTokensTimeout, now.Add(w.limits.BetweenTokens.D()))
			return
		case w.running == upstream.TooSlow:
			e.text = fmt.Sprintf("fewer than min_tokens_per_second (%d) for %s", w.limits.MinTokensPerSecond, paceWindow)
		default:
			e.text = fmt.Sprintf("no token for between_tokens (%s)", w.limits.BetweenTokens.D())
		}
	default:
		e.text = fmt.Sprintf("not complete within total (%s)", w.limits.Total.D())
	}
	w.cancel(e)
}

// stop ends the attempt, and whatever still runs for it.
func (w *watch) stop() {
	w.mu.Lock()
	w.timer.Stop()
	w.mu.Unlock()
	if w.detach != nil {
		w.detach()
	}
	w.cancel(context.Canceled)
}

// pace measures how fast a stream's tokens come, over a window that is never shorter
// than paceWindow. One goroutine uses it, the one that reads the stream.
type pace struct {
	floor       float64 // tokens a second
	count       int
	from, later mark // the beginnings of this window and of the next
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

// pause takes out time that doesn't count against the stream.
func (p *pace) pause(d time.Duration) {
	if !p.from.at.IsZero() {
		p.from.at, p.later.at = p.from.at.Add(d), p.later.at.Add(d)
	}
}

// until is when the pace falls below the floor if no more tokens come.
func (p *pace) until() (time.Time, bool) {
	if p.floor <= 0 || p.from.at.IsZero() {
		return time.Time{}, false
	}
	enough := time.Duration(float64(p.count-p.from.count) / p.floor * float64(time.Second))
	return p.from.at.Add(max(enough, paceWindow)), true
}
