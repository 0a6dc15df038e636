// Package clock has the clock that leases are counted on (Boottime) and the ticks that
// all periodic loops of a process share (UntilTick). It depends on nothing else of
// dsnode. Start reading at UntilTick.
package clock

import "time"

// UntilTick is the time from now (Boottime) until the next multiple of interval.
// Periodic loops wait for that instead of using their own ticker. So loops with the
// same interval wake at the same time, because wake-ups dominate an idle node's CPU.
func UntilTick(now, interval time.Duration) time.Duration {
	left := interval - now%interval
	if left < interval/8 {
		left += interval // a timer may fire slightly early, and a loop must not run twice for one tick
	}
	return left
}
