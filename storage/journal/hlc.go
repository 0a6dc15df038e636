package journal

import (
	"sync/atomic"
	"time"
)

// HLC gives hybrid logical clocks: always rising, near the wall clock, and after
// everything observed. One per node; safe for many goroutines.
type HLC struct {
	now      func() time.Time
	maxAhead time.Duration
	last     atomic.Uint64
}

// NewHLC makes a clock over now, time.Now outside tests. A clock more than
// maxAhead ahead of now is not believed by Observe.
func NewHLC(now func() time.Time, maxAhead time.Duration) *HLC {
	return &HLC{now: now, maxAhead: maxAhead}
}

// Now is above all that Now gave and Observe accepted before.
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

// Observe takes notice of another node's clock, so that what this node writes
// from now on comes after it. ahead is how far it is ahead of our wall clock,
// negative when behind. One that is ahead by more than the bound is not
// accepted: a node whose date is wrong must not take the others along.
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
