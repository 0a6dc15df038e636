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
	// A leader that stops hands over: each such change may cost a part of a lease.
	if most := within(time.Second); idle > most {
		t.Errorf("no node acted as primary for %v, want %v at most", idle, most)
	}
	l.WaitHealthy(within(returns))
}

// A node is killed and restarted. As soon as it says that the cluster is healthy, two
// other nodes are killed. The remaining four of six nodes have a quorum of the five
// voters, and soon a leader whose entries the restarted node gets.
func TestTwoKillsRightAfterARestart(t *testing.T) {
	parallelIfShort(t)
	l := lab.Start(t, lab.Topology{Nodes: []int{2, 2, 2}, Link: lab.RoundTrip(betweenCities)})
	wantVoters(t, l, 5)
	trials := 1
	if full() {
		trials = 5
	}
	for trial := range trials {
		restarted, others := l.Sites[2].Nodes[0], []*lab.Node{l.Sites[0].Nodes[trial%2], l.Sites[1].Nodes[trial%2]}
		restarted.Kill()
		restarted.Start()
		t.Logf("%s restarted: healthy after %v", restarted.Name, healthyAt(l, restarted))
		for _, n := range others {
			n.Kill()
		}
		killed := time.Now()
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
				if n == restarted && *status.Raft.CommitIndex < before+4 {
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
}

// healthyAt waits until a node says that the cluster is healthy.
func healthyAt(l *lab.Lab, n *lab.Node) time.Duration {
	return l.WaitFor(within(returns), n.Name+" to be healthy", func(ctx context.Context) error {
		status, err := n.Status(ctx)
		if err == nil && !status.Healthy {
			err = fmt.Errorf("it says: %s", strings.Join(status.Reasons, "; "))
		}
		return err
	})
}
