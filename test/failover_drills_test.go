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

// Several isolation drills of the primary, one after another, under load: each
// passes, the site returns as a standby without help, and no client fails.
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
		s.lab.WaitFor(within(returns), asked.Name+" to show no running drill", func(ctx context.Context) error {
			var known struct{ Data []admin.Drill }
			if err := askAdmin(ctx, asked, http.MethodGet, "/admin/v1/drills", nil, &known); err != nil {
				return err
			}
			for _, d := range known.Data {
				if d.Verdict == nil {
					return fmt.Errorf("it shows %s as running", d.ID)
				}
			}
			return nil
		})
		d, report := runDrill(t, s.lab, asked, admin.DrillRequest{Kind: "isolation", Site: victim.Name, ForSeconds: 12})
		back := s.returned(victim, epoch+1)
		s.inPlace(victim)
		if report.RTO.Achieved == nil || report.InPlaceSeconds == nil {
			t.Fatalf("drill %s reports no RTO (%v) or no time until the site was in place (%v)", d.ID, report.RTO.Achieved, report.InPlaceSeconds)
		}
		rto = append(rto, seconds(*report.RTO.Achieved))
		inPlace = append(inPlace, seconds(*report.InPlaceSeconds))
		t.Logf("%d: %s isolated by drill %s of %s, %s led: primary %s after %v, in place %v after the cut, healthy after %v more", i+1,
			victim.Name, d.ID, asked.Name, leader, report.Primary.To, rto[i], inPlace[i], back)
		if rto[i] > within(replaces) || inPlace[i] > within(returns) {
			t.Errorf("another primary after %v, in place after %v, want %v and %v at most", rto[i], inPlace[i], within(replaces), within(returns))
		}
	}
	t.Logf("%d drills: RTO median %v, worst %v; in place median %v, worst %v", times,
		percentile(rto, 0.5), percentile(rto, 1), percentile(inPlace, 0.5), percentile(inPlace, 1))
	s.continueLoad()
	s.end()
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

// inPlace waits until every node shows a site that was isolated as healthy, not as
// primary, and its nodes as voters.
func (s *scenario) inPlace(site *lab.Site) {
	s.t.Helper()
	s.lab.WaitFor(within(returns), site.Name+" in its place", func(ctx context.Context) error {
		for _, n := range s.lab.Nodes() {
			status, err := n.Status(ctx)
			if err != nil {
				return err
			}
			for _, seen := range status.Sites {
				if seen.Name == site.Name && (seen.State != admin.SiteHealthy || seen.Role == "primary") {
					return fmt.Errorf("%s shows %s as %s, %s", n.Name, site.Name, seen.State, seen.Role)
				}
			}
			for _, seen := range status.Nodes {
				if seen.Site == site.Name && (seen.Voter == nil || !*seen.Voter) {
					return fmt.Errorf("%s shows that %s is no voter", n.Name, seen.Name)
				}
			}
		}
		return nil
	})
}

// The Raft leader is stopped for a moment, and a node of another site than the
// primary's is elected. That is no failover. Within a minute the leader is at the
// primary again, which acts all the time.
func TestFailoverLeaderGoesHome(t *testing.T) {
	fullOnly(t, "the leader moves after half a minute; package failover tests it in virtual time")
	s := begin(t, lab.Topology{})
	site, epoch, _ := s.primary()
	led := s.driveOut(site)
	settled := time.Now()
	took := s.lab.WaitFor(within(time.Minute), "the leader to be at the primary", func(ctx context.Context) error {
		for _, n := range s.lab.Nodes() {
			status, err := n.Status(ctx)
			if err != nil {
				return err
			}
			if status.Raft.LeaderSite == nil || *status.Raft.LeaderSite != site.Name {
				return fmt.Errorf("%s shows %v as the leader's site", n.Name, status.Raft.LeaderSite)
			}
		}
		return nil
	})
	t.Logf("the leader was %s; it was back after %v", led, took)
	s.continueLoad()
	if now, after, _ := s.primary(); now != site || after != epoch {
		t.Errorf("%s is the primary in epoch %d, want %s in %d still", now.Name, after, site.Name, epoch)
	}
	s.actedSince(site, epoch, settled)
	s.end(site)
}

// driveOut stops the leader at the primary's site, for less than the patience, until
// another site has the leader.
func (s *scenario) driveOut(site *lab.Site) string {
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
		stopped := time.Now()
		at.Stop()
		s.lab.WaitFor(10*time.Second, "another leader", func(ctx context.Context) error {
			if time.Since(stopped) > 2200*time.Millisecond {
				return nil // the patience ends soon; try again
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
	s.t.Fatalf("the leader is still at %s", site.Name)
	return ""
}

// actedSince fails the test unless a node of the site acted all the time.
func (s *scenario) actedSince(site *lab.Site, epoch uint64, since time.Time) {
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
