package upstream

import (
	"math"
	"sync"
	"sync/atomic"
	"time"
)

// backend is the live state of one server that can be asked: an instance of an
// upstream of the own site, or a peer. It outlives configurations that don't
// change it.
type backend struct {
	name     string // of the upstream; "peer/SITE" of a peer
	site     string
	address  string // of a discovered instance, empty otherwise
	node     string // a peer's node name, empty for an instance
	hash     uint64 // of name and address
	max      int64  // requests at a time, 0: unbounded
	inFlight atomic.Int64
	counts   *backendMetrics
	retired  bool // gets no more requests; guarded by counts.mu

	mu       sync.Mutex // guards all below
	breaker  breaker
	paused   time.Time // not asked before
	lastErr  string
	lastBad  time.Time
	lastGood time.Time
	// Moving averages for the choice between equals.
	latency  float64 // seconds to the first content
	failures float64 // 0…1, decays with time
	updated  time.Time
	onMove   func(b *backend, to breakerState, why breakerReason)
}

// refusal says why a backend may not be asked now.
type refusal int

const (
	granted refusal = iota
	refusedFull
	refusedPaused
	refusedBroken // its breaker is open, or half-open with its one trial taken
)

// enter takes a place at the backend, and gives it back with leave or withdraw.
// trial: the request is the one that a half-open breaker lets through. lastResort
// passes an open breaker.
func (b *backend) enter(now time.Time, lastResort bool) (trial bool, why refusal) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if now.Before(b.paused) {
		return false, refusedPaused
	}
	if b.max > 0 && b.inFlight.Load() >= b.max {
		return false, refusedFull
	}
	b.breakerState(now)
	trial, ok := b.breaker.enter(now)
	if !ok && !lastResort {
		return false, refusedBroken
	}
	b.inFlight.Add(1)
	b.counts.inFlight.Inc()
	return trial, granted
}

// ready says what enter would, without taking a place.
func (b *backend) ready(now time.Time) refusal {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case now.Before(b.paused):
		return refusedPaused
	case b.max > 0 && b.inFlight.Load() >= b.max:
		return refusedFull
	case b.breakerState(now) == breakerOpen, b.breaker.state == breakerHalfOpen && b.breaker.trial:
		return refusedBroken
	}
	return granted
}

// trialSucceeded closes the breaker when the trial has shown content: others may
// enter at once, long before the stream ends.
func (b *backend) trialSucceeded(now time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.breaker.leave(true)
	b.note(good, now)
}

// leave gives the place back with what came of it. latency is the time to the
// first content, zero when there was none.
func (b *backend) leave(now time.Time, trial bool, o Outcome, latency time.Duration) {
	b.inFlight.Add(-1)
	b.counts.inFlight.Dec()
	b.counts.results[o.Result].Inc()
	b.mu.Lock()
	defer b.mu.Unlock()
	b.breaker.leave(trial)
	if wait, ok := o.pause(b); ok {
		b.paused = now.Add(wait)
	}
	if o.Err != nil && o.Result.blames() {
		b.lastErr, b.lastBad = o.Err.Error(), now
	}
	e := verdicts[o.Result].evidence
	b.average(e, now, latency)
	b.note(e, now)
}

// withdraw gives a place back that was not used.
func (b *backend) withdraw(trial bool) {
	b.inFlight.Add(-1)
	b.counts.inFlight.Dec()
	b.mu.Lock()
	defer b.mu.Unlock()
	b.breaker.leave(trial)
}

// breakerState makes a breaker half-open that has been open for long enough, and
// returns its state; the caller holds the lock.
func (b *backend) breakerState(now time.Time) breakerState {
	before := b.breaker.state
	if b.breaker.current(now) != before {
		b.onMove(b, b.breaker.state, reasonWaited)
	}
	return b.breaker.state
}

// note gives the breaker an outcome; the caller holds the lock.
func (b *backend) note(e evidence, now time.Time) {
	if e == good {
		b.lastGood = now
	}
	before := b.breaker.state
	why := b.breaker.note(e, now)
	if b.breaker.state != before {
		b.onMove(b, b.breaker.state, why)
	}
}

// probeSucceeded makes an open breaker half-open at once: the probe that failed
// answers again.
func (b *backend) probeSucceeded(now time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.breaker.hasten(now) {
		b.onMove(b, b.breaker.state, reasonProbeAnswers)
	}
}

const (
	averageWeight = 0.2
	// failureDecay is the time constant of the failure average. A failed backend
	// must be tried again like the others, or nobody finds out that it is well.
	failureDecay = 10 * time.Second
)

// average updates the moving averages; the caller holds the lock.
func (b *backend) average(e evidence, now time.Time, latency time.Duration) {
	if e == neutral {
		return
	}
	b.failures = b.decayedFailures(now)
	b.updated = now
	if e == bad {
		b.failures += averageWeight * (1 - b.failures)
		return
	}
	b.failures -= averageWeight * b.failures
	if latency > 0 {
		if b.latency == 0 {
			b.latency = latency.Seconds()
		} else {
			b.latency += averageWeight * (latency.Seconds() - b.latency)
		}
	}
}

func (b *backend) decayedFailures(now time.Time) float64 {
	if b.updated.IsZero() {
		return 0
	}
	return b.failures * math.Exp(-now.Sub(b.updated).Seconds()/failureDecay.Seconds())
}

// load is what a choice between equals compares.
func (b *backend) load(now time.Time) load {
	b.mu.Lock()
	latency, failures := b.latency, b.decayedFailures(now)
	b.mu.Unlock()
	success := max(1-failures, 0.01)
	// A server that was never asked has no latency: it counts as fast, and so gets
	// a request that measures it. The failures add seconds, because a server that
	// fails fast would look fast.
	return load{b.hash, (latency + failures) / (success * success), b.inFlight.Load()}
}

// open reports whether the breaker is open now.
func (b *backend) open(now time.Time) bool {
	_, broken := b.away(now)
	return broken > 0
}

// away says how long the backend will not be asked: the rest of a pause, and of an
// open breaker's wait.
func (b *backend) away(now time.Time) (paused, broken time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.breaker.state == breakerOpen {
		broken = max(0, b.breaker.wait-now.Sub(b.breaker.since))
	}
	return max(0, b.paused.Sub(now)), broken
}

// accepts reports whether requests may be sent there now: it is not paused, and
// its breaker not open.
func (b *backend) accepts(now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return !now.Before(b.paused) && b.breakerState(now) != breakerOpen
}

// goodSince reports whether a request succeeded after t.
func (b *backend) goodSince(t time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.lastGood.After(t)
}
