//go:build linux

package test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dsnode/dsnode/node/admin"
	"github.com/dsnode/dsnode/test/lab"
)

// One site with three nodes has three voters: any one of them may be lost.
func TestOneSiteSurvivesTheLossOfANode(t *testing.T) {
	parallelIfShort(t)
	l := lab.Start(t, lab.Topology{Nodes: []int{3}})
	wantVoters(t, l, 3)
	wantStatus(t, l, "healthy without a warning", func(s admin.Status) error {
		return wantWarnings(s, "")
	})
	leader := leaderNode(t, l)
	leader.Kill()
	wantStatus(t, l, "a quorum of two, and a status that says so", func(s admin.Status) error {
		switch {
		case !s.Raft.Quorum || s.Raft.Leader == nil || *s.Raft.Leader == leader.Name:
			return fmt.Errorf("raft %+v", s.Raft)
		case s.Healthy || !slices.ContainsFunc(s.Reasons, func(r string) bool { return strings.Contains(r, leader.Name) }):
			return fmt.Errorf("healthy %v, reasons %q", s.Healthy, s.Reasons)
		}
		return wantWarnings(s, "2 of 3 voters answer, and all of them are needed")
	})
	wantChange(t, l)
	leader.Start()
	l.WaitHealthy(within(returns))
	wantVoters(t, l, 3)
}

// Two sites with 2+1 nodes have three voters. The loss of the smaller one costs nothing but
// its nodes, and the other one does not call itself isolated.
func TestTwoSitesSurviveTheLossOfTheSmallerOne(t *testing.T) {
	parallelIfShort(t)
	l := lab.Start(t, lab.Topology{Nodes: []int{2, 1}, Link: lab.RoundTrip(betweenCities)})
	wantVoters(t, l, 3)
	larger, smaller := l.Sites[0], l.Sites[1]
	wantStatus(t, l, "a warning about the larger site", func(s admin.Status) error {
		return wantWarnings(s, "2 of 3 voters are in site "+larger.Name)
	})
	smaller.Kill()
	wantStatus(t, l, "a quorum in the larger site, which is not isolated", func(s admin.Status) error {
		state := map[string]admin.SiteState{}
		for _, site := range s.Sites {
			state[site.Name] = site.State
		}
		switch {
		case !s.Raft.Quorum || s.Raft.Leader == nil || s.Healthy:
			return fmt.Errorf("healthy %v, raft %+v", s.Healthy, s.Raft)
		case state[larger.Name] != admin.SiteHealthy || state[smaller.Name] != admin.SiteDown:
			return fmt.Errorf("sites %v", state)
		}
		return wantWarnings(s, "2 of 3 voters answer, and all of them are needed")
	})
	wantChange(t, l)
	smaller.Start()
	l.WaitHealthy(within(returns))
	larger.Nodes[1].Kill()
	wantChange(t, l)
}

// Removing the third site keeps three voters, two of them in the primary's site.
func TestRemovingTheThirdSiteKeepsThreeVoters(t *testing.T) {
	parallelIfShort(t)
	l := lab.Start(t, lab.Topology{Nodes: []int{2, 1, 1}, Link: lab.RoundTrip(betweenCities)})
	wantVoters(t, l, 3)
	first, gone := l.Sites[0].Nodes[0], l.Sites[2]
	gone.Kill()
	l.WaitFor(within(20*time.Second), gone.Name+" to be removed", func(ctx context.Context) error {
		return removeNode(ctx, first, gone.Nodes[0].Name)
	})
	if err := first.ApplyConfig(t.Context(), l.ConfigFor(l.Sites[:2]...)); err != nil {
		t.Fatal(err)
	}
	wantStatus(t, l, "three voters, two of them in the primary's site", func(s admin.Status) error {
		votes := map[string]int{}
		for _, n := range s.Nodes {
			if n.Voter != nil && *n.Voter {
				votes[n.Site]++
			}
		}
		if s.Raft.Voters == nil || *s.Raft.Voters != 3 || votes[l.Sites[0].Name] != 2 || votes[l.Sites[1].Name] != 1 || s.Primary.Site != l.Sites[0].Name {
			return fmt.Errorf("voters %v in %v, primary %+v", s.Raft.Voters, votes, s.Primary)
		}
		if !s.Healthy {
			return fmt.Errorf("reasons %q", s.Reasons)
		}
		return wantWarnings(s, "2 of 3 voters are in site "+l.Sites[0].Name)
	})
	l.Sites[1].Kill()
	wantChange(t, l)
}

// wantStatus waits until every running node's status is as wanted.
func wantStatus(t *testing.T, l *lab.Lab, what string, want func(admin.Status) error) {
	t.Helper()
	took := l.WaitFor(within(20*time.Second), what, func(ctx context.Context) error {
		for _, n := range l.Running() {
			s, err := n.Status(ctx)
			if err != nil {
				return err
			}
			if err := want(s); err != nil {
				return fmt.Errorf("%s: %w", n.Name, err)
			}
		}
		return nil
	})
	t.Logf("%s after %v", what, took)
}

// wantWarnings wants one warning with a text in it, or none.
func wantWarnings(s admin.Status, text string) error {
	if text == "" && len(s.Warnings) > 0 || text != "" && (len(s.Warnings) != 1 || !strings.Contains(s.Warnings[0], text)) {
		return fmt.Errorf("warnings %q", s.Warnings)
	}
	return nil
}

// wantChange changes the configuration, which needs a quorum.
func wantChange(t *testing.T, l *lab.Lab) {
	t.Helper()
	took := l.WaitFor(within(20*time.Second), "a change of the configuration", func(ctx context.Context) error {
		n := l.Running()[0]
		text, err := n.ConfigText(ctx)
		if err != nil {
			return err
		}
		return n.ApplyConfig(ctx, text+"# changed\n")
	})
	t.Logf("the configuration was changed after %v", took)
}

func leaderNode(t *testing.T, l *lab.Lab) *lab.Node {
	t.Helper()
	var leader *lab.Node
	l.WaitFor(within(20*time.Second), "a leader", func(ctx context.Context) error {
		s, err := l.Running()[0].Status(ctx)
		if err != nil {
			return err
		}
		for _, n := range l.Nodes() {
			if s.Raft.Leader != nil && n.Name == *s.Raft.Leader {
				leader = n
				return nil
			}
		}
		return errors.New("no leader is shown")
	})
	return leader
}

// removeNode asks a node to remove another one that does not run.
func removeNode(ctx context.Context, by *lab.Node, name string) error {
	resp, text, err := askNode(ctx, by, http.MethodDelete, by.AdminURL()+"/admin/v1/nodes/"+name+"?author=lab", "", "")
	if err == nil && resp.StatusCode != http.StatusNoContent && resp.StatusCode != http.StatusNotFound { // 404: an earlier try has removed it
		err = fmt.Errorf("removing %s was answered %s: %s", name, resp.Status, text)
	}
	return err
}
