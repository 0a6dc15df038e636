//go:build linux

package test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/dsnode/dsnode/test/lab"
)

// An operator restarts all nodes one by one, and goes on as soon as the restarted node
// says that the cluster is healthy. Some node acts as primary nearly all the time.
func TestRollingRestartByStatusKeepsTheRole(t *testing.T) {
	parallelIfShort(t)
	l := lab.Start(t, lab.Topology{Nodes: []int{2, 2, 1}, Link: lab.RoundTrip(betweenCities)})
	wantVoters(t, l, 5)
	role := l.WatchRole(10 * time.Millisecond)
	l.WaitFor(within(replaces), "a node to act as primary", func(context.Context) error {
		if !role.ActsSince(time.Time{}) {
			return fmt.Errorf("none acts")
		}
		return nil
	})
	begun := time.Now()
	for _, n := range l.Nodes() {
		n.Terminate(25 * time.Second)
		n.Start()
		took := healthyAt(l, n)
		t.Logf("%s restarted: healthy after %v", n.Name, took)
	}
	all := time.Since(begun)
	idle := all - role.Acted(begun, begun.Add(all))
	t.Logf("no node acted as primary for %v of %v, %.1f %%", idle.Round(time.Millisecond), all.Round(time.Millisecond), 100*idle.Seconds()/all.Seconds())
	if idle > within(planned) {
		t.Errorf("no node acted as primary for %v, want %v at most", idle, within(planned))
	}
	l.WaitHealthy(within(returns))
}

// Both nodes of a site are away until their votes are gone, and return. As soon as one of
// them says that the cluster is healthy, a node of each other site is killed. The
// remaining four of six nodes have a quorum, and soon a leader whose entries they get.
func TestTwoKillsRightAfterAReturn(t *testing.T) {
	fullOnly(t, "a voter is demoted after a minute only")
	l := lab.Start(t, lab.Topology{Nodes: []int{2, 2, 2}, Link: lab.RoundTrip(betweenCities)})
	wantVoters(t, l, 5)
	away := l.Sites[2]
	away.Kill()
	l.WaitFor(2*time.Minute, "three voters", func(ctx context.Context) error {
		status, err := l.Sites[0].Nodes[0].Status(ctx)
		if err == nil && (status.Raft.Voters == nil || *status.Raft.Voters != 3) {
			err = errors.New("not three")
		}
		return err
	})
	away.Start()
	returned, others := away.Nodes[0], []*lab.Node{l.Sites[0].Nodes[0], l.Sites[1].Nodes[0]}
	t.Logf("%s returned: healthy after %v", returned.Name, healthyWithin(l, returned, time.Minute))
	for _, n := range others {
		n.Kill()
	}
	killed := time.Now()
	// Leases of the time before have ended when entries are committed again.
	var before uint64
	l.WaitFor(within(replaces), "a quorum of the remaining nodes", func(ctx context.Context) error {
		for _, n := range l.Running() {
			status, err := n.Status(ctx)
			switch {
			case err != nil:
				return err
			case !status.Raft.Quorum || status.Raft.Leader == nil || status.Raft.CommitIndex == nil:
				return fmt.Errorf("%s: quorum %v, leader %v", n.Name, status.Raft.Quorum, status.Raft.Leader)
			case *status.Raft.Leader == others[0].Name || *status.Raft.Leader == others[1].Name:
				return fmt.Errorf("%s names %s, which was killed", n.Name, *status.Raft.Leader)
			case before == 0:
				before = *status.Raft.CommitIndex
			}
			if n == returned && *status.Raft.CommitIndex < before+4 {
				return fmt.Errorf("%s has entry %d, there was %d already", n.Name, *status.Raft.CommitIndex, before)
			}
		}
		return nil
	})
	t.Logf("%s and %s killed: the others commit after %v", others[0].Name, others[1].Name, time.Since(killed))
	for _, n := range others {
		n.Start()
	}
	l.WaitHealthy(within(returns))
}

// healthyAt waits until a restarted node says that the cluster is healthy.
func healthyAt(l *lab.Lab, n *lab.Node) time.Duration { return healthyWithin(l, n, within(returns)) }

func healthyWithin(l *lab.Lab, n *lab.Node, limit time.Duration) time.Duration {
	return l.WaitFor(limit, n.Name+" to be healthy", func(ctx context.Context) error {
		status, err := n.Status(ctx)
		if err == nil && !status.Healthy {
			err = fmt.Errorf("it says: %s", strings.Join(status.Reasons, "; "))
		}
		return err
	})
}
