//go:build linux

package test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/dsnode/dsnode/test/lab"
)

// All nodes of the primary are stopped until another site is the primary, and then
// continued. None of them acts as primary afterwards; each steps down by itself.
func TestFailoverWhenPrimaryStandsStill(t *testing.T) {
	parallelIfShort(t)
	shapes, pause := [][]int{{1, 1, 1}}, 8*time.Second
	if full() {
		shapes, pause = [][]int{{1, 1, 1}, {2, 2, 1}}, 30*time.Second
	}
	for _, nodes := range shapes {
		t.Run(shape(nodes), func(t *testing.T) {
			s := begin(t, lab.Topology{Nodes: nodes})
			old, epoch, leader := s.primary()
			acted := actedLines(old)
			if acted == 0 {
				t.Fatalf("the log of %s does not say that it acts as primary", old.Name)
			}
			fault := time.Now()
			old.StopAndWait()
			stopped := time.Now()
			s.audit.Unreachable(old, false)
			c := s.awaitChange(fault, epoch+1, within(replaces), s.others(old))
			t.Logf("%s stopped, %s led: %s", old.Name, leader, c)
			if c.known > within(replaces) {
				t.Errorf("replaced after %v, want %v at most", c.known, within(replaces))
			}
			s.waitUntil(stopped.Add(pause))
			s.audit.Heal()
			old.Continue()
			continued := time.Now()
			down := s.lab.WaitFor(within(returns), "the old primary to show its successor", func(ctx context.Context) error {
				for _, n := range old.Nodes {
					status, err := n.Status(ctx)
					if err != nil {
						return fmt.Errorf("ask %s: %w", n.Name, err)
					}
					if status.Primary == nil || status.Primary.Epoch <= epoch {
						return fmt.Errorf("%s says %+v", n.Name, status.Primary)
					}
				}
				return nil
			})
			t.Logf("stopped for %v; it showed its successor %v after that, and the cluster was healthy after %v", pause, down, s.returned(old, epoch+1)+down)
			s.neverActed(old, stopped, continued)
			if now := actedLines(old); now != acted {
				t.Errorf("the log of %s says %d times that it acts as primary, before the stop it said so %d times", old.Name, now, acted)
			}
			s.end(old)
		})
	}
}

// neverActed fails the test if a node of the site said that it acts as primary when
// asked after it was stopped. It may answer earlier questions after it continued.
func (s *scenario) neverActed(site *lab.Site, stopped, continued time.Time) {
	s.t.Helper()
	for _, a := range s.role.Runs() {
		if a.Site == site.Name && a.Last.Asked.After(stopped) {
			s.t.Errorf("%s acted in epoch %d: asked %v after it was stopped, answered %v after it continued",
				a.Node, a.Epoch, a.Last.Asked.Sub(stopped), a.Last.Answered.Sub(continued))
		}
	}
}

func actedLines(site *lab.Site) int {
	n := 0
	for _, node := range site.Nodes {
		n += strings.Count(node.LogTail(1<<20), `"msg":"acting as primary"`)
	}
	return n
}

// The primary is cut off, in one direction or in both. It still serves the clients of
// its site, so no client fails, and it stops acting before another site acts.
func TestFailoverWhenPrimaryIsCutOff(t *testing.T) {
	parallelIfShort(t)
	cuts := map[string]func(*lab.Network){
		"nothing gets out": func(w *lab.Network) { w.Cut(0, 1); w.Cut(0, 2) },
	}
	shapes := [][]int{{1, 1, 1}}
	if full() {
		shapes = append(shapes, []int{2, 2, 1})
		cuts["nothing gets in"] = func(w *lab.Network) { w.Cut(1, 0); w.Cut(2, 0) }
		cuts["both ways"] = func(w *lab.Network) { w.Isolate(0) }
	}
	for _, nodes := range shapes {
		for name, cut := range cuts {
			t.Run(shape(nodes)+" "+name, func(t *testing.T) { cutOff(t, nodes, cut) })
		}
	}
}

func cutOff(t *testing.T, nodes []int, cut func(*lab.Network)) {
	s := begin(t, lab.Topology{Nodes: nodes})
	old, epoch, leader := s.primary()
	if old.Index != 0 {
		t.Fatalf("the first primary is %s", old.Name)
	}
	fault := time.Now()
	cut(s.lab.Net)
	s.audit.Unreachable(old, true)
	c := s.awaitChange(fault, epoch+1, within(replaces), s.others(old))
	idle, _ := s.role.Idle(epoch + 1)
	t.Logf("%s cut off, %s led: %s; no primary acted for %v", old.Name, leader, c, idle)
	if c.known > within(replaces) {
		t.Errorf("replaced after %v, want %v at most", c.known, within(replaces))
	}
	if to := s.lab.Site(c.site); to.City != old.City {
		t.Errorf("%s took over, want the site in the same city", c.site)
	}
	s.continueLoad()
	s.audit.Heal()
	s.lab.Net.MendAll()
	t.Logf("healthy %v after the cut ended", s.returned(old, epoch+1))
	s.end()
}

// Two sites can't hear each other and a third hears both: no site is lost, so there is
// no failover.
func TestFailoverNotForOneBrokenLink(t *testing.T) {
	fullOnly(t, "it waits for ten seconds, four times")
	for _, nodes := range [][]int{{1, 1, 1}, {2, 2, 1}} {
		for _, third := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, third site leads %v", shape(nodes), third), func(t *testing.T) {
				s := begin(t, lab.Topology{Nodes: nodes})
				affected := []*lab.Site{}
				if third {
					s.leadFrom(s.lab.Sites[2])
					affected = s.lab.Sites // moving the leader has stopped them
				}
				_, epoch, _ := s.primary()
				s.lab.Net.Cut(0, 1)
				s.lab.Net.Cut(1, 0)
				s.waitUntil(time.Now().Add(10 * time.Second))
				if site, now, leader := s.primary(); now != epoch {
					t.Errorf("%s is the primary in epoch %d, %s leads; want epoch %d still", site.Name, now, leader, epoch)
				}
				s.lab.Net.MendAll()
				t.Logf("healthy %v after the cut ended", s.lab.WaitHealthy(within(returns)))
				s.end(affected...)
			})
		}
	}
}

// leadFrom stops the Raft leader, for less than the patience, until a node of the
// site happens to be elected.
func (s *scenario) leadFrom(site *lab.Site) {
	s.t.Helper()
	_, epoch, _ := s.primary()
	for range 30 {
		_, _, leader := s.primary()
		var at *lab.Node
		for _, n := range s.lab.Nodes() {
			if n.Name == leader {
				at = n
			}
		}
		if at.Site == site {
			break
		}
		at.Stop()
		fault := time.Now()
		s.lab.WaitFor(10*time.Second, "another leader", func(ctx context.Context) error {
			if time.Since(fault) > 2200*time.Millisecond {
				return nil // the patience ends soon; try again
			}
			for _, n := range s.others(at.Site) {
				if status, err := n.Status(ctx); err == nil && status.Raft.Leader != nil && *status.Raft.Leader != leader {
					return nil
				}
			}
			return fmt.Errorf("%s still leads", leader)
		})
		at.Continue()
		s.lab.WaitHealthy(within(returns))
	}
	primary, now, leader := s.primary()
	if !strings.HasPrefix(leader, site.Name) || now != epoch {
		s.t.Fatalf("%s leads and %s is the primary in epoch %d; the test needs a leader in %s and epoch %d", leader, primary.Name, now, site.Name, epoch)
	}
}
