package operate

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/node/admin"
	"github.com/dsnode/dsnode/replication"
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

// healthyView is what a-1 sees of a healthy cluster with three sites.
func healthyView(t *testing.T) view {
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
		p.PID, p.HeardFor = 7, time.Hour
		p.HeardBy = map[string]time.Duration{"a-1": 0, "b-1": 100 * time.Millisecond, "c-1": 100 * time.Millisecond}
		if n.Site == "b" {
			p.UpstreamsHealthy, p.UpstreamsTotal = 1, 1
		}
		peers[n.Name] = p
	}
	return view{
		clusterName: "test", name: "a-1", site: "a", version: "1", now: now, patience: 2500 * time.Millisecond, started: now.Add(-time.Hour),
		state: &agreed.State{
			ClusterID: "c", Name: "test", Generation: agreed.Generation{Number: 1}, Nodes: nodes,
			Primary: agreed.Primary{Site: "a", Epoch: 3}, Parsed: cfg,
		},
		raft: raft, peers: peers, left: map[string]bool{},
		health: cluster.Health{UpstreamsHealthy: 1, UpstreamsTotal: 1}, slowWrite: 240 * time.Millisecond,
	}
}

func changePeer(v *view, node string, f func(*cluster.PeerView)) {
	p := v.peers[node]
	f(&p)
	v.peers[node] = p
}

// silence is that nobody has heard a node for a time.
func silence(v *view, node string, ago time.Duration) {
	for name := range v.peers {
		changePeer(v, name, func(p *cluster.PeerView) {
			if p.HeardBy[node] = ago; name == node {
				p.Ago = ago
			}
		})
	}
}

func TestStatusNamesNodesThatWait(t *testing.T) {
	v := healthyView(t)
	v.state.Waiting = []agreed.Applicant{{Name: "d-1", Site: "a", RPC: "d:7957", At: v.now}, {Name: "d-2", AdmittedAt: v.now}}
	s := describe(v)
	if all := strings.Join(s.Warnings, "; "); !s.Healthy || !strings.Contains(all, "dsnode node admit d-1 lets it") || strings.Contains(all, "d-2") {
		t.Errorf("healthy %v, warnings %q", s.Healthy, s.Warnings)
	}
}

