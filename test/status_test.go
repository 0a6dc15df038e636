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

// healsWithin is until all nodes are healthy again after a fault that no failover needs.
const healsWithin = 15 * time.Second

// wantReasons waits until the reasons in every node's status have all these words. The
// audit fails the test if a status says healthy for too long.
func wantReasons(t *testing.T, l *lab.Lab, what string, words ...string) {
	t.Helper()
	took := l.WaitFor(within(5*time.Second), "every node to say that "+what, func(ctx context.Context) error {
		for _, n := range l.Nodes() {
			status, err := n.Status(ctx)
			if err != nil {
				return err
			}
			all := strings.Join(status.Reasons, "\n")
			for _, w := range words {
				if !strings.Contains(all, w) {
					return fmt.Errorf("%s does not say %q: %q", n.Name, w, all)
				}
			}
		}
		return nil
	})
	t.Logf("all nodes say after %v that %s", took, what)
}

// siteStates are the states of a site at every node.
func siteStates(t *testing.T, l *lab.Lab, site string) map[string]admin.SiteState {
	t.Helper()
	states := map[string]admin.SiteState{}
	for _, n := range l.Nodes() {
		status, err := n.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range status.Sites {
			if s.Name == site {
				states[n.Name] = s.State
			}
		}
	}
	return states
}

// lookOn lets the audit read statuses while a fault lasts.
func lookOn(l *lab.Lab, d time.Duration) {
	begun := time.Now()
	l.WaitFor(2*d, "the fault to last", func(context.Context) error {
		if time.Since(begun) < d {
			return fmt.Errorf("it has lasted for %v", time.Since(begun))
		}
		return nil
	})
}

// Around a site all packets of more than 1,100 bytes are dropped: pings, heartbeats and
// small entries pass, and everything larger waits. No node says healthy while that lasts,
// and all do soon after it.
func TestStatusInAnMTUBlackHole(t *testing.T) {
	parallelIfShort(t)
	l := lab.Start(t, lab.Topology{Link: lab.RoundTrip(30 * time.Millisecond)})
	wantVoters(t, l, 3)
	audit, site := l.StartAudit(), l.Sites[2]
	l.Net.Shrink(site.Index, 1100)
	audit.Unhealthy()
	wantReasons(t, l, "large requests get no answer", "requests of 4 KiB are not answered between", "beijing-1 and shanghai-a-1 (for", "beijing-1 and shanghai-b-1 (for")
	for by, state := range siteStates(t, l, site.Name) {
		if state == admin.SiteHealthy {
			t.Errorf("%s shows %s as %s", by, site.Name, state)
		}
	}
	lookOn(l, 8*time.Second)
	audit.Heal()
	l.Net.Shrink(site.Index, 0)
	t.Logf("healthy %v after the fault", l.WaitHealthy(within(healsWithin)))
}

// A firewall drops UDP and lets TCP pass: gossip goes on over TCP, and only the status and
// metrics can tell.
func TestStatusWithoutUDP(t *testing.T) {
	parallelIfShort(t)
	l := lab.Start(t, lab.Topology{Link: lab.RoundTrip(30 * time.Millisecond)})
	wantVoters(t, l, 3)
	audit, site := l.StartAudit(), l.Sites[2]
	l.Net.BlockUDP(site.Index, true)
	audit.Unhealthy()
	wantReasons(t, l, "UDP is blocked", "UDP packets are not answered between", "beijing-1 and shanghai-a-1 (for", "beijing-1 and shanghai-b-1 (for")
	m, err := site.Nodes[0].Metrics(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	gossip, large := m[`dsnode_peer_traffic_age_seconds{kind="gossip",peer="shanghai-a-1"}`], m[`dsnode_peer_traffic_age_seconds{kind="large",peer="shanghai-a-1"}`]
	if gossip < 4 || large == 0 || large > gossip {
		t.Errorf("metrics: %v s since an answer over UDP, %v s since a large one", gossip, large)
	}
	lookOn(l, 5*time.Second)
	audit.Heal()
	l.Net.BlockUDP(site.Index, false)
	t.Logf("healthy %v after the fault", l.WaitHealthy(within(healsWithin)))
}

// A node whose disk has less room than its reserve refuses jobs: every node says so.
func TestStatusOfADiskBelowItsReserve(t *testing.T) {
	parallelIfShort(t)
	disk := lab.NewDisk(t)
	l := lab.Start(t, lab.Topology{Node: func(c *node.Config) {
		if c.Name == "beijing-1" {
			c.DataDir = disk.Dir()
		}
	}})
	wantVoters(t, l, 3)
	audit := l.StartAudit()
	empty := disk.Fill(200 << 20)
	audit.Unhealthy()
	wantReasons(t, l, "the disk is short of room", "node beijing-1: its disk has", "less than its reserve of 256 MiB: it refuses new jobs")
	for by, state := range siteStates(t, l, "beijing") {
		if state != admin.SiteDegraded {
			t.Errorf("%s shows beijing as %s", by, state)
		}
	}
	lookOn(l, 3*time.Second)
	audit.Heal()
	empty()
	t.Logf("healthy %v after there was room again", l.WaitHealthy(within(healsWithin)))
}
