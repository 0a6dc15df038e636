package admin

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func healthyStatus() Status {
	since := time.Date(2026, 11, 22, 9, 0, 0, 0, time.UTC)
	return Status{
		Cluster: "dev", Version: "0.1.0", Healthy: true, Reasons: []string{},
		Observer: Observer{Node: "shanghai-a-1", Site: "shanghai-a"}, ObservedAt: since.Add(time.Hour),
		Generation: ptr(uint64(1)),
		Primary:    &Primary{Site: "shanghai-a", Epoch: 1, Since: since, Reason: "bootstrap"},
		Raft: Raft{
			Leader: ptr("shanghai-a-1"), LeaderSite: ptr("shanghai-a"), Term: ptr(uint64(2)),
			CommitIndex: ptr(uint64(41)), Voters: ptr(1), Quorum: true, QuorumSince: &since,
		},
		Sites: []SiteStatus{{
			Name: "shanghai-a", City: "shanghai", Role: RolePrimary, State: SiteHealthy,
			NodesAlive: ptr(1), NodesTotal: ptr(1), UpstreamsHealthy: ptr(1), UpstreamsTotal: ptr(1), LastHeardSeconds: ptr(0.2),
		}},
		Nodes: []NodeStatus{{
			Name: "shanghai-a-1", Site: "shanghai-a", State: NodeAlive, Voter: ptr(true), Leader: ptr(true),
			LastHeardSeconds: ptr(0.0), Version: "0.1.0", PID: ptr(123), API: "127.0.0.1:8101", Admin: "127.0.0.1:8102", StartedAt: &since,
		}},
	}
}

func TestJudge(t *testing.T) {
	tests := map[string]struct {
		change func(*Status)
		want   []string
	}{
		"healthy": {func(*Status) {}, []string{}},
		"no quorum, since when": {
			func(s *Status) { s.Raft.Quorum = false },
			[]string{"no quorum since 2026-11-22T09:00:00Z: the configuration can't change and no site can take over"},
		},
		"no quorum, nobody knows since when": {
			func(s *Status) { s.Raft.Quorum, s.Raft.QuorumSince = false, nil },
			[]string{"no quorum: the configuration can't change and no site can take over"},
		},
		"no primary": {func(s *Status) { s.Primary = nil }, []string{"no site is known to be the primary"}},
		"site down says no more": {
			func(s *Status) {
				s.Sites[0].State, s.Sites[0].NodesAlive, s.Sites[0].LastHeardSeconds = SiteDown, ptr(0), ptr(61.4)
			},
			[]string{"site shanghai-a is down, last heard 1m1s ago"},
		},
		"site unknown":                  {func(s *Status) { s.Sites[0].State = SiteUnknown }, []string{"site shanghai-a was not heard of"}},
		"site without a node":           {func(s *Status) { s.Sites[0].NodesAlive, s.Sites[0].NodesTotal = ptr(0), ptr(0) }, []string{"site shanghai-a has no node yet"}},
		"site with no node alive":       {func(s *Status) { s.Sites[0].NodesAlive = ptr(0) }, []string{"site shanghai-a has no node alive"}},
		"upstream gone":                 {func(s *Status) { s.Sites[0].UpstreamsHealthy = ptr(0) }, []string{"site shanghai-a has 0 of 1 upstreams healthy"}},
		"no upstream":                   {func(s *Status) { s.Sites[0].UpstreamsTotal = ptr(0) }, []string{"site shanghai-a has no upstream configured"}},
		"unknown figures don't count":   {func(s *Status) { s.Sites[0].UpstreamsHealthy, s.Sites[0].NodesAlive = nil, nil }, []string{}},
		"degradation":                   {func(s *Status) { s.Sites[0].Degradation = ptr("data") }, []string{"site shanghai-a is degraded: data"}},
		"degraded for unknown reasons":  {func(s *Status) { s.Sites[0].State = SiteDegraded }, []string{"site shanghai-a is degraded"}},
		"dead node":                     {func(s *Status) { s.Nodes[0].State, s.Nodes[0].LastHeardSeconds = NodeDead, ptr(3.14) }, []string{"node shanghai-a-1 is dead, last heard 3.1s ago"}},
		"a node that left is no matter": {func(s *Status) { s.Nodes[0].State = NodeLeft }, []string{}},
		"lag over target": {
			func(s *Status) {
				s.Sites[0].Replication = &Replication{LagSeconds: ptr(3700.0), RPOTargetSeconds: ptr(3600.0)}
			},
			[]string{"site shanghai-a lags 1h1m40s behind the others, its target is 1h0m0s"},
		},
		"unknown lag": {
			func(s *Status) { s.Sites[0].Replication = &Replication{RPOTargetSeconds: ptr(3600.0)} },
			[]string{},
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			s := healthyStatus()
			tt.change(&s)
			if diff := cmp.Diff(tt.want, Judge(s)); diff != "" {
				t.Errorf("reasons (-want +got):\n%s", diff)
			}
		})
	}
}

// TestUnknownIsNull holds the law that the status never lies: what is not
// known has its field, and the field is null.
func TestUnknownIsNull(t *testing.T) {
	text, err := json.Marshal(Status{
		Reasons: []string{}, Sites: []SiteStatus{{Replication: &Replication{}}}, Nodes: []NodeStatus{{}}, Jobs: &Jobs{},
	})
	if err != nil {
		t.Fatal(err)
	}
	var got map[string]any
	if err := json.Unmarshal(text, &got); err != nil {
		t.Fatal(err)
	}
	site := got["sites"].([]any)[0].(map[string]any)
	node := got["nodes"].([]any)[0].(map[string]any)
	for where, fields := range map[string]struct {
		in    map[string]any
		names []string
	}{
		"status":      {got, []string{"generation", "primary", "alerts", "last_failover"}},
		"raft":        {got["raft"].(map[string]any), []string{"leader", "leader_site", "term", "commit_index", "voters", "quorum_since"}},
		"site":        {site, []string{"nodes_alive", "nodes_total", "upstreams_healthy", "upstreams_total", "last_heard_seconds", "degradation"}},
		"replication": {site["replication"].(map[string]any), []string{"records_behind", "lag_seconds", "rpo_target_seconds", "rto_target_seconds"}},
		"node":        {node, []string{"voter", "leader", "last_heard_seconds", "pid", "started_at"}},
		"jobs":        {got["jobs"].(map[string]any), []string{"queued", "running", "succeeded", "failed"}},
	} {
		for _, name := range fields.names {
			if value, present := fields.in[name]; !present || value != nil {
				t.Errorf("%s.%s is %v (present: %t), want null", where, name, value, present)
			}
		}
	}
}
