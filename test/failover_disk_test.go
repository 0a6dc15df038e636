//go:build linux

package test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/dsnode/dsnode/node"
	"github.com/dsnode/dsnode/node/admin"
	"github.com/dsnode/dsnode/test/lab"
)

// The raft leader's disk hangs, while its process and its network are well: it
// goes on sending heartbeats, and only its own watchdog can tell. Another leads,
// and is the primary, within 15 seconds.
func TestFailoverWhenLeadersDiskHangs(t *testing.T) {
	fullOnly(t, "a disk is given ten seconds before its node ends")
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
	hurt := old.Nodes[0]
	if hurt.Name != "shanghai-a-1" || leader != hurt.Name {
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
			if status.Raft.Leader == nil || *status.Raft.Leader == hurt.Name {
				return fmt.Errorf("%s names %v", n.Name, status.Raft.Leader)
			}
		}
		return nil
	})
	t.Logf("another leads %v after the disk of %s hung", led, hurt.Name)
	after := epoch
	if len(old.Nodes) == 1 {
		c := s.awaitChange(fault, epoch+1, within(stuck), s.others(old))
		t.Logf("the primary follows: %s", c)
		if c.known > within(stuck) {
			t.Errorf("replaced after %v, want %v at most", c.known, within(stuck))
		}
		after++
	}
	s.goOn()
	s.lab.WaitFor(within(stuck), "the node with the stuck disk to fall silent", func(ctx context.Context) error {
		for _, n := range s.others(old) {
			status, err := n.Status(ctx)
			if err != nil {
				return err
			}
			for _, seen := range status.Nodes {
				if seen.Name == hurt.Name && seen.State == admin.NodeAlive {
					return fmt.Errorf("%s says that %s is alive", n.Name, hurt.Name)
				}
			}
		}
		return nil
	})
	if site, now, _ := s.primaryBy(s.others(old)[0]); now != after {
		// Where a second node of the site is well the site needs no successor.
		t.Errorf("%s is the primary in epoch %d, want epoch %d", site.Name, now, after)
	}
	s.audit.Heal()
	disk.Resume()
	s.lab.WaitFor(within(returns), "the process with the stuck disk to end", func(context.Context) error {
		if hurt.Running() {
			return fmt.Errorf("%s runs still", hurt.Name)
		}
		return nil
	})
	hurt.Start()
	back := s.lab.WaitHealthy(within(returns))
	if site, now, _ := s.primary(); now != after {
		t.Errorf("%s is the primary in epoch %d after the disk's return, want epoch %d", site.Name, now, after)
	}
	t.Logf("all well %v after %s restarted with a disk that works", back, hurt.Name)
	s.end(old)
}
