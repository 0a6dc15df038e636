package operate

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/node/admin"
)

// What a peer says of itself, and traffic that does not go through, is in the status of
// every node that hears the peer. The observer is a-1.
func TestStatusSaysWhatPeersSay(t *testing.T) {
	const s = time.Second
	own := func(v *view, node string, kind cluster.Traffic, dead time.Duration) {
		v.health.Blocked = append(v.health.Blocked, cluster.Blocked{Node: node, Kind: kind, For: dead})
	}
	says := func(v *view, peer, node string, kind cluster.Traffic, dead time.Duration) {
		changePeer(v, peer, func(p *cluster.PeerView) {
			p.Blocked = append(p.Blocked, cluster.Blocked{Node: node, Kind: kind, For: dead})
		})
	}
	large := func(pairs string) string {
		return "requests of 4 KiB are not answered between " + pairs + ": although pings are: forwarded requests fail too; check the MTU and the firewalls of the path"
	}
	for _, tc := range []struct {
		name     string
		change   func(*view)
		reasons  []string
		degraded []string // sites
	}{
		{"nothing is wrong", func(*view) {}, nil, nil},
		{
			"a peer without a lease", func(v *view) {
				changePeer(v, "c-1", func(p *cluster.PeerView) { p.Leaseless = 2500 * time.Millisecond })
			},
			[]string{"node c-1 says that it has no quorum: it can't act as primary, start jobs or change anything"},
			[]string{"c"},
		},
		{
			"a peer that has held no lease since its start", func(v *view) { changePeer(v, "c-1", func(p *cluster.PeerView) { p.Cold = true }) },
			[]string{"node c-1 says that it has no quorum: it can't act as primary, start jobs or change anything"},
			[]string{"c"},
		},
		{
			"a peer whose lease ran out in an election", func(v *view) {
				changePeer(v, "c-1", func(p *cluster.PeerView) { p.LeaseLeft, p.Leaseless = -p.Ago, 2*s })
			}, nil, nil,
		},
		{
			"a peer's own troubles", func(v *view) {
				changePeer(v, "b-1", func(p *cluster.PeerView) { p.Problems = []string{"its disk has 9 MiB left", "it is tired"} })
			},
			[]string{"node b-1: its disk has 9 MiB left", "node b-1: it is tired"},
			[]string{"b"},
		},
		{
			"the troubles of a peer that is silent: its site is down", func(v *view) {
				silence(v, "c-1", time.Minute)
				changePeer(v, "c-1", func(p *cluster.PeerView) { p.Problems, p.Leaseless = []string{"it is tired"}, time.Minute })
			},
			[]string{"site c is down: last heard 1m0s ago"},
			nil,
		},
		{
			"large packets are lost around c", func(v *view) {
				own(v, "c-1", cluster.TrafficLarge, 5*s)
				says(v, "b-1", "c-1", cluster.TrafficLarge, 5*s)
				says(v, "c-1", "a-1", cluster.TrafficLarge, 4*s)
				says(v, "c-1", "b-1", cluster.TrafficLarge, 6*s)
			},
			[]string{large("a-1 and c-1 (for 5s), b-1 and c-1 (for 6.1s)")},
			[]string{"c"},
		},
		{
			"only a peer reports it", func(v *view) { says(v, "c-1", "a-1", cluster.TrafficLarge, 5*s) },
			[]string{large("a-1 and c-1 (for 5.1s)")},
			nil, // a and c each have another site with which it works
		},
		{
			"UDP is blocked between two sites", func(v *view) { own(v, "b-1", cluster.TrafficGossip, 5*s) },
			[]string{"UDP packets are not answered between a-1 and b-1 (for 5s): gossip uses TCP instead and learns of changes later; check the firewalls of the gossip port"},
			nil,
		},
		{
			"replication does not get through", func(v *view) { says(v, "b-1", "c-1", cluster.TrafficReplication, 5*s) },
			[]string{"replication does not get through between b-1 and c-1 (for 5.1s): copies of jobs fall behind"},
			nil,
		},
		{
			"two peers don't hear each other", func(v *view) {
				changePeer(v, "b-1", func(p *cluster.PeerView) { p.HeardBy["c-1"] = 3 * s })
				changePeer(v, "c-1", func(p *cluster.PeerView) { p.HeardBy["b-1"] = 4 * s })
			},
			[]string{"pings are not answered between b-1 and c-1 (for 4s): although other nodes hear both"},
			nil,
		},
		{
			"a peer that hears nobody", func(v *view) {
				changePeer(v, "c-1", func(p *cluster.PeerView) { p.HeardBy = map[string]time.Duration{} })
			},
			[]string{"pings are not answered between a-1 and c-1 (for 59m59.9s), b-1 and c-1 (for 59m59.9s): although other nodes hear both"},
			[]string{"c"},
		},
		{
			"a peer that has just started has heard nobody yet", func(v *view) {
				changePeer(v, "c-1", func(p *cluster.PeerView) { p.HeardBy, p.HeardFor = map[string]time.Duration{}, s })
			}, nil, nil,
		},
		{
			"a peer that has just returned is not heard by others yet", func(v *view) {
				changePeer(v, "c-1", func(p *cluster.PeerView) { p.HeardFor = s })
				changePeer(v, "b-1", func(p *cluster.PeerView) { p.HeardBy["c-1"] = time.Minute })
			}, nil, nil,
		},
		{
			"traffic with a node that is not heard", func(v *view) {
				silence(v, "c-1", time.Minute)
				own(v, "c-1", cluster.TrafficLarge, time.Minute)
				says(v, "b-1", "c-1", cluster.TrafficLarge, time.Minute)
			},
			[]string{"site c is down: last heard 1m0s ago"},
			nil,
		},
		{
			"many pairs", func(v *view) {
				for i := range 6 {
					name := fmt.Sprintf("c-%d", i+2)
					v.state.Nodes[name] = agreed.Node{Name: name, Site: "c"}
					v.peers[name] = cluster.PeerView{
						Name: name, Site: "c", Heard: true, HeardFor: time.Hour,
						HeardBy: map[string]time.Duration{"a-1": 0, "b-1": 0, "c-1": 0, "c-2": 0, "c-3": 0, "c-4": 0, "c-5": 0, "c-6": 0, "c-7": 0},
					}
					own(v, name, cluster.TrafficLarge, 5*s)
				}
				for _, p := range v.peers {
					for other := range v.peers {
						p.HeardBy[other] = 0
					}
				}
			},
			[]string{large("a-1 and c-2 (for 5s), a-1 and c-3 (for 5s), a-1 and c-4 (for 5s), a-1 and c-5 (for 5s) and 2 more pairs of nodes")},
			nil,
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			v := healthyView(t)
			tc.change(&v)
			got := describe(v)
			if got.Healthy != (len(tc.reasons) == 0) || !slices.Equal(got.Reasons, tc.reasons) && len(tc.reasons)+len(got.Reasons) > 0 {
				t.Errorf("healthy %v, reasons\n%s\nwant\n%s", got.Healthy, strings.Join(got.Reasons, "\n"), strings.Join(tc.reasons, "\n"))
			}
			for _, site := range got.Sites {
				degraded := site.State == admin.SiteDegraded
				if degraded != slices.Contains(tc.degraded, site.Name) {
					t.Errorf("site %s is %s", site.Name, site.State)
				}
			}
		})
	}
}

// Without a quorum of its own a node does not repeat that of each peer.
func TestStatusWithoutQuorumSaysItOnce(t *testing.T) {
	v := healthyView(t)
	v.raft.Quorum = false
	for name := range v.peers {
		changePeer(&v, name, func(p *cluster.PeerView) { p.Leaseless = time.Minute })
	}
	if got := describe(v); len(got.Reasons) != 1 || !strings.HasPrefix(got.Reasons[0], "no quorum") {
		t.Errorf("reasons %q", got.Reasons)
	}
}
