package operate

import (
	"strings"
	"testing"
	"time"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/node/admin"
)

const statusConfig = `version: 1
sites:
  a: {city: x, priority: 1}
  b: {city: x, priority: 2}
  c: {city: y, priority: 3}
upstreams:
  ua: {site: a, url: "http://127.0.0.1:1/v1"}
  ub: {site: b, url: "http://127.0.0.1:2/v1"}
models:
  m: {serve: [{upstream: ua}, {upstream: ub}]}
`

// well is a cluster of three sites as a-1 sees it when all is as it should be.
func well(t *testing.T) sight {
	t.Helper()
	cfg, err := config.Parse("cluster.yaml", []byte(statusConfig))
	if err != nil {
		t.Fatal(err)
	}
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	nodes := map[string]agreed.Node{}
	peers := map[string]cluster.PeerView{}
	raft := cluster.RaftView{Leader: "a-1", Leads: true, Term: 2, CommitIndex: 40, Quorum: true, Since: now.Add(-time.Hour), Ticked: true, TickAgo: 200 * time.Millisecond, Epoch: 3}
	for _, n := range []agreed.Node{{Name: "a-1", Site: "a"}, {Name: "b-1", Site: "b"}, {Name: "c-1", Site: "c"}} {
		n.RPC = n.Name + ":7957"
		nodes[n.Name] = n
		raft.Servers = append(raft.Servers, cluster.Server{Name: n.Name, Voter: true})
		if n.Name == "a-1" {
			continue
		}
		p := cluster.PeerView{Name: n.Name, Site: n.Site, Info: n, Heard: true, Ago: 100 * time.Millisecond}
		p.PID, p.HeardBy = 7, map[string]time.Duration{"a-1": 0}
		if n.Site == "b" {
			p.UpstreamsHealthy, p.UpstreamsTotal = 1, 1
		}
		peers[n.Name] = p
	}
	return sight{
		name: "a-1", site: "a", version: "1", now: now, patience: 2500 * time.Millisecond, started: now.Add(-time.Hour),
		state: &agreed.State{
			ClusterID: "c", Name: "test", Generation: agreed.Generation{Number: 1}, Nodes: nodes,
			Primary: agreed.Primary{Site: "a", Epoch: 3}, Parsed: cfg,
		},
		raft: raft, peers: peers, left: map[string]bool{},
		health: cluster.Health{UpstreamsHealthy: 1, UpstreamsTotal: 1},
	}
}

func change(v *sight, node string, f func(*cluster.PeerView)) {
	p := v.peers[node]
	f(&p)
	v.peers[node] = p
}

func TestStatusOfAWellClusterIsHealthy(t *testing.T) {
	s := describe(well(t))
	if !s.Healthy || len(s.Reasons) != 0 {
		t.Fatalf("healthy %v, reasons %q", s.Healthy, s.Reasons)
	}
	if *s.Raft.Leader != "a-1" || *s.Raft.LeaderSite != "a" || *s.Raft.Voters != 3 {
		t.Errorf("raft %+v", s.Raft)
	}
	roles := map[string]admin.Role{}
	for _, site := range s.Sites {
		roles[site.Name] = site.Role
	}
	if roles["a"] != "primary" || roles["b"] != "same-city" || roles["c"] != "remote" {
		t.Errorf("roles %v", roles)
	}
}

