package throttle

import (
	"strconv"
	"testing"
	"testing/synctest"
	"time"
)

func TestOneLineForEachReasonInTenSeconds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lines := NewLines()
		want := func(reason string, skipped int, ok bool) {
			t.Helper()
			if s, o := lines.Allow(reason); s != skipped || o != ok {
				t.Errorf("Allow(%q) = %d, %v; want %d, %v", reason, s, o, skipped, ok)
			}
		}
		want("tls", 0, true)
		want("tls", 0, false)
		want("tls", 0, false)
		want("preface", 0, true)
		time.Sleep(10 * time.Second)
		want("tls", 2, true)
		want("tls", 0, false)
	})
}

// A client that causes ever new reasons must not fill the memory.
func TestNumberOfReasonsIsBounded(t *testing.T) {
	lines := NewLines()
	for i := range 10 * maxReasons {
		lines.Allow(strconv.Itoa(i))
		if len(lines.seen) > maxReasons {
			t.Fatalf("%d reasons are remembered, want at most %d", len(lines.seen), maxReasons)
		}
	}
}
