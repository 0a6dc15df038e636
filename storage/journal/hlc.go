package journal

import (
	"sync/atomic"
	"time"
)

// HLC is a hybrid logical clock: it always increases, stays near the wall clock, and
// is after everything observed. There is one per node; it is safe for concurrent use.
type HLC struct {
	now      func() time.Time
	maxAhead time.Duration
	last     atomic.Uint64
}

// NewHLC makes a clock on top of now, which is time.Now outside of tests. Observe
// rejects clocks that are more than maxAhead ahead of now.
func NewHLC(now func() time.Time, maxAhead time.Duration) *HLC {
	return &HLC{now: now, maxAhead: maxAhead}
}

// Now returns a clock above all that Now returned and Observe accepted before.
func (h *HLC) Now() Clock {
	wall := uint64(ClockAt(h.now()))
	for {
		last := h.last.Load()
		next := max(last+1, wall)
		if h.last.CompareAndSwap(last, next) {
			return Clock(next)
		}
	}
}

// Observe records another node's clock, so that later clocks of this node are above
// it. ahead is its distance from this node's wall clock, negative when behind. A clock
// that is more than maxAhead ahead is not accepted: one node with a wrong date must
// not move the clocks of all.
func (h *HLC) Observe(c Clock) (ahead time.Duration, accepted bool) {
	ahead = c.Time().Sub(h.now())
	if ahead > h.maxAhead {
		return ahead, false
	}
	for {
		last := h.last.Load()
		if last >= uint64(c) || h.last.CompareAndSwap(last, uint64(c)) {
			return ahead, true
		}
	}
}
