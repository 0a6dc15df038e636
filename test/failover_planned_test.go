//go:build linux

package test

import (
	"context"
	"testing"
	"time"

	"github.com/dsnode/dsnode/test/lab"
)

// Planned switchovers in a row, round all sites: nobody notices, and the role is
// idle for half a second at most, by the cluster's word and as seen from outside.
func TestFailoverPlanned(t *testing.T) {
	times := 2
	if full() {
		times = 20
	}
	s := begin(t, lab.Topology{})
	var said, seen []time.Duration
	for i := range times {
		old, epoch, leader := s.primary()
		to := s.lab.Sites[(old.Index+1)%len(s.lab.Sites)]
		// Any node can be asked; each in turn.
		asked := s.lab.Nodes()[(i+1)%len(s.lab.Nodes())]
		begun := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		result, err := asked.Switchover(ctx, to.Name)
		cancel()
		if err != nil {
			t.Fatalf("switchover %d from %s to %s, asked of %s: %v", i+1, old.Name, to.Name, asked.Name, err)
		}
		took := time.Since(begun)
		if result.Epoch != epoch+1 || result.From != old.Name || result.To != to.Name || !result.LeaderMoved {
			t.Errorf("from %s in epoch %d to %s gave %+v", old.Name, epoch, to.Name, result)
		}
		c := s.awaitChange(begun, epoch+1, within(5*time.Second), s.lab.Nodes())
		outside, ok := s.role.Idle(epoch + 1)
		if !ok {
			t.Fatalf("nobody was seen to act in epochs %d and %d", epoch, epoch+1)
		}
		inside := time.Duration(result.IdleSeconds * float64(time.Second))
		said, seen = append(said, inside), append(seen, outside)
		t.Logf("%d: %s (%s led) to %s, asked of %s: idle %v by its word, %v from outside; took %v; %s",
			i+1, old.Name, leader, to.Name, asked.Name, inside, outside, took, c)
		if inside > within(planned) || outside > within(planned) {
			t.Errorf("the role was idle for %v by its word and %v from outside, want %v at most", inside, outside, within(planned))
		}
		s.lab.WaitHealthy(within(returns))
	}
	t.Logf("idle of %d: by its word median %v, worst %v; from outside median %v, worst %v", times,
		percentile(said, 0.5), percentile(said, 1), percentile(seen, 0.5), percentile(seen, 1))
	s.goOn()
	s.end()
}