func TestStatusOfAHealthyCluster(t *testing.T) {
	s := describe(healthyView(t))
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

func TestNodesThatLackJobsAreMarked(t *testing.T) {
	v := healthyView(t)
	changePeer(&v, "b-1", func(p *cluster.PeerView) { p.JobsMissing = "it is new" })
	changePeer(&v, "c-1", func(p *cluster.PeerView) { p.JobsMissing, p.Ago = "it was new", time.Minute })
	for _, n := range describe(v).Nodes {
		if want := map[string]string{"b-1": "it is new"}[n.Name]; n.JobsMissing != want {
			t.Errorf("%s: %q, want %q", n.Name, n.JobsMissing, want)
		}
	}
}

func TestStatusGivesReasons(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(*view)
		site   string
		state  admin.SiteState
		node   string
		nodeIs admin.NodeState
		reason string
	}{
		{
			"a silent site is suspect first", func(v *view) { silence(v, "c-1", 3*time.Second) },
			"c", admin.SiteDown, "c-1", admin.NodeSuspect, "site c is down: last heard 3s ago",
		},
		{
			"later it is dead", func(v *view) { silence(v, "c-1", time.Minute) },
			"c", admin.SiteDown, "c-1", admin.NodeDead, "site c is down: last heard 1m0s ago",
		},
		{"a node that left the gossip", func(v *view) {
			silence(v, "c-1", 3*time.Second)
			v.left["c-1"] = true
		}, "c", admin.SiteDown, "c-1", admin.NodeLeft, "site c is down"},
		{"a site that only a third site hears is isolated", func(v *view) {
			changePeer(v, "c-1", func(p *cluster.PeerView) { p.Ago = time.Minute })
		}, "c", admin.SiteIsolated, "c-1", admin.NodeDead, "site c is isolated"},
		{"a site that hears no other is isolated", func(v *view) {
			for _, name := range []string{"b-1", "c-1"} {
				changePeer(v, name, func(p *cluster.PeerView) { p.Ago = time.Minute })
			}
			v.raft.Quorum = false
		}, "a", admin.SiteIsolated, "a-1", admin.NodeAlive, "no quorum since"},
		{"unknown just after the start", func(v *view) {
			v.started = v.now.Add(-time.Second)
			silence(v, "c-1", time.Minute)
			changePeer(v, "c-1", func(p *cluster.PeerView) { *p = cluster.PeerView{Name: "c-1", Site: "c", Info: p.Info} })
		}, "c", admin.SiteUnknown, "c-1", admin.NodeSuspect, "site c: not heard yet"},
		{
			"a broken upstream elsewhere", func(v *view) { changePeer(v, "b-1", func(p *cluster.PeerView) { p.UpstreamsHealthy = 0 }) },
			"b", admin.SiteDegraded, "b-1", admin.NodeAlive, "site b: 0 of 1 upstreams are healthy",
		},
		{
			"a broken upstream here", func(v *view) { v.health.UpstreamsHealthy = 0 },
			"a", admin.SiteDegraded, "a-1", admin.NodeAlive, "site a: 0 of 1 upstreams are healthy",
		},
		{
			"a draining peer", func(v *view) { changePeer(v, "b-1", func(p *cluster.PeerView) { p.Draining = true }) },
			"b", admin.SiteHealthy, "b-1", admin.NodeAlive, "node b-1 is draining",
		},
		{"a drained upstream", func(v *view) {
			v.state.Drained = map[string]agreed.DrainedUpstream{"ub": {By: "ann"}}
			changePeer(v, "b-1", func(p *cluster.PeerView) { p.UpstreamsHealthy, p.UpstreamsTotal = 0, 0 })
		}, "b", admin.SiteHealthy, "b-1", admin.NodeAlive, "upstream ub of site b is drained"},
		{
			"a newer epoch than that of the copy", func(v *view) { v.raft.Epoch = 4 },
			"a", admin.SiteHealthy, "a-1", admin.NodeAlive, "node a-1 knows the primary of epoch 3, and epoch 4 has begun",
		},
		{
			"a node that has not caught up since its start", func(v *view) { v.starting = "its job table is not loaded yet" },
			"a", admin.SiteHealthy, "a-1", admin.NodeAlive, "node a-1 has just started: its job table is not loaded yet",
		},
		{
			"a peer that has not caught up since its start", func(v *view) { changePeer(v, "b-1", func(p *cluster.PeerView) { p.Starting = true }) },
			"b", admin.SiteHealthy, "b-1", admin.NodeAlive, "node b-1 has just started and has not caught up",
		},
		{
			"a lease, but no entries", func(v *view) { v.raft.TickAgo = 4 * time.Second },
			"a", admin.SiteHealthy, "a-1", admin.NodeAlive, "for 4s: its copy of the agreed state may be old",
		},
		{
			"three nodes and one voter", func(v *view) { v.raft.Servers = v.raft.Servers[:1] },
			"a", admin.SiteHealthy, "a-1", admin.NodeAlive, "1 of 3 voters are placed",
		},
		{
			"a peer that answers but applies no entries", func(v *view) { changePeer(v, "b-1", func(p *cluster.PeerView) { p.Stuck = 3 * time.Second }) },
			"b", admin.SiteDegraded, "b-1", admin.NodeAlive, "node b-1 answers, but has applied no raft entry for 3s: check the network from the leader a-1",
		},
		{
			"a peer with a slow disk", func(v *view) {
				changePeer(v, "b-1", func(p *cluster.PeerView) {
					p.Disk = cluster.DiskSpeed{Known: true, Write: 640 * time.Millisecond, SlowFor: 5 * time.Second}
				})
			},
			"b", admin.SiteHealthy, "b-1", admin.NodeAlive,
			"node b-1: its disk has been slow since 2026-01-02T03:04:00Z, a write of the raft log takes 640 ms, a raft leader needs less than 240 ms (another node leads meanwhile)",
		},
		{
			"the leader's disk is slow, like all", func(v *view) { v.disk.SlowFor = 5 * time.Second },
			"a", admin.SiteHealthy, "a-1", admin.NodeAlive,
			"node a-1: its disk has been slow since 2026-01-02T03:04:00Z, a raft leader needs less than 240 ms (it leads, and no voter is clearly faster)",
		},
		{
			"a data key that can't be opened", func(v *view) { v.keyProblem = "wrong operator key" },
			"a", admin.SiteDegraded, "a-1", admin.NodeAlive, "node a-1: wrong operator key",
		},
		{
			"damaged journals and a job table that is being rebuilt",
			func(v *view) {
				v.jobProblems, v.health.JobsMissing = []string{"its journal lost records"}, "its job table lacks jobs"
			},
			"a", admin.SiteDegraded, "a-1", admin.NodeAlive, "node a-1: its journal lost records; node a-1: its job table lacks jobs",
		},
		{
			"a peer that lacks jobs", func(v *view) {
				changePeer(v, "c-1", func(p *cluster.PeerView) { p.JobsMissing = "its job table lacks jobs" })
			},
			"c", admin.SiteDegraded, "c-1", admin.NodeAlive, "node c-1: its job table lacks jobs",
		},
		{"client keys are refused: the bound has passed", func(v *view) {
			v.state.APIKeys = map[string]agreed.APIKey{"k": {}}
			v.state.Parsed.Access.StaleFor = config.Duration(time.Minute)
			age := 5 * time.Minute
			v.agreedAge = &age
		}, "a", admin.SiteHealthy, "a-1", admin.NodeAlive, "node a-1 refuses the API keys of clients: it has heard nothing from the cluster's majority for 5m0s, and access.stale_for allows 1m"},
		{"client keys are refused: the age is not known", func(v *view) {
			v.state.APIKeys = map[string]agreed.APIKey{"k": {}}
			v.state.Parsed.Access.StaleFor = config.Duration(time.Minute)
		}, "a", admin.SiteHealthy, "a-1", admin.NodeAlive, "since before its start, and access.stale_for allows 1m"},
		{"a site without members", func(v *view) {
			delete(v.state.Nodes, "c-1")
			delete(v.peers, "c-1")
		}, "c", admin.SiteUnknown, "", "", "site c: no node has joined yet"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			v := healthyView(t)
			tc.change(&v)
			s := describe(v)
			if s.Healthy {
				t.Error("the status says healthy")
			}
			if all := strings.Join(s.Reasons, "; "); !strings.Contains(all, tc.reason) {
				t.Errorf("reasons %q, want %q among them", all, tc.reason)
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

// A failover, a hold and an available failback are shown, and the cluster stays healthy.
func TestStatusShowsFailoverAndHold(t *testing.T) {
	v := healthyView(t)
	home := "b"
	v.failback = &home
	v.state.Hold = &agreed.Hold{Reason: "new switches", By: "ann", At: v.now}
	v.state.LastFailover = &agreed.FailoverRecord{From: "b", To: "a", Kind: agreed.FailoverUnplanned, Epoch: 3}
	s := describe(v)
	if !s.Healthy || s.FailbackAvailable == nil || *s.FailbackAvailable != "b" || s.Hold == nil || s.Hold.By != "ann" || s.LastFailover.Acknowledged {
		t.Errorf("healthy %v, failback %v, hold %+v, last %+v", s.Healthy, s.FailbackAvailable, s.Hold, s.LastFailover)
	}
}

// A value that no node has reported is null, never zero.
func TestUnknownValuesAreNull(t *testing.T) {
	v := healthyView(t)
	changePeer(&v, "c-1", func(p *cluster.PeerView) { *p = cluster.PeerView{Name: "c-1", Site: "c", Info: p.Info} })
	v.raft.Quorum, v.raft.Since = false, time.Time{}
	s := describe(v)
	for _, n := range s.Nodes {
		if n.Name == "c-1" && (n.LastHeardSeconds != nil || n.PID != nil || n.Leader != nil || n.DiskWriteSeconds != nil || n.DiskSlowSince != nil) {
			t.Errorf("node never heard: %+v", n)
		}
	}
	for _, site := range s.Sites {
		if site.Name == "c" && (site.LastHeardSeconds != nil || site.UpstreamsHealthy != nil) {
			t.Errorf("site never heard: %+v", site)
		}
		if site.Replication.LagSeconds != nil || site.Replication.RecordsBehind != nil {
			t.Errorf("replication that no node measures: %+v", site.Replication)
		}
	}
	if s.Raft.Leader != nil || s.Raft.QuorumSince != nil {
		t.Errorf("raft without a quorum: %+v", s.Raft)
	}
	if s.LastFailover != nil || s.Jobs != nil {
		t.Error("there was no failover, and there are no jobs")
	}

	fresh := describe(view{name: "a-1", site: "a", state: &agreed.State{}, waiting: "waiting for dsnode bootstrap"})
	if fresh.Healthy || fresh.Primary != nil || fresh.Generation != nil || len(fresh.Reasons) != 1 {
		t.Errorf("a node without a cluster: %+v", fresh)
	}
}

func TestConfigurationThatCannotReplaceThePresentOne(t *testing.T) {
	v := healthyView(t)
	for _, tc := range []struct{ text, want string }{
		{strings.Replace(statusConfig, "version: 1\n", "version: 1\ntiming: {heartbeat: 1s}\n", 1), "timing.heartbeat"},
		{strings.Replace(statusConfig, "  c: {city: y, priority: 3}\n", "", 1), "site c still has node c-1"},
	} {
		next, err := config.Parse("cluster.yaml", []byte(tc.text))
		if err != nil {
			t.Fatal(err)
		}
		if err := checkChange(v.state, next); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%v, want %q", err, tc.want)
		}
	}
	if err := checkChange(v.state, v.state.Parsed); err != nil {
		t.Errorf("the same configuration: %v", err)
	}
	// Older versions refuse a configuration with a key that they don't know.
	v.state.FeatureLevel = 1
	next, err := config.Parse("cluster.yaml", []byte(statusConfig+"access: {stale_for: 0s}\n"))
	if err != nil {
		t.Fatal(err)
	}
	if err := checkChange(v.state, next); !errors.Is(err, cluster.ErrFeatureLevel) || !strings.Contains(err.Error(), "access.stale_for needs feature level 2") {
		t.Errorf("a key of level 2 at level 1: %v", err)
	}
	if share, err := config.Parse("cluster.yaml", []byte(statusConfig+"limits: {tenant_share: 50}\naccess: {stale_for: 0s}\n")); err != nil {
		t.Error(err)
	} else if err := checkChange(v.state, share); !errors.Is(err, cluster.ErrFeatureLevel) || !strings.Contains(err.Error(), "limits.tenant_share needs feature level 3") {
		t.Errorf("a key of level 3 at level 1: %v", err)
	}
	v.state.FeatureLevel = 2
	if err := checkChange(v.state, next); err != nil {
		t.Errorf("a key of level 2 at level 2: %v", err)
	}
	v.state.FeatureLevel, v.state.Parsed = 1, next
	if err := checkChange(v.state, next); err != nil {
		t.Errorf("the configuration that a cluster was founded with: %v", err)
	}
}

// The status warns before API keys are refused.
func TestStatusWarnsOfALargeState(t *testing.T) {
	v := healthyView(t)
	for bytes, warns := range map[int]bool{agreed.MaxBytesForKeys / 2: false, agreed.MaxBytesForKeys * 3 / 4: true, 2 * agreed.MaxBytesForKeys: true} {
		v.stateBytes = bytes
		s := describe(v)
		said := slices.ContainsFunc(s.Warnings, func(w string) bool { return strings.Contains(w, "no more API keys can be created: revoke") })
		if said != warns || !s.Healthy {
			t.Errorf("with %d bytes: warnings %q, healthy %v", bytes, s.Warnings, s.Healthy)
		}
	}
}

func TestStatusNamesWhoHoldsTheFeatureLevel(t *testing.T) {
	v := healthyView(t)
	for name, level := range map[string]int{"a-1": agreed.MaxFeatureLevel, "b-1": 1, "c-1": agreed.MaxFeatureLevel} {
		n := v.state.Nodes[name]
		n.Feature = level
		v.state.Nodes[name] = n
	}
	v.state.FeatureLevel = 1
	s := describe(v)
	if f := s.FeatureLevel; f == nil || f.Agreed != 1 || f.Newest != agreed.MaxFeatureLevel || !slices.Equal(f.HeldBy, []string{"b-1"}) {
		t.Errorf("feature level %+v, want 1, held by b-1", f)
	}
	if !s.Healthy {
		t.Errorf("a held level is no fault, but: %v", s.Reasons)
	}
}

// What would be lost with a node is named, and unknown is said to be unknown.
func TestRemovalPlan(t *testing.T) {
	seconds := func(s float64) *time.Duration { d := time.Duration(s * float64(time.Second)); return &d }
	records := func(n int64) *int64 { return &n }
	heard := func(ago time.Duration) cluster.PeerView { return cluster.PeerView{Heard: true, Ago: ago} }
	for _, tc := range []struct {
		what  string
		peer  cluster.PeerView
		alone replication.Alone
		loses string // a part; empty: nothing
		known bool   // the number of records
	}{
		{"all is elsewhere", heard(3 * time.Second), replication.Alone{Records: records(0), Reported: seconds(3.1)}, "", true},
		{"all is elsewhere, long ago", heard(time.Hour), replication.Alone{Records: records(0), Reported: seconds(3601)}, "", true},
		{
			"some is only there", heard(3 * time.Second),
			replication.Alone{Records: records(10), Reported: seconds(3.2)},
			"b-2 has 10 records that no other node has, as it said 3.2s ago; last heard 3s ago", true,
		},
		{"never reported", heard(time.Second), replication.Alone{}, "not known", false},
		{"never heard", cluster.PeerView{}, replication.Alone{Records: records(0), Reported: seconds(3)}, "never heard", false},
		{
			"it went on without reports", heard(time.Second),
			replication.Alone{Records: records(0), Reported: seconds(60)},
			"it last said so 1m0s ago, and may have accepted jobs since; last heard 1s ago", false,
		},
	} {
		p := planRemoval(agreed.Node{Name: "b-2", Site: "b"}, admin.NodeDead, tc.peer, tc.alone)
		if (tc.loses == "") != (p.Loses == "") || !strings.Contains(p.Loses, tc.loses) || (p.RecordsOnlyThere != nil) != tc.known {
			t.Errorf("%s: %+v, want %q", tc.what, p, tc.loses)
		}
	}
}

func TestRemovedNodeSaysSo(t *testing.T) {
	v := healthyView(t)
	v.removed = fmt.Errorf("%w: node a-1 was removed at noon by ops", cluster.ErrNodeRemoved)
	s := describe(v)
	if s.Healthy || !strings.Contains(s.Reasons[0], "node a-1 stops") || !strings.Contains(s.Reasons[0], "by ops") || !strings.Contains(s.Reasons[0], "dsnode node admit a-1") {
		t.Errorf("reasons %v", s.Reasons)
	}
}
