package upstream

import (
	"testing"
	"time"

	"pgregory.net/rapid"
)

func TestDecideBreaker(t *testing.T) {
	for _, c := range []struct {
		name  string
		state breakerState
		e     evidence
		r     record
		want  breakerState
		why   breakerReason
	}{
		{"success", breakerClosed, good, record{30, 10, 0}, breakerClosed, reasonNone},
		{"four in a row", breakerClosed, bad, record{4, 4, 4}, breakerClosed, reasonNone},
		{"five in a row", breakerClosed, bad, record{5, 5, 5}, breakerOpen, reasonInRow},
		{"half, too few", breakerClosed, bad, record{19, 19, 1}, breakerClosed, reasonNone},
		{"half", breakerClosed, bad, record{20, 10, 1}, breakerOpen, reasonShare},
		{"less than half", breakerClosed, bad, record{21, 10, 1}, breakerClosed, reasonNone},
		{"neutral says nothing", breakerClosed, neutral, record{20, 20, 20}, breakerClosed, reasonNone},
		{"neutral trial", breakerHalfOpen, neutral, record{}, breakerHalfOpen, reasonNone},
		{"good trial", breakerHalfOpen, good, record{}, breakerClosed, reasonTrialSucceeded},
		{"bad trial", breakerHalfOpen, bad, record{}, breakerOpen, reasonTrialFailed},
		{"late failure", breakerOpen, bad, record{9, 9, 9}, breakerOpen, reasonNone},
		{"late success", breakerOpen, good, record{9, 9, 0}, breakerClosed, reasonTrialSucceeded},
	} {
		if got, why := decideBreaker(c.state, c.e, c.r); got != c.want || why != c.why {
			t.Errorf("%s: %v, %q", c.name, got, why)
		}
	}
}

// TestBreakerStory takes a breaker through all of its states.
func TestBreakerStory(t *testing.T) {
	var b breaker
	now := time.Unix(1_000_000, 0)
	for range breakerInRow {
		if _, ok := b.enter(now); !ok {
			t.Fatal("closed refuses")
		}
		b.note(bad, now)
	}
	if _, ok := b.enter(now.Add(breakerWait - 1)); ok || b.state != breakerOpen {
		t.Fatal("open lets in")
	}
	now = now.Add(breakerWait)
	trial, ok := b.enter(now)
	if !trial || !ok {
		t.Fatal("half-open lets nobody in")
	}
	if _, ok := b.enter(now); ok {
		t.Fatal("half-open lets two in")
	}
	b.leave(trial) // the client hung up
	b.note(neutral, now)
	if trial, ok = b.enter(now); !trial || !ok {
		t.Fatal("the trial was not given back")
	}
	b.leave(trial)
	b.note(bad, now)
	if _, ok := b.enter(now.Add(breakerWait)); ok {
		t.Fatal("the second wait is no longer than the first")
	}
	now = now.Add(2 * breakerWait)
	if trial, ok = b.enter(now); !trial || !ok {
		t.Fatal("half-open lets nobody in after the second wait")
	}
	b.leave(trial)
	b.note(good, now)
	for range breakerInRow - 1 {
		b.note(bad, now)
	}
	if _, ok := b.enter(now); !ok {
		t.Fatal("old failures count after closing")
	}
}

// TestBreakerWindow: outcomes older than the window don't count.
func TestBreakerWindow(t *testing.T) {
	var b breaker
	now := time.Unix(2_000_000, 0)
	for i := range 19 {
		b.note([]evidence{bad, bad, good}[i%3], now)
	}
	now = now.Add(breakerWindow + time.Second)
	b.note(bad, now)
	if b.state != breakerClosed {
		t.Error("an old window opened it")
	}
	for i := range 19 {
		b.note([]evidence{good, bad}[i%2], now)
	}
	if b.state != breakerOpen {
		t.Error("half of twenty failed, and it is closed")
	}
}

// TestBreakerNeverSticks: whatever happens, a request is let through after the longest
// wait, and never two trials at a time.
func TestBreakerNeverSticks(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var b breaker
		now := time.Unix(3_000_000, 0)
		var out []bool // permits that are out: trial?
		trials := 0
		for range rapid.IntRange(1, 200).Draw(t, "steps") {
			switch rapid.IntRange(0, 3).Draw(t, "what") {
			case 0:
				if trial, ok := b.enter(now); ok {
					out = append(out, trial)
					if trial {
						trials++
					}
				}
			case 1:
				if len(out) == 0 {
					continue
				}
				i := rapid.IntRange(0, len(out)-1).Draw(t, "which")
				b.leave(out[i])
				if out[i] {
					trials--
				}
				out = append(out[:i], out[i+1:]...)
				b.note(evidence(rapid.IntRange(0, 2).Draw(t, "evidence")), now)
			case 2:
				b.note(evidence(rapid.IntRange(0, 2).Draw(t, "late")), now)
			case 3:
				now = now.Add(time.Duration(rapid.Int64Range(0, int64(40*time.Second)).Draw(t, "wait")))
			}
			if trials > 1 {
				t.Fatal("two trials at a time")
			}
		}
		for _, trial := range out {
			b.leave(trial)
		}
		if _, ok := b.enter(now.Add(breakerMaxWait)); !ok {
			t.Fatalf("nobody is let in: %+v", b)
		}
	})
}
