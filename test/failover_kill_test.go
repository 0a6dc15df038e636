//go:build linux

package test

import (
	"fmt"
	"testing"
	"time"

	"github.com/dsnode/dsnode/test/lab"
)

// All nodes of the primary are killed at once: the site in the same city is the primary
// within seconds, no client of another site fails, and the old primary does not take
// the role back when it returns.
func TestFailoverWhenPrimaryIsKilled(t *testing.T) {
	parallelIfShort(t)
	// In the short form TestFailoverBehindHAProxy covers 2+2+1.
	shapes, trials := [][]int{{1, 1, 1}}, []int{1}
	if full() {
		shapes, trials = append(shapes, []int{2, 2, 1}), []int{20, 20}
	}
	for i, nodes := range shapes {
		t.Run(shape(nodes), func(t *testing.T) {
			parallelIfShort(t)
			var changes []change
			var backs []time.Duration
			for trial := range trials[i] {
				t.Run(fmt.Sprint(trial+1), func(t *testing.T) {
					s := begin(t, lab.Topology{Nodes: nodes})
					if len(s.lab.Nodes()) >= 5 {
						wantVoters(t, s.lab, 5) // two nodes become voters only after a while
					}
					old, epoch, leader := s.primary()
					c, back := s.killAndReturn(old, epoch)
					t.Logf("%s killed, %s led: %s; healthy again %.2f s after its restart", old.Name, leader, c, back.Seconds())
					changes, backs = append(changes, c), append(backs, back)
					s.end(old)
				})
			}
			if full() {
				wantMedian(t, changes, backs)
			}
		})
	}
}

func shape(nodes []int) string {
	text := ""
	for i, n := range nodes {
		if i > 0 {
			text += "+"
		}
		text += fmt.Sprint(n)
	}
	return text
}

// killAndReturn kills the primary, checks which site follows and when, and starts it
// again.
func (s *scenario) killAndReturn(old *lab.Site, epoch uint64) (change, time.Duration) {
	s.t.Helper()
	fault := time.Now()
	old.Kill()
	s.audit.Unreachable(old, false)
	c := s.awaitChange(fault, epoch+1, within(replaces), s.others(old))
	if to := s.lab.Site(c.site); to.City != old.City {
		s.t.Errorf("%s took over, want the site in the same city", c.site)
	}
	if c.known > within(replaces) {
		s.t.Errorf("replaced after %v, want %v at most", c.known, within(replaces))
	}
	s.continueLoad()
	s.audit.Heal()
	old.Start()
	return c, s.returned(old, epoch+1)
}

func wantMedian(t *testing.T, changes []change, backs []time.Duration) {
	t.Helper()
	var leads, known, acts, decides, waits []time.Duration
	for _, c := range changes {
		t.Log(c)
		leads, known, acts = append(leads, c.leads), append(known, c.known), append(acts, c.acts)
		decides, waits = append(decides, c.known-c.leads), append(waits, c.acts-c.known)
	}
	if len(known) == 0 {
		return // each trial has failed
	}
	t.Logf("%d trials; known: median %v, worst %v; acts: median %v, worst %v; back: median %v, worst %v", len(known),
		percentile(known, 0.5), percentile(known, 1), percentile(acts, 0.5), percentile(acts, 1), percentile(backs, 0.5), percentile(backs, 1))
	t.Logf("of which: until a survivor leads: median %v, worst %v; from there until it is decided: median %v, worst %v; then until it acts: median %v, worst %v",
		percentile(leads, 0.5), percentile(leads, 1), percentile(decides, 0.5), percentile(decides, 1), percentile(waits, 0.5), percentile(waits, 1))
	if m := percentile(known, 0.5); m > 4*time.Second {
		t.Errorf("the median is %v, want 4 s at most", m)
	}
}

// The Raft leader is in the third site when the primary is killed, so the failover
// needs no election.
func TestFailoverWithLeaderInThirdSite(t *testing.T) {
	fullOnly(t, "the leader gets to the third site only by chance")
	for _, nodes := range [][]int{{1, 1, 1}, {2, 2, 1}} {
		t.Run(shape(nodes), func(t *testing.T) {
			s := begin(t, lab.Topology{Nodes: nodes})
			s.leadFrom(s.lab.Sites[2])
			old, epoch, leader := s.primary()
			c, back := s.killAndReturn(old, epoch)
			t.Logf("%s killed, %s led: %s; healthy again %.2f s after its restart", old.Name, leader, c, back.Seconds())
			s.end(s.lab.Sites...) // moving the leader has stopped them
		})
	}
}
