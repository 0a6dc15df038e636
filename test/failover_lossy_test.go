//go:build linux

package test

import (
	"context"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/dsnode/dsnode/test/lab"
)

// With 2 % packet loss, 200 ms of jitter and a node that is stopped for 300 ms of each
// second no site is down, so there is no failover.
func TestFailoverNotForBadWeather(t *testing.T) {
	lasts := 10 * time.Second
	if full() {
		lasts = time.Hour
	}
	if text := os.Getenv("DSNODE_TEST_WEATHER"); text != "" {
		var err error
		if lasts, err = time.ParseDuration(text); err != nil {
			t.Fatalf("DSNODE_TEST_WEATHER: %v", err)
		}
	}
	s := begin(t, lab.Topology{})
	site, epoch, leader := s.primary()
	s.lab.Net.SetAll(lab.Link{Delay: betweenCities / 2, Jitter: 200 * time.Millisecond, Loss: 0.02})
	begun := time.Now()
	s.starve(begun.Add(lasts))
	// The Raft leaders, and how often they changed, are logged; nothing is promised.
	leaders, changes := map[string]int{}, 0
	for _, seen := range s.lab.Observer.Between(begun, time.Now()) {
		if seen.Err != nil {
			continue
		}
		if seen.Epoch != epoch || seen.Primary != site.Name {
			t.Errorf("%s showed %s as the primary in epoch %d at %s, %v after the faults began", seen.Node, seen.Primary, seen.Epoch, seen.Answered.Format(time.TimeOnly), seen.Answered.Sub(begun))
			break
		}
		leaders[seen.Leader]++
		if seen.Leader != "" && seen.Leader != leader {
			leader, changes = seen.Leader, changes+1
		}
	}
	t.Logf("%v of loss, jitter and stops: statuses named the leaders %v; the leader changed %d times", lasts, leaders, changes)
	s.ordinaryLinks()
	s.lab.WaitHealthy(within(returns))
	if now, after, _ := s.primary(); now != site || after != epoch {
		t.Errorf("%s is the primary in epoch %d, want %s in %d still", now.Name, after, site.Name, epoch)
	}
	s.end()
}

// starve stops a node for 300 ms of each second: in the first minute the primary's
// first node, which leads, and in each further minute the next node.
func (s *scenario) starve(until time.Time) {
	s.t.Helper()
	begun := time.Now()
	for second := 0; time.Now().Before(until); second++ {
		n := s.lab.Nodes()[second/60%len(s.lab.Nodes())]
		at := begun.Add(time.Duration(second) * time.Second)
		n.Stop()
		s.waitUntil(at.Add(300 * time.Millisecond))
		n.Continue()
		s.waitUntil(at.Add(time.Second))
	}
}

func (s *scenario) waitUntil(at time.Time) {
	s.t.Helper()
	s.lab.WaitFor(time.Until(at)+5*time.Second, "the time", func(ctx context.Context) error {
		timer := time.NewTimer(time.Until(at))
		defer timer.Stop()
		select {
		case <-timer.C:
			return nil
		case <-ctx.Done():
			return fmt.Errorf("not yet: %w", ctx.Err())
		}
	})
}
