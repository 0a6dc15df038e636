//go:build linux

package test

import (
	"context"
	"fmt"
	"net/http"
	"testing"
	"time"

	"github.com/dsnode/dsnode/node/admin"
	"github.com/dsnode/dsnode/test/lab"
)

// Isolation drills of the primary in a row, under load: each passes, the site
// heals by itself and is back in its place, and no client notices.
func TestFailoverIsolationDrills(t *testing.T) {
	times := 1
	if full() {
		times = 10
	}
	s := begin(t, lab.Topology{})
	s.lab.WaitHealthy(within(returns))
	var rto, inPlace []time.Duration
	for i := range times {
		victim, epoch, leader := s.primary()
		asked := s.others(victim)[i%2]
		s.lab.WaitFor(within(returns), asked.Name+" to know of no drill that runs", func(ctx context.Context) error {
			var known struct{ Data []admin.Drill }
			if err := askAdmin(ctx, asked, http.MethodGet, "/admin/v1/drills", nil, &known); err != nil {
				return err
			}
			for _, d := range known.Data {
				if d.Verdict == nil {
					return fmt.Errorf("it takes %s for running", d.ID)
				}
			}
			return nil
		})
		d, report := runDrill(t, s.lab, asked, admin.DrillRequest{Kind: "isolation", Site: victim.Name, ForSeconds: 12})
		back := s.returned(victim, epoch+1)
		s.inPlace(victim)
		if report.RTO.Achieved == nil || report.InPlaceSeconds == nil {
			t.Fatalf("drill %s gives no RTO (%v) or no time in place (%v)", d.ID, report.RTO.Achieved, report.InPlaceSeconds)
		}
		rto = append(rto, seconds(*report.RTO.Achieved))
		inPlace = append(inPlace, seconds(*report.InPlaceSeconds))
		t.Logf("%d: %s cut off by %s of %s, %s led: %s after %v, in place %v after the cut, well by all after %v more", i+1,
			victim.Name, d.ID, asked.Name, leader, report.Primary.To, rto[i], inPlace[i], back)
		if rto[i] > within(replaces) || inPlace[i] > within(returns) {
			t.Errorf("another primary after %v, in place after %v, want %v and %v at most", rto[i], inPlace[i], within(replaces), within(returns))
		}
	}
	t.Logf("%d drills: RTO median %v, worst %v; in place median %v, worst %v", times,
		percentile(rto, 0.5), percentile(rto, 1), percentile(inPlace, 0.5), percentile(inPlace, 1))
	s.goOn()
	s.end()
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

// inPlace waits until a site that was away is healthy by the word of all, in the
// role that it has while another of its city is the primary, and votes.
func (s *story) inPlace(site *lab.Site) {
	s.t.Helper()
	s.lab.WaitFor(within(returns), site.Name+" in its place", func(ctx context.Context) error {
		for _, n := range s.lab.Nodes() {
			status, err := n.Status(ctx)
			if err != nil {
				return err
			}
			for _, seen := range status.Sites {
				if seen.Name == site.Name && (seen.State != admin.SiteHealthy || seen.Role == "primary") {
					return fmt.Errorf("%s says that %s is %s, %s", n.Name, site.Name, seen.State, seen.Role)
				}
			}
			for _, seen := range status.Nodes {
				if seen.Site == site.Name && (seen.Voter == nil || !*seen.Voter) {
					return fmt.Errorf("%s says that %s does not vote", n.Name, seen.Name)
				}
			}
		}
		return nil
	})
}

// The leader stands still for a moment and another is elected, away from the
// primary: that is no failover, and within a minute the leader is back, while
// the role rests at no time.
func TestFailoverLeaderGoesHome(t *testing.T) {
	fullOnly(t, "half a minute of calm; the short form is in virtual time, in package failover")
	s := begin(t, lab.Topology{})
	site, epoch, _ := s.primary()
	led := s.driveOut(site)
	settled := time.Now()
	took := s.lab.WaitFor(within(time.Minute), "the leader to come back", func(ctx context.Context) error {
		for _, n := range s.lab.Nodes() {
			status, err := n.Status(ctx)
			if err != nil {
				return err
			}
			if status.Raft.LeaderSite == nil || *status.Raft.LeaderSite != site.Name {
				return fmt.Errorf("%s says that %v leads", n.Name, status.Raft.LeaderSite)
			}
		}
		return nil
	})
	t.Logf("driven out to %s, the leader was back after %v", led, took)
	s.goOn()
	if now, after, _ := s.primary(); now != site || after != epoch {
		t.Errorf("%s is the primary in epoch %d, want %s in %d still", now.Name, after, site.Name, epoch)
	}
	s.actedSince(site, epoch, settled)
	s.end(site)
}

// driveOut freezes the leader at the primary's site, for less than the patience,
// until another site has it.
func (s *story) driveOut(site *lab.Site) string {
	s.t.Helper()
	for range 10 {
		_, _, leader := s.primary()
		at := s.lab.Sites[0]
		for _, n := range s.lab.Nodes() {
			if n.Name == leader {
				at = n.Site
			}
		}
		if at != site {
			s.lab.WaitHealthy(within(returns))
			return leader
		}
		frozen := time.Now()
		at.Stop()
		s.lab.WaitFor(10*time.Second, "another leader", func(ctx context.Context) error {
			if time.Since(frozen) > 2200*time.Millisecond {
				return nil // the patience would end; try again
			}
			for _, n := range s.others(at) {
				if status, err := n.Status(ctx); err == nil && status.Raft.Leader != nil && *status.Raft.Leader != leader {
					return nil
				}
			}
			return fmt.Errorf("%s still leads", leader)
		})
		at.Continue()
		s.lab.WaitHealthy(within(returns))
	}
	s.t.Fatalf("the leader does not leave %s", site.Name)
	return ""
}

// actedSince fails unless a node of the site has said all the time that it acts.
func (s *story) actedSince(site *lab.Site, epoch uint64, since time.Time) {
	s.t.Helper()
	for _, a := range s.role.Runs() {
		if a.Site == site.Name && a.Epoch == epoch && a.First.Answered.Before(since) && time.Since(a.Last.Answered) < time.Second {
			return
		}
	}
	for _, a := range s.role.Runs() {
		s.t.Logf("%s acted in epoch %d from %s to %s", a.Node, a.Epoch, a.First.Answered.Format("15:04:05.000"), a.Last.Answered.Format("15:04:05.000"))
	}
	s.t.Errorf("%s did not act all the time since %s", site.Name, since.Format("15:04:05.000"))
}
