//go:build linux

package test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/dsnode/dsnode/node"
	"github.com/dsnode/dsnode/node/admin"
	"github.com/dsnode/dsnode/test/lab"
)

// slowWindow is how long a site must act as primary after it acts again.
func slowWindow() time.Duration {
	if full() {
		return 30 * time.Second
	}
	return 12 * time.Second
}

// The Raft leader's disk works, but allows only so many writes per second, while jobs are
// submitted: too few for a leader. Another node leads, and some site acts as primary, as
// soon as after a kill, and from then on nearly all the time. The status names the disk.
// When the disk is fast again, the cluster is healthy within a minute.
func TestFailoverWhenLeadersDiskIsSlow(t *testing.T) {
	parallelIfShort(t)
	limits := []int{30}
	if full() {
		limits = append(limits, 60)
	}
	for _, writes := range limits {
		t.Run(fmt.Sprintf("%d writes per second", writes), func(t *testing.T) { diskIsSlow(t, writes) })
	}
}

func diskIsSlow(t *testing.T, writes int) {
	const affected = "shanghai-a-1"
	disk := lab.NewDisk(t)
	defer disk.Unthrottle()
	s := begin(t, lab.Topology{Node: func(c *node.Config) {
		if c.Name == affected {
			c.DataDir = disk.Dir()
		}
	}})
	if old, _, leader := s.primary(); leader != affected || old.Name != "shanghai-a" {
		t.Fatalf("%s leads and %s is the primary; the test needs %s for both", leader, old.Name, affected)
	}
	s.lab.StartJobs(lab.JobLoad{Clients: 4, Durabilities: []string{"two-sites"}, Every: 50 * time.Millisecond})
	fault := time.Now()
	disk.Throttle(writes)
	// Raft on the slow disk learns of the new leader later: it writes the term first.
	otherLeads := func(ctx context.Context) error {
		return s.allNodes(ctx, func(status admin.Status) error {
			switch l := status.Raft.Leader; {
			case l == nil && status.Observer.Node != affected:
				return fmt.Errorf("no leader is known")
			case l != nil && *l == affected:
				return fmt.Errorf("%s leads, and its disk is slow", affected)
			}
			return nil
		})
	}
	s.lab.WaitFor(within(replaces), "another leader", otherLeads)
	led := time.Now()
	t.Logf("another node leads after %v", led.Sub(fault))
	// The leases of the old leader's last ticks have ended by then, and a site acts.
	s.lab.WaitFor(within(replaces), "a site to act as primary", func(context.Context) error {
		if !s.role.ActsSince(led) {
			return fmt.Errorf("no site acts")
		}
		return nil
	})
	acts := time.Now()
	t.Logf("a site acts as primary under the new leader after %v", acts.Sub(fault))
	if idle := acts.Sub(fault) - s.role.Acted(fault, acts); idle > within(replaces) {
		t.Errorf("no site acted as primary for %v", idle)
	}
	s.lab.WaitFor(within(replaces), "the statuses to name the disk", func(ctx context.Context) error {
		return s.allNodes(ctx, func(status admin.Status) error {
			for _, n := range status.Nodes {
				if named := n.DiskSlowSince != nil && n.DiskWriteSeconds != nil; named != (n.Name == affected) {
					return fmt.Errorf("the disk of %s: slow since %v, a write takes %v", n.Name, n.DiskSlowSince, n.DiskWriteSeconds)
				}
			}
			if all := strings.Join(status.Reasons, "; "); !strings.Contains(all, "node "+affected+": its disk has been slow since") {
				return fmt.Errorf("the reasons are %q", all)
			}
			return nil
		})
	})
	end := acts.Add(slowWindow())
	s.lab.WaitFor(2*slowWindow(), "the time to be over in which a site must act", func(ctx context.Context) error {
		if left := time.Until(end); left > 0 {
			return fmt.Errorf("%v are left", left)
		}
		return otherLeads(ctx)
	})
	share := float64(s.role.Acted(acts, end)) / float64(slowWindow())
	t.Logf("a site acted as primary for %.1f %% of the %v after that", 100*share, slowWindow())
	if least := 1 - 0.05*float64(within(time.Second)/time.Second); share < least {
		t.Errorf("a site acted as primary for %.1f %% of the time, want %.0f %% at least", 100*share, 100*least)
	}
	disk.Unthrottle()
	t.Logf("healthy %v after the disk became fast", s.lab.WaitHealthy(time.Minute))
	s.continueLoad()
	s.end()
}

// allNodes checks the status of every running node.
func (s *scenario) allNodes(ctx context.Context, check func(admin.Status) error) error {
	for _, n := range s.lab.Running() {
		status, err := n.Status(ctx)
		if err == nil {
			err = check(status)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", n.Name, err)
		}
	}
	return nil
}
