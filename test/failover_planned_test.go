//go:build linux

package test

import (
	"context"
	"testing"
	"time"

	"github.com/dsnode/dsnode/test/lab"
)

// Planned switchovers from site to site: no client fails, and the time without an
// acting primary is half a second at most, as the cluster reports it and as measured
// from outside.
func TestFailoverPlanned(t *testing.T) {
	times := 2
	if full() {
		times = 20
	}
	s := begin(t, lab.Topology{})
	var reported, measured []time.Duration
	for i := range times {
		old, epoch, leader := s.primary()
		to := s.lab.Sites[(old.Index+1)%len(s.lab.Sites)]
		// Each node in turn.
		asked := s.lab.Nodes()[(i+1)%len(s.lab.Nodes())]
		begun := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		result, err := asked.Switchover(ctx, to.Name)
		cancel()
		if err != nil {
			t.Fatalf("switchover %d from %s to %s, requested at %s: %v", i+1, old.Name, to.Name, asked.Name, err)
		}
		took := time.Since(begun)
		if result.Epoch != epoch+1 || result.From != old.Name || result.To != to.Name || !result.LeaderMoved {
			t.Errorf("from %s in epoch %d to %s gave %+v", old.Name, epoch, to.Name, result)
		}
		c := s.awaitChange(begun, epoch+1, within(5*time.Second), s.lab.Nodes())
		outside, ok := s.role.Idle(epoch + 1)
		if !ok {
			t.Fatalf("no primary was seen to act in epochs %d and %d", epoch, epoch+1)
		}
		inside := time.Duration(result.IdleSeconds * float64(time.Second))
		reported, measured = append(reported, inside), append(measured, outside)
		t.Logf("%d: %s (%s led) to %s, requested at %s: no primary for %v as reported, %v as measured; took %v; %s",
			i+1, old.Name, leader, to.Name, asked.Name, inside, outside, took, c)
		if inside > within(planned) || outside > within(planned) {
			t.Errorf("no primary acted for %v as reported and %v as measured, want %v at most", inside, outside, within(planned))
		}
		s.lab.WaitHealthy(within(returns))
	}
	t.Logf("time without a primary in %d switchovers: reported median %v, worst %v; measured median %v, worst %v", times,
		percentile(reported, 0.5), percentile(reported, 1), percentile(measured, 0.5), percentile(measured, 1))
	s.continueLoad()
	s.end()
}