func TestStatusSaysWhatIsNotWell(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(*sight)
		site   string
		state  admin.SiteState
		node   string
		nodeIs admin.NodeState
		words  string
	}{
		{
			"a silent site is suspect first", func(v *sight) { change(v, "c-1", func(p *cluster.PeerView) { p.Ago = 3 * time.Second }) },
			"c", admin.SiteDown, "c-1", admin.NodeSuspect, "site c is down: last heard 3s ago",
		},
		{
			"then dead", func(v *sight) { change(v, "c-1", func(p *cluster.PeerView) { p.Ago = time.Minute }) },
			"c", admin.SiteDown, "c-1", admin.NodeDead, "site c is down: last heard 1m0s ago",
		},
		{"one that said goodbye has left", func(v *sight) {
			change(v, "c-1", func(p *cluster.PeerView) { p.Ago = 3 * time.Second })
			v.left["c-1"] = true
		}, "c", admin.SiteDown, "c-1", admin.NodeLeft, "site c is down"},
		{"one heard by a third is isolated", func(v *sight) {
			change(v, "c-1", func(p *cluster.PeerView) { p.Ago = time.Minute })
			change(v, "b-1", func(p *cluster.PeerView) { p.HeardBy["c-1"] = 100 * time.Millisecond })
		}, "c", admin.SiteIsolated, "c-1", admin.NodeDead, "site c is isolated"},
		{"hearing nobody, one is isolated oneself", func(v *sight) {
			for _, name := range []string{"b-1", "c-1"} {
				change(v, name, func(p *cluster.PeerView) { p.Ago = time.Minute })
			}
			v.raft.Quorum = false
		}, "a", admin.SiteIsolated, "a-1", admin.NodeAlive, "no quorum since"},
		{"just started, nothing is known", func(v *sight) {
			v.started = v.now.Add(-time.Second)
			change(v, "c-1", func(p *cluster.PeerView) { *p = cluster.PeerView{Name: "c-1", Site: "c", Info: p.Info} })
		}, "c", admin.SiteUnknown, "c-1", admin.NodeSuspect, "site c: not heard of yet"},
		{
			"a broken upstream elsewhere", func(v *sight) { change(v, "b-1", func(p *cluster.PeerView) { p.UpstreamsHealthy = 0 }) },
			"b", admin.SiteDegraded, "b-1", admin.NodeAlive, "site b: 0 of 1 upstreams are healthy",
		},
		{
			"a broken upstream here", func(v *sight) { v.health.UpstreamsHealthy = 0 },
			"a", admin.SiteDegraded, "a-1", admin.NodeAlive, "site a: 0 of 1 upstreams are healthy",
		},
		{
			"a draining peer", func(v *sight) { change(v, "b-1", func(p *cluster.PeerView) { p.Draining = true }) },
			"b", admin.SiteHealthy, "b-1", admin.NodeAlive, "node b-1 is draining",
		},
		{"a drained upstream", func(v *sight) {
			v.state.Drained = map[string]agreed.DrainedUpstream{"ub": {By: "ann"}}
			change(v, "b-1", func(p *cluster.PeerView) { p.UpstreamsHealthy, p.UpstreamsTotal = 0, 0 })
		}, "b", admin.SiteHealthy, "b-1", admin.NodeAlive, "upstream ub of site b is drained"},
		{
			"an epoch heard of, and not known", func(v *sight) { v.raft.Epoch = 4 },
			"a", admin.SiteHealthy, "a-1", admin.NodeAlive, "node a-1 has heard of epoch 4 and knows the primary of epoch 3 only",
		},
		{
			"a lease, but no entries since the start", func(v *sight) { v.raft.Ticked = false },
			"a", admin.SiteHealthy, "a-1", admin.NodeAlive, "since its start: what it says of the agreed state may be old",
		},
		{
			"a lease, but no entries", func(v *sight) { v.raft.TickAgo = 4 * time.Second },
			"a", admin.SiteHealthy, "a-1", admin.NodeAlive, "for 4s: what it says of the agreed state may be old",
		},
		{
			"three sites and one vote", func(v *sight) { v.raft.Servers = v.raft.Servers[:1] },
			"a", admin.SiteHealthy, "a-1", admin.NodeAlive, "1 of 3 voters are placed",
		},
		{
			"a peer that answers, and applies nothing", func(v *sight) { change(v, "b-1", func(p *cluster.PeerView) { p.Stuck = 3 * time.Second }) },
			"b", admin.SiteHealthy, "b-1", admin.NodeAlive, "node b-1 answers, but has not followed the agreed state for 3s",
		},
		{
			"a data key that can't be opened", func(v *sight) { v.keys = "wrong operator key" },
			"a", admin.SiteHealthy, "a-1", admin.NodeAlive, "node a-1: wrong operator key",
		},
		{
			"damaged journals", func(v *sight) { v.journals = "its journal lost records" },
			"a", admin.SiteHealthy, "a-1", admin.NodeAlive, "node a-1: its journal lost records",
		},
		{
			"a job table that is being rebuilt", func(v *sight) { v.table = "its job table is being rebuilt" },
			"a", admin.SiteHealthy, "a-1", admin.NodeAlive, "node a-1: its job table is being rebuilt",
		},
		{"a site nobody joined from", func(v *sight) {
			delete(v.state.Nodes, "c-1")
			delete(v.peers, "c-1")
		}, "c", admin.SiteUnknown, "", "", "site c: no node has joined yet"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			v := well(t)
			tc.change(&v)
			s := describe(v)
			if s.Healthy {
				t.Error("it says healthy")
			}
			if all := strings.Join(s.Reasons, "; "); !strings.Contains(all, tc.words) {
				t.Errorf("reasons %q, want %q among them", all, tc.words)
			}
			for _, site := range s.Sites {
				if site.Name == tc.site && site.State != tc.state {
					t.Errorf("site %s is %s, want %s", site.Name, site.State, tc.state)
				}
			}
			for _, n := range s.Nodes {
				if n.Name == tc.node && n.State != tc.nodeIs {
					t.Errorf("node %s is %s, want %s", n.Name, n.State, tc.nodeIs)
				}
			}
		})
	}
}

