package upstream

import "time"

// breakerState is the state of a backend's breaker.
type breakerState int

const (
	breakerClosed   breakerState = iota
	breakerOpen                  // asked as a last resort only
	breakerHalfOpen              // one request at a time is let through
	breakerStates
)

func (s breakerState) String() string {
	return [breakerStates]string{"closed", "open", "half-open"}[s]
}

const (
	breakerWindow  = 30 * time.Second
	breakerBuckets = 6
	breakerVolume  = 20 // outcomes in the window before the share of failures counts
	breakerInRow   = 5  // failures in a row that open it: long calls rarely fill the window
	breakerWait    = 2 * time.Second
	breakerMaxWait = 30 * time.Second
)

// record is the input of a breaker's decision.
type record struct {
	total, failed int // in the window
	inRow         int
}

type breakerReason string

const (
	reasonNone           breakerReason = ""
	reasonInRow          breakerReason = "failures in a row"
	reasonShare          breakerReason = "half of the window failed"
	reasonTrialFailed    breakerReason = "the trial failed"
	reasonTrialSucceeded breakerReason = "the trial succeeded"
	reasonWaited         breakerReason = "waited long enough"
	reasonProbeAnswers   breakerReason = "the probe answers again"
)

// decideBreaker is the whole rule: the state after an outcome.
func decideBreaker(s breakerState, e evidence, r record) (breakerState, breakerReason) {
	switch {
	case e == neutral:
		return s, reasonNone
	case s == breakerHalfOpen && e == good:
		return breakerClosed, reasonTrialSucceeded
	case s == breakerHalfOpen:
		return breakerOpen, reasonTrialFailed
	case s == breakerOpen && e == good:
		// A request that was under way, or a last resort, succeeded.
		return breakerClosed, reasonTrialSucceeded
	case s == breakerClosed && r.inRow >= breakerInRow:
		return breakerOpen, reasonInRow
	case s == breakerClosed && r.total >= breakerVolume && 2*r.failed >= r.total:
		return breakerOpen, reasonShare
	}
	return s, reasonNone
}

// breaker keeps one backend's record. The backend's lock guards it; time is passed
// in.
type breaker struct {
	state   breakerState
	since   time.Time
	wait    time.Duration // of the current open state
	trial   bool          // the one trial of half-open is taken
	inRow   int
	buckets [breakerBuckets]struct {
		slot          int64
		total, failed int
	}
}

// current makes an open breaker half-open that has waited, and returns the state.
func (b *breaker) current(now time.Time) breakerState {
	if b.state == breakerOpen && now.Sub(b.since) >= b.wait {
		b.move(breakerHalfOpen, now)
	}
	return b.state
}

// enter asks for permission. A trial must be given back with leave, whatever
// happens.
func (b *breaker) enter(now time.Time) (trial, ok bool) {
	switch b.current(now) {
	case breakerClosed:
		return false, true
	case breakerHalfOpen:
		if b.trial {
			return false, false
		}
		b.trial = true
		return true, true
	}
	return false, false
}

// leave gives a trial back.
func (b *breaker) leave(trial bool) {
	if trial {
		b.trial = false
	}
}

// note counts an outcome and says why the state changed, if it did.
func (b *breaker) note(e evidence, now time.Time) breakerReason {
	if e == neutral {
		return reasonNone
	}
	slot := now.UnixNano() / int64(breakerWindow/breakerBuckets)
	k := &b.buckets[slot%breakerBuckets]
	if k.slot != slot {
		k.slot, k.total, k.failed = slot, 0, 0
	}
	k.total++
	if e == good {
		b.inRow = 0
	} else {
		k.failed++
		b.inRow++
	}
	next, why := decideBreaker(b.current(now), e, b.record(slot))
	if why == reasonNone {
		return why
	}
	b.move(next, now)
	return why
}

func (b *breaker) record(slot int64) record {
	r := record{inRow: b.inRow}
	for _, k := range b.buckets {
		if slot-k.slot < breakerBuckets {
			r.total += k.total
			r.failed += k.failed
		}
	}
	return r
}

func (b *breaker) move(to breakerState, now time.Time) {
	switch to {
	case breakerOpen:
		if b.wait == 0 {
			b.wait = breakerWait
		} else {
			b.wait = min(2*b.wait, breakerMaxWait)
		}
	case breakerClosed:
		// The failures that opened it must not open it again.
		b.wait, b.inRow = 0, 0
		clear(b.buckets[:])
	}
	b.state, b.since = to, now
}

// hasten ends the wait of an open breaker.
func (b *breaker) hasten(now time.Time) bool {
	if b.state != breakerOpen {
		return false
	}
	b.move(breakerHalfOpen, now)
	return true
}
