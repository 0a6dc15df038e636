package serving

import (
	"math"
	"sync"
	"sync/atomic"
	"time"
)

// maxPause bounds how long a Retry-After can keep a backend out.
const maxPause = 60 * time.Second

const (
	defaultPause    = time.Second      // a 429 without Retry-After
	credentialPause = 10 * time.Second // a refused key is refused again
)

// backend is the live state of one thing that can be asked: an upstream of the
// own site, or a peer. It outlives configurations that don't change it.
type backend struct {
	name     string
	site     string
	address  string // of a discovered instance, empty else
	node     string // a peer's node name, empty for an upstream
	hash     uint64 // of the name
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
	failures float64 // 0…1, fades with time
	updated  time.Time
	onMove   func(b *backend, to breakerState, why breakerReason)
}

// permit is the right to ask a backend once; leave gives it back.
type permit struct {
	b     *backend
	trial bool
}

// refusal says why a backend may not be asked now.
type refusal int

const (
	granted refusal = iota
	refusedFull
	refusedPaused
	refusedBroken // its breaker is open, or its one trial is out
)

// enter asks for a permit. A last resort passes an open breaker.
func (b *backend) enter(now time.Time, lastResort bool) (permit, refusal) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if now.Before(b.paused) {
		return permit{}, refusedPaused
	}
	if b.max > 0 && b.inFlight.Load() >= b.max {
		return permit{}, refusedFull
	}
	b.turn(now)
	trial, ok := b.breaker.enter(now)
	if !ok && !lastResort {
		return permit{}, refusedBroken
	}
	b.inFlight.Add(1)
	b.counts.inFlight.Inc()
	return permit{b, trial}, granted
}

// prosper notes that a trial has shown content: others may enter at once, long
// before the stream ends.
func (p *permit) prosper(now time.Time) {
	if !p.trial {
		return
	}
	p.b.mu.Lock()
	defer p.b.mu.Unlock()
	p.b.breaker.leave(true)
	p.trial = false
	p.b.note(good, now)
}

// leave gives the permit back with what came of it. latency is the time to the
// first content, zero when there was none.
func (p *permit) leave(now time.Time, o outcome, latency time.Duration) {
	b := p.b
	b.inFlight.Add(-1)
	b.counts.inFlight.Dec()
	b.counts.results[o.result].Inc()
	b.mu.Lock()
	defer b.mu.Unlock()
	b.breaker.leave(p.trial)
	e := effects[o.result].breaker
	if until, ok := o.pause(b); ok {
		b.paused = now.Add(until)
	}
	if o.result != resultOK && o.result != resultCancelled && o.result != resultClientError && o.err != nil {
		b.lastErr, b.lastBad = o.err.Error(), now
	}
	b.average(e, now, latency)
	b.note(e, now)
}

// withdraw gives a permit back that was not used.
func (p *permit) withdraw() {
	p.b.inFlight.Add(-1)
	p.b.counts.inFlight.Dec()
	p.b.mu.Lock()
	defer p.b.mu.Unlock()
	p.b.breaker.leave(p.trial)
}

// pause says how long the backend is left alone. Peers never are: what one of
// their models suffers from says nothing of the others.
func (o *outcome) pause(b *backend) (time.Duration, bool) {
	if b.node != "" {
		return 0, false
	}
	switch o.result {
	case resultRateLimited:
		if o.retryAfter <= 0 {
			return defaultPause, true
		}
		return min(o.retryAfter, maxPause), true
	case resultCredentials:
		return credentialPause, true
	}
	return 0, false
}

// turn lets an open breaker that has waited become half-open; the caller holds
// the lock.
func (b *backend) turn(now time.Time) breakerState {
	before := b.breaker.state
	if b.breaker.current(now) != before {
		b.onMove(b, b.breaker.state, reasonWaited)
	}
	return b.breaker.state
}

// note feeds the breaker; the caller holds the lock.
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

const (
	averageWeight = 0.2
	// A failure's memory: after this long a failed backend is tried like the
	// others again, or nobody would find out that it is well.
	failureFade = 10 * time.Second
)

func (b *backend) average(e evidence, now time.Time, latency time.Duration) {
	if e == neutral {
		return
	}
	b.failures = b.fadedFailures(now)
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

func (b *backend) fadedFailures(now time.Time) float64 {
	if b.updated.IsZero() {
		return 0
	}
	return b.failures * math.Exp(-now.Sub(b.updated).Seconds()/failureFade.Seconds())
}

// load is what a choice between equals goes by. Least-busy alone would send
// everything to the server that fails fastest.
func (b *backend) load(now time.Time) load {
	b.mu.Lock()
	latency, failures := b.latency, b.fadedFailures(now)
	b.mu.Unlock()
	success := max(1-failures, 0.01)
	// A server that was never asked has no latency: it counts as quick and is
	// found out. The second keeps a quick failer from looking good.
	return load{b.hash, (latency + failures) / (success * success), b.inFlight.Load()}
}

// open reports whether the breaker is open now.
func (b *backend) open(now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.breaker.state == breakerOpen && now.Sub(b.breaker.since) < b.breaker.wait
}

// away says for how long it makes no sense to ask: the rest of a pause or of
// an open breaker's wait.
func (b *backend) away(now time.Time) (paused, broken time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.breaker.state == breakerOpen {
		broken = max(0, b.breaker.wait-now.Sub(b.breaker.since))
	}
	return max(0, b.paused.Sub(now)), broken
}

// goodSince reports whether real traffic went well after t.
func (b *backend) goodSince(t time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.lastGood.After(t)
}

// ready is enter without taking anything.
func (b *backend) ready(now time.Time) refusal {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case now.Before(b.paused):
		return refusedPaused
	case b.max > 0 && b.inFlight.Load() >= b.max:
		return refusedFull
	case b.turn(now) == breakerOpen, b.breaker.state == breakerHalfOpen && b.breaker.trial:
		return refusedBroken
	}
	return granted
}