// What a person should know, and what makes nothing unhealthy.
func TestStatusNotes(t *testing.T) {
	v := well(t)
	home := "b"
	v.failback = &home
	v.state.Hold = &agreed.Hold{Reason: "new switches", By: "ann", At: v.now}
	v.state.LastFailover = &agreed.FailoverRecord{From: "b", To: "a", Kind: agreed.FailoverUnplanned, Epoch: 3}
	s := describe(v)
	if !s.Healthy || s.FailbackAvailable == nil || *s.FailbackAvailable != "b" || s.Hold == nil || s.Hold.By != "ann" || s.LastFailover.Acknowledged {
		t.Errorf("healthy %v, failback %v, hold %+v, last %+v", s.Healthy, s.FailbackAvailable, s.Hold, s.LastFailover)
	}
}

// What nobody told is null, never a zero.
func TestStatusOfTheUnknownIsNull(t *testing.T) {
	v := well(t)
	change(&v, "c-1", func(p *cluster.PeerView) { *p = cluster.PeerView{Name: "c-1", Site: "c", Info: p.Info} })
	v.raft.Quorum, v.raft.Since = false, time.Time{}
	s := describe(v)
	for _, n := range s.Nodes {
		if n.Name == "c-1" && (n.LastHeardSeconds != nil || n.PID != nil || n.Leader != nil) {
			t.Errorf("node never heard: %+v", n)
		}
	}
	for _, site := range s.Sites {
		if site.Name == "c" && (site.LastHeardSeconds != nil || site.UpstreamsHealthy != nil) {
			t.Errorf("site never heard: %+v", site)
		}
		if site.Replication.LagSeconds != nil || site.Replication.RecordsBehind != nil {
			t.Errorf("replication that nobody measures: %+v", site.Replication)
		}
	}
	if s.Raft.Leader != nil || s.Raft.QuorumSince != nil {
		t.Errorf("raft without any proof of a quorum: %+v", s.Raft)
	}
	if s.LastFailover != nil || s.Jobs != nil {
		t.Error("there was no failover, and there are no jobs")
	}

	fresh := describe(sight{name: "a-1", site: "a", state: &agreed.State{}, waiting: "waiting for dsnode bootstrap"})
	if fresh.Healthy || fresh.Primary != nil || fresh.Generation != nil || len(fresh.Reasons) != 1 {
		t.Errorf("a node without a cluster: %+v", fresh)
	}
}

func TestConfigurationThatCannotFollow(t *testing.T) {
	v := well(t)
	for _, tc := range []struct{ text, words string }{
		{strings.Replace(statusConfig, "version: 1\n", "version: 1\ntiming: {heartbeat: 1s}\n", 1), "timing.heartbeat"},
		{strings.Replace(statusConfig, "  c: {city: y, priority: 3}\n", "", 1), "site c still has node c-1"},
	} {
		next, err := config.Parse("cluster.yaml", []byte(tc.text))
		if err != nil {
			t.Fatal(err)
		}
		if err := mayFollow(v.state, next); err == nil || !strings.Contains(err.Error(), tc.words) {
			t.Errorf("%v, want %q", err, tc.words)
		}
	}
	if err := mayFollow(v.state, v.state.Parsed); err != nil {
		t.Errorf("the same configuration: %v", err)
	}
}
