package journal

import (
	"sync"
	"testing"
	"time"
)

func TestHLC(t *testing.T) {
	now := time.Date(2026, 11, 22, 0, 0, 0, 0, time.UTC)
	h := NewHLC(func() time.Time { return now }, 10*time.Minute)
	a := h.Now()
	if a != ClockAt(now) {
		t.Fatalf("%d", a)
	}
	now = now.Add(-time.Hour) // the wall clock is set back
	if b := h.Now(); b <= a {
		t.Fatal("the clock went back")
	}
	now = now.Add(time.Hour)
	if ahead, ok := h.Observe(ClockAt(now.Add(9 * time.Minute))); !ok || ahead != 9*time.Minute {
		t.Fatalf("%s %v", ahead, ok)
	}
	c := h.Now()
	if c <= ClockAt(now.Add(9*time.Minute)) {
		t.Fatal("the clock is not after the observed one")
	}
	if ahead, ok := h.Observe(ClockAt(now.Add(11 * time.Minute))); ok || ahead != 11*time.Minute {
		t.Fatalf("%s %v", ahead, ok)
	}
	if ahead, ok := h.Observe(ClockAt(now.Add(-time.Hour))); !ok || ahead != -time.Hour || h.Now() != c+1 {
		t.Fatalf("%s %v", ahead, ok)
	}
}

func TestHLCConcurrently(t *testing.T) {
	h := NewHLC(time.Now, time.Minute)
	var wg sync.WaitGroup
	all := make([][]Clock, 8)
	for i := range all {
		wg.Go(func() {
			for range 1000 {
				all[i] = append(all[i], h.Now())
			}
		})
	}
	wg.Wait()
	seen := map[Clock]bool{}
	for _, clocks := range all {
		for i, c := range clocks {
			if seen[c] || i > 0 && c <= clocks[i-1] {
				t.Fatal("a clock was returned twice, or went back")
			}
			seen[c] = true
		}
	}
}
