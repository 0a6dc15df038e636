package clock

import (
	"testing"
	"time"

	"pgregory.net/rapid"
)

// Loops that wait for one beat, each a little late or early, wake together, none
// of them twice, and none waits for much longer than a beat.
func TestBeat(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		every := time.Duration(rapid.IntRange(1, 4).Draw(t, "eighths")) * 125 * time.Millisecond
		now := time.Duration(rapid.Int64Range(0, int64(time.Hour)).Draw(t, "now"))
		left := UntilTick(now, every)
		if (now+left)%every != 0 || left < every/8 || left > every+every/8 {
			t.Fatalf("at %s the next beat of %s is in %s", now, every, left)
		}
		late := time.Duration(rapid.Int64Range(int64(-every/9), int64(every*7/8)).Draw(t, "late"))
		if again := now + left + late + UntilTick(now+left+late, every); again != now+left+every {
			t.Fatalf("%s after a beat of %s the next is after %s", late, every, again-now-left)
		}
	})
}
