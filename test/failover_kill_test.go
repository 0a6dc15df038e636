//go:build linux

package test

import (
	"fmt"
	"testing"
	"time"

	"github.com/dsnode/dsnode/test/lab"
)

// All nodes of the primary killed at once: the same city's site takes over in
// seconds, no other site's client notices, and who returns does not take it back.
func TestFailoverWhenPrimaryIsKilled(t *testing.T) {
	sharing(t)
	// In the short form 2+2+1 has its turn behind the load balancer.
	shapes, trials := [][]int{{1, 1, 1}}, []int{1}
	if full() {
		shapes, trials = append(shapes, []int{2, 2, 1}), []int{20, 20}
	}
	for i, nodes := range shapes {
		t.Run(shape(nodes), func(t *testing.T) {
			sharing(t)
			var changes []change
			var backs []time.Duration
			for trial := range trials[i] {
				t.Run(fmt.Sprint(trial+1), func(t *testing.T) {
					s := begin(t, lab.Topology{Nodes: nodes})
					if len(s.lab.Nodes()) >= 5 {
						wantVoters(t, s.lab, 5) // the last two get their votes when they were stable for a while
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

// killAndReturn kills the primary, checks who follows and when, and restarts it.
func (s *story) killAndReturn(old *lab.Site, epoch uint64) (change, time.Duration) {
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
	s.goOn()
	s.audit.Heal()
	old.Start()
	return c, s.returned(old, epoch+1)
}

func wantMedian(t *testing.T, changes []change, backs []time.Duration) {
	t.Helper()
	var known, acts []time.Duration
	for _, c := range changes {
		t.Log(c)
		known, acts = append(known, c.known), append(acts, c.acts)
	}
	if len(known) == 0 {
		return // each trial has said why
	}
	t.Logf("%d trials; known: median %v, worst %v; acts: median %v, worst %v; back: median %v, worst %v", len(known),
		percentile(known, 0.5), percentile(known, 1), percentile(acts, 0.5), percentile(acts, 1), percentile(backs, 0.5), percentile(backs, 1))
	if m := percentile(known, 0.5); m > 4*time.Second {
		t.Errorf("the median is %v, want 4 s at most", m)
	}
}

// The raft leader is in the third site when the primary is killed: no election
// is needed, so it is quick.
func TestFailoverWithLeaderInThirdSite(t *testing.T) {
	fullOnly(t, "the leader gets there by chance")
	for _, nodes := range [][]int{{1, 1, 1}, {2, 2, 1}} {
		t.Run(shape(nodes), func(t *testing.T) {
			s := begin(t, lab.Topology{Nodes: nodes})
			s.leadFrom(s.lab.Sites[2])
			old, epoch, leader := s.primary()
			c, back := s.killAndReturn(old, epoch)
			t.Logf("%s killed, %s led: %s; healthy again %.2f s after its restart", old.Name, leader, c, back.Seconds())
			s.end(s.lab.Sites...) // moving the leader there has frozen all of them
		})
	}
}
