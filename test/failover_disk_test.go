//go:build linux

package test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/dsnode/dsnode/node"
	"github.com/dsnode/dsnode/node/admin"
	"github.com/dsnode/dsnode/test/lab"
)

// The Raft leader's disk hangs while its process and its network work: it goes on
// sending heartbeats, so only its watchdog can find the fault. Another node leads, and
// another site is the primary, within 15 seconds.
func TestFailoverWhenLeadersDiskHangs(t *testing.T) {
	fullOnly(t, "a node exits only after its disk has hung for ten seconds")
	for _, nodes := range [][]int{{1, 1, 1}, {2, 2, 1}} {
		t.Run(shape(nodes), func(t *testing.T) { diskHangs(t, nodes) })
	}
}

func diskHangs(t *testing.T, nodes []int) {
	disk := lab.NewDisk(t)
	defer disk.Resume()
	s := begin(t, lab.Topology{Nodes: nodes, Node: func(c *node.Config) {
		if c.Name == "shanghai-a-1" {
			c.DataDir = disk.Dir()
		}
	}})
	old, epoch, leader := s.primary()
	affected := old.Nodes[0]
	if affected.Name != "shanghai-a-1" || leader != affected.Name {
		t.Fatalf("%s leads and %s is the primary; the test needs shanghai-a-1 for both", leader, old.Name)
	}
	fault := time.Now()
	disk.Hang()
	s.audit.Unhealthy()
	led := s.lab.WaitFor(within(stuck), "another leader", func(ctx context.Context) error {
		for _, n := range s.others(old) {
			status, err := n.Status(ctx)
			if err != nil {
				return err
			}
			if status.Raft.Leader == nil || *status.Raft.Leader == affected.Name {
				return fmt.Errorf("%s names %v", n.Name, status.Raft.Leader)
			}
		}
		return nil
	})
	t.Logf("another node leads %v after the disk of %s hung", led, affected.Name)
	after := epoch
	if len(old.Nodes) == 1 {
		c := s.awaitChange(fault, epoch+1, within(stuck), s.others(old))
		t.Logf("the primary: %s", c)
		if c.known > within(stuck) {
			t.Errorf("replaced after %v, want %v at most", c.known, within(stuck))
		}
		after++
	}
	s.continueLoad()
	s.lab.WaitFor(within(stuck), "the node with the disk that hangs to be shown as not alive", func(ctx context.Context) error {
		for _, n := range s.others(old) {
			status, err := n.Status(ctx)
			if err != nil {
				return err
			}
			for _, seen := range status.Nodes {
				if seen.Name == affected.Name && seen.State == admin.NodeAlive {
					return fmt.Errorf("%s shows %s as alive", n.Name, affected.Name)
				}
			}
		}
		return nil
	})
	if site, now, _ := s.primaryBy(s.others(old)[0]); now != after {
		// A site with a second node that works keeps the role.
		t.Errorf("%s is the primary in epoch %d, want epoch %d", site.Name, now, after)
	}
	s.audit.Heal()
	disk.Resume()
	s.lab.WaitFor(within(returns), "the process with the disk that hung to end", func(context.Context) error {
		if affected.Running() {
			return fmt.Errorf("%s still runs", affected.Name)
		}
		return nil
	})
	affected.Start()
	back := s.lab.WaitHealthy(within(returns))
	if site, now, _ := s.primary(); now != after {
		t.Errorf("%s is the primary in epoch %d after the restart, want epoch %d", site.Name, now, after)
	}
	t.Logf("healthy %v after %s restarted with a disk that works", back, affected.Name)
	s.end(old)
}

// The disk of the only node of a switchover's target hangs. The switchover is refused or
// rolled back, at once and when the statuses show the fault, and asked of each site. The old
// primary goes on or acts again within a second, leadership stays with it, and no process
// ends. When the disk works again, the switchover succeeds.
func TestFailoverToASiteWhoseDiskHangs(t *testing.T) {
	disk := lab.NewDisk(t)
	defer disk.Resume()
	s := begin(t, lab.Topology{Node: func(c *node.Config) {
		if c.Name == "shanghai-b-1" {
			c.DataDir = disk.Dir()
		}
	}})
	old, epoch, leader := s.primary()
	target := s.lab.Sites[1]
	if old != s.lab.Sites[0] || leader != old.Nodes[0].Name {
		t.Fatalf("%s is the primary and %s leads; the test needs %s for both", old.Name, leader, s.lab.Sites[0].Name)
	}
	pids := map[string]int{}
	for _, n := range s.lab.Nodes() {
		pids[n.Name] = n.PID()
	}
	disk.Hang()
	hung := time.Now()
	s.audit.Unhealthy()
	refused := func(asked *lab.Node) {
		t.Helper()
		begun := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		result, err := asked.Switchover(ctx, target.Name)
		var r *lab.Refused
		if !errors.As(err, &r) || (r.Code != "precheck_failed" && r.Code != "rolled_back") {
			t.Errorf("asked at %s, %v after the disk hung: %+v, %v", asked.Name, begun.Sub(hung), result, err)
			return
		}
		t.Logf("asked at %s, %v after the disk hung: refused after %v: %v", asked.Name, begun.Sub(hung).Round(time.Millisecond), time.Since(begun).Round(time.Millisecond), r)
	}
	refused(old.Nodes[0])
	refused(s.lab.Sites[2].Nodes[0])
	s.lab.WaitFor(within(5*time.Second), "the plan to name the node whose disk hangs", func(ctx context.Context) error {
		plan, err := old.Nodes[0].SwitchoverPlan(ctx, target.Name)
		if err != nil {
			return err
		}
		for _, check := range plan.Checks {
			if check.Name == "target_follows" && !check.OK {
				return nil
			}
		}
		return fmt.Errorf("plan %+v", plan)
	})
	refused(old.Nodes[0])
	s.audit.Heal()
	disk.Resume()
	s.lab.WaitHealthy(within(returns))
	if site, now, led := s.primary(); site != old || now != epoch || led != leader {
		t.Errorf("%s is the primary in epoch %d and %s leads, want %s, %d and %s", site.Name, now, led, old.Name, epoch, leader)
	}
	for _, n := range s.lab.Nodes() {
		if n.PID() != pids[n.Name] || !n.Running() {
			t.Errorf("the process of %s has ended", n.Name)
		}
	}
	gap := s.role.Gap(old)
	if t.Logf("%s was not seen to act for %v at most", old.Name, gap); gap > within(time.Second) {
		t.Errorf("%s did not act for %v", old.Name, gap)
	}
	s.lab.WaitFor(within(returns), "the plan to allow the switchover", func(ctx context.Context) error {
		plan, err := old.Nodes[0].SwitchoverPlan(ctx, target.Name)
		if err == nil && !plan.OK {
			err = fmt.Errorf("plan %+v", plan)
		}
		return err
	})
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if result, err := old.Nodes[0].Switchover(ctx, target.Name); err != nil || !result.LeaderMoved {
		t.Errorf("with a disk that works: %+v, %v", result, err)
	}
	s.continueLoad()
	s.end()
}
