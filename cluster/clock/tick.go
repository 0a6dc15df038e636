package clock

import "time"

// UntilBeat is the time from now (Boottime) until the next multiple of every.
// Loops that turn all day wait for it instead of a ticker of their own: then they
// wake this process together, which costs an idle one a good part of what it
// spends at all.
func UntilTick(now, every time.Duration) time.Duration {
	left := every - now%every
	if left < every/8 {
		left += every // a timer may be early by its rounding; nobody beats twice
	}
	return left
}
