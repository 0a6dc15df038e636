package clock

import (
	"testing"
	"time"

	"pgregory.net/rapid"
)

// Loops that wait for a tick, each a little late or early, wake at the same time,
// none of them twice for one tick, and none waits for much longer than one interval.
func TestUntilTick(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		interval := time.Duration(rapid.IntRange(1, 4).Draw(t, "eighths")) * 125 * time.Millisecond
		now := time.Duration(rapid.Int64Range(0, int64(time.Hour)).Draw(t, "now"))
		left := UntilTick(now, interval)
		if (now+left)%interval != 0 || left < interval/8 || left > interval+interval/8 {
			t.Fatalf("at %s the next tick of %s is in %s", now, interval, left)
		}
		late := time.Duration(rapid.Int64Range(int64(-interval/9), int64(interval*7/8)).Draw(t, "late"))
		if next := now + left + late + UntilTick(now+left+late, interval); next != now+left+interval {
			t.Fatalf("%s after a tick of %s the next one is %s after that tick, want one interval", late, interval, next-now-left)
		}
	})
}
