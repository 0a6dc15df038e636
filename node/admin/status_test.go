package admin

import (
	"encoding/json"
	"testing"
	"time"
)

func healthyStatus() Status {
	since := time.Date(2026, 11, 22, 9, 0, 0, 0, time.UTC)
	return Status{
		Cluster: "dev", Version: "0.1.0", Healthy: true, Reasons: []string{}, Warnings: []string{},
		Observer: Observer{Node: "shanghai-a-1", Site: "shanghai-a"}, ObservedAt: since.Add(time.Hour),
		Generation: ptr(uint64(1)),
		Primary:    &Primary{Site: "shanghai-a", Epoch: 1, Since: since, Reason: "bootstrap"},
		Raft: Raft{
			Leader: ptr("shanghai-a-1"), LeaderSite: ptr("shanghai-a"), Term: ptr(uint64(2)),
			CommitIndex: ptr(uint64(41)), Voters: ptr(1), Quorum: true, QuorumSince: &since,
		},
		Sites: []SiteStatus{{
			Name: "shanghai-a", City: "shanghai", Role: "primary", State: SiteHealthy,
			NodesAlive: ptr(1), NodesTotal: ptr(1), UpstreamsHealthy: ptr(1), UpstreamsTotal: ptr(1), LastHeardSeconds: ptr(0.2),
		}},
		Nodes: []NodeStatus{{
			Name: "shanghai-a-1", Site: "shanghai-a", State: NodeAlive, Voter: ptr(true), Leader: ptr(true),
			LastHeardSeconds: ptr(0.0), Version: "0.1.0", PID: ptr(123), API: "127.0.0.1:8101", Admin: "127.0.0.1:8102", StartedAt: &since,
		}},
	}
}

// TestUnknownIsNull: an unknown value has its field in the JSON, and it is null.
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
		"status":      {got, []string{"generation", "primary", "alerts", "last_failover", "failback_available", "hold"}},
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
