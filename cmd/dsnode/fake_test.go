package main

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/failover/drill"
	"github.com/dsnode/dsnode/node/admin"
)

// fakeCluster is the Cluster behind the scripts' admin port. It keeps what was changed, and
// has four states.
type fakeCluster struct {
	mu       sync.Mutex // guards all below
	state    string     // healthy, degraded, lost (no quorum), outside (no member)
	versions []admin.ConfigVersion
	keys     []admin.APIKeyInfo
	draining bool
	drained  bool // a-vllm
	held     *admin.Hold
	lost     bool // the last failover is not acknowledged
	drills   []admin.Drill
	keyring  fakeKeyring
	asked    int // requests for the running drill so far
}

var _ admin.Cluster = (*fakeCluster)(nil)

const fakeNode = "shanghai-a-1"

var fakeStart = time.Date(2026, 11, 22, 9, 0, 0, 0, time.UTC)

func (f *fakeCluster) setState(state string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.state = state
}

// setLost makes the last failover an unacknowledged one.
func (f *fakeCluster) setLost() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.state, f.lost = "healthy", true
}

// change returns the error that a node would return for a change.
func (f *fakeCluster) change() error {
	switch f.state {
	case "lost":
		return fmt.Errorf("%w since %s", cluster.ErrNoQuorum, fakeStart.Add(50*time.Minute).Format(time.RFC3339))
	case "outside":
		return cluster.ErrNotMember
	}
	return nil
}

func ptr[T any](v T) *T { return &v }

func (f *fakeCluster) Status(context.Context) (admin.Status, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.state == "outside" {
		return admin.Status{}, cluster.ErrNotMember
	}
	now := fakeStart.Add(time.Hour)
	s := admin.Status{
		Cluster: "dev", Version: "0.1.0", ObservedAt: now,
		Observer:   admin.Observer{Node: fakeNode, Site: "shanghai-a"},
		Generation: ptr(uint64(1)),
		Primary:    &admin.Primary{Site: "shanghai-a", Epoch: 1, Since: fakeStart, Reason: "bootstrap"},
		Raft: admin.Raft{
			Leader: ptr(fakeNode), LeaderSite: ptr("shanghai-a"), Term: ptr(uint64(2)), CommitIndex: ptr(uint64(41)),
			Voters: ptr(3), Quorum: true, QuorumSince: ptr(fakeStart.Add(time.Minute)),
		},
	}
	roles := map[string]admin.Role{"shanghai-a": "primary", "shanghai-b": "same-city", "beijing": "remote"}
	for i, name := range []string{"shanghai-a", "shanghai-b", "beijing"} {
		site := admin.SiteStatus{
			Name: name, City: "shanghai", Role: roles[name], State: admin.SiteHealthy, NodesAlive: ptr(1), NodesTotal: ptr(1),
			UpstreamsHealthy: ptr(1), UpstreamsTotal: ptr(1), LastHeardSeconds: ptr(0.2 * float64(i)),
			Replication: &admin.Replication{RPOTargetSeconds: ptr(3600.0), RTOTargetSeconds: ptr(900.0)},
		}
		if name == "beijing" {
			site.City = "beijing"
		}
		node := admin.NodeStatus{
			Name: name + "-1", Site: name, State: admin.NodeAlive, Voter: ptr(true), Leader: ptr(i == 0),
			LastHeardSeconds: ptr(0.2 * float64(i)), Version: "0.1.0", PID: ptr(4000 + i),
			API: fmt.Sprintf("127.0.0.1:8%d01", i+1), Admin: fmt.Sprintf("127.0.0.1:8%d02", i+1), StartedAt: ptr(fakeStart), Draining: ptr(false),
		}
		if i == 0 {
			node.Draining = ptr(f.draining)
		}
		if f.state == "lost" && i > 0 || f.state == "degraded" && i > 1 {
			site.State, site.NodesAlive, site.LastHeardSeconds = admin.SiteDown, ptr(0), ptr(754.0)
			site.UpstreamsHealthy = nil
			node.State, node.LastHeardSeconds, node.PID = admin.NodeDead, ptr(754.0), nil
		}
		if f.state == "incomplete" && i == 1 {
			node.JobsMissing = "its job table is new"
		}
		s.Sites, s.Nodes = append(s.Sites, site), append(s.Nodes, node)
	}
	if f.state == "lost" {
		s.Raft.Quorum, s.Raft.QuorumSince = false, ptr(fakeStart.Add(50*time.Minute))
		s.Raft.Leader, s.Raft.LeaderSite, s.Nodes[0].Leader = nil, nil, ptr(false)
	}
	s.Hold = f.held
	if f.lost {
		s.LastFailover = &admin.Failover{From: "beijing", To: "shanghai-a", Kind: "unplanned", Epoch: 1, At: fakeStart, RTOSeconds: ptr(3.4), RPOSeconds: ptr(0.5), RecordsAtRisk: ptr(int64(12))}
		s.FailbackAvailable = ptr("beijing")
	}
	switch f.state {
	case "healthy":
		s.Warnings = []string{"2 of 3 voters are in the city shanghai: while it is lost, no change is possible"}
	case "degraded":
		s.Reasons = []string{"site beijing is down: last heard 12m34s ago"}
	case "lost":
		s.Reasons = []string{"no quorum since 2026-11-22T09:50:00Z: nothing can be changed, requests go on", "site shanghai-b is down", "site beijing is down"}
	}
	s.Healthy = len(s.Reasons) == 0
	return s, nil
}

func (f *fakeCluster) DrainUpstream(_ context.Context, name, _ string) error {
	return f.drainUpstream(name, true)
}

func (f *fakeCluster) ResumeUpstream(_ context.Context, name, _ string) error {
	return f.drainUpstream(name, false)
}

func (f *fakeCluster) drainUpstream(name string, on bool) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.change(); err != nil {
		return err
	}
	if name != "a-vllm" {
		return fmt.Errorf("%w: %s", agreed.ErrUnknownUpstream, name)
	}
	f.drained = on
	return nil
}

func (f *fakeCluster) Upstreams(context.Context) ([]admin.UpstreamInfo, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return []admin.UpstreamInfo{
		{Name: "a-vllm", Site: "shanghai-a", Kind: "vllm", URL: "http://10.0.0.1:8000/v1", Models: []string{"deepseek-chat"}, State: admin.UpstreamHealthy, Drained: f.drained, InFlight: ptr(3), MaxConcurrency: 256},
		{Name: "b-vllm", Site: "beijing", Kind: "vllm", URL: "http://10.0.1.1:8000/v1", Models: []string{"deepseek-chat"}, State: admin.UpstreamUnknown, Reason: "not probed yet", MaxConcurrency: 256},
		{Name: "c-vllm", Site: "shanghai-a", Kind: "sglang", URL: "http://sglang:8000/v1", Models: []string{"deepseek-chat"}, State: admin.UpstreamHealthy, InFlight: ptr(2), MaxConcurrency: 64, Instances: []admin.InstanceInfo{
			{Address: "10.0.0.7:8000", State: admin.UpstreamHealthy, InFlight: 2},
			{Address: "10.0.0.8:8000", State: admin.UpstreamUnhealthy, Reason: "connection refused"},
		}},
	}, nil
}

func (f *fakeCluster) Bootstrap(_ context.Context, text []byte, author string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.versions) > 0 && f.versions[0].Text != string(text) {
		return agreed.ErrAlreadyFounded
	}
	if len(f.versions) == 0 {
		f.put(string(text), author)
	}
	f.state = "healthy"
	return nil
}

func (f *fakeCluster) put(text, author string) admin.ConfigVersion {
	n := uint64(len(f.versions) + 1)
	v := admin.ConfigVersion{
		Version: n, Hash: fmt.Sprintf("%064x", n), Author: author, Text: text,
		Time: fakeStart.Add(time.Duration(n) * time.Minute), //nolint:gosec // there are few
	}
	f.versions = append(f.versions, v)
	return v
}

func (f *fakeCluster) Config(context.Context) (admin.ConfigVersion, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.versions) == 0 {
		return admin.ConfigVersion{}, cluster.ErrNotMember
	}
	return f.versions[len(f.versions)-1], nil
}

func (f *fakeCluster) ConfigHistory(context.Context) ([]admin.ConfigVersion, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.versions[:max(0, len(f.versions)-1)], nil
}

func (f *fakeCluster) ApplyConfig(_ context.Context, text []byte, expect *uint64, author string) (admin.ConfigVersion, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.change(); err != nil {
		return admin.ConfigVersion{}, err
	}
	if now := uint64(len(f.versions)); expect != nil && *expect != now {
		return admin.ConfigVersion{}, fmt.Errorf("%w: version %d was expected, it is %d now", agreed.ErrVersionConflict, *expect, now)
	}
	return f.put(string(text), author), nil
}

func (f *fakeCluster) RollbackConfig(_ context.Context, to uint64, expect *uint64, author string) (admin.ConfigVersion, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := uint64(len(f.versions))
	if expect != nil && *expect != now {
		return admin.ConfigVersion{}, agreed.ErrVersionConflict
	}
	if to > now {
		return admin.ConfigVersion{}, fmt.Errorf("%w: %d", admin.ErrUnknownVersion, to)
	}
	return f.put(f.versions[to-1].Text, author), nil
}

func (f *fakeCluster) CreateAPIKey(_ context.Context, r admin.APIKeyRequest) (admin.APIKeyCreated, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.change(); err != nil {
		return admin.APIKeyCreated{}, err
	}
	k := admin.APIKeyInfo{ID: fmt.Sprintf("k%d", len(f.keys)+1), Tenant: r.Tenant, Note: r.Note, Models: r.Models, CreatedAt: fakeStart, ExpiresAt: r.ExpiresAt}
	f.keys = append(f.keys, k)
	return admin.APIKeyCreated{APIKeyInfo: k, Secret: "dsk-" + k.ID + "-s3cret"}, nil
}

func (f *fakeCluster) APIKeys(context.Context) ([]admin.APIKeyInfo, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]admin.APIKeyInfo{}, f.keys...), nil
}

func (f *fakeCluster) RevokeAPIKey(_ context.Context, id string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i := range f.keys {
		if f.keys[i].ID == id {
			f.keys[i].RevokedAt = ptr(fakeStart)
			return nil
		}
	}
	return fmt.Errorf("%w: %s", agreed.ErrUnknownKey, id)
}

func (f *fakeCluster) PlanRemoval(_ context.Context, name string) (admin.RemovalPlan, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	p := admin.RemovalPlan{Node: name, Site: "beijing", State: admin.NodeAlive, LastHeardSeconds: ptr(0.1), RecordsOnlyThere: ptr(int64(0)), ReportedSecondsAgo: ptr(0.2)}
	switch {
	case name != fakeNode && name != "shanghai-b-1" && name != "beijing-1":
		return p, fmt.Errorf("%w: %s", agreed.ErrUnknownNode, name)
	case name == "beijing-1" && f.state == "degraded":
		p.State, p.LastHeardSeconds, p.RecordsOnlyThere, p.ReportedSecondsAgo = admin.NodeDead, ptr(754.0), ptr(int64(10)), ptr(754.3)
		p.Loses = "beijing-1 has 10 records that no other node has, as it said 12m34.3s ago; last heard 12m34s ago"
	}
	return p, nil
}

func (f *fakeCluster) AdmitNode(_ context.Context, name, _ string) error {
	if name != "beijing-1" {
		return fmt.Errorf("%w: %s", agreed.ErrNotRemoved, name)
	}
	return nil
}

func (f *fakeCluster) RemoveNode(_ context.Context, r admin.RemovalRequest, _ string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	name := r.Node
	switch {
	case r.Force:
		return nil
	case name == "beijing-1" && f.state == "degraded" && !r.AcceptLoss:
		return fmt.Errorf("%w: %s has 10 records that no other node has", admin.ErrOnlyThere, name)
	case name == "beijing-1" && f.state == "degraded":
		return nil
	case name == fakeNode || name == "shanghai-b-1" || name == "beijing-1":
		return fmt.Errorf("%w: %s was heard just now", admin.ErrNodeAlive, name)
	}
	return fmt.Errorf("%w: %s", agreed.ErrUnknownNode, name)
}

func (f *fakeCluster) DrainNode(_ context.Context, name string) error { return f.drain(name, true) }

func (f *fakeCluster) ResumeNode(_ context.Context, name string) error { return f.drain(name, false) }

func (f *fakeCluster) drain(name string, on bool) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if name != fakeNode {
		return fmt.Errorf("%w: this is %s", admin.ErrWrongNode, fakeNode)
	}
	f.draining = on
	return nil
}

func (f *fakeCluster) PlanFailover(_ context.Context, r admin.FailoverRequest, _ string) (admin.FailoverPlan, error) {
	known := r.To == "shanghai-b" || r.To == "beijing"
	loss := "beijing lacks no record of shanghai-a"
	if r.AcceptLoss {
		loss = "the loss is accepted: beijing lacks 41 of shanghai-a-1 (job records), its copy is 12.0 s old"
	}
	return admin.FailoverPlan{From: ptr("shanghai-a"), Epoch: ptr(uint64(1)), To: r.To, OK: known, Checks: []admin.Check{
		{Name: "quorum", OK: true, Detail: "this node's lease is good for 1.1s"},
		{Name: "target_known", OK: known, Detail: fmt.Sprintf("site %q", r.To)},
		{Name: "lossless", OK: true, Detail: loss},
	}}, nil
}

func (f *fakeCluster) Failover(ctx context.Context, r admin.FailoverRequest, by string) (admin.FailoverResult, error) {
	f.mu.Lock()
	err := f.change()
	f.mu.Unlock()
	if err != nil {
		return admin.FailoverResult{}, &admin.Error{Code: "rolled_back", Message: "the switchover failed and was rolled back, nothing has changed: " + err.Error()}
	}
	plan, err := f.PlanFailover(ctx, r, by)
	if err == nil && !plan.OK {
		return admin.FailoverResult{}, &admin.Error{Code: "precheck_failed", Message: fmt.Sprintf("the switchover can't begin: target_known: site %q", r.To)}
	}
	records, rpo := int64(0), 0.0
	if r.AcceptLoss {
		records, rpo = 41, 12
	}
	return admin.FailoverResult{
		ID: "sw-1", From: "shanghai-a", To: r.To, Epoch: 2, IdleSeconds: 0.0871, LeaderMoved: true, Checks: plan.Checks,
		RecordsAtRisk: &records, RPOSeconds: &rpo,
		Steps: []admin.FailoverStep{
			{Name: "announce", At: fakeStart, TookSeconds: 0.031},
			{Name: "release", At: fakeStart, TookSeconds: 0.025},
			{Name: "promote", At: fakeStart, TookSeconds: 0.0311},
			{Name: "leadership", At: fakeStart, TookSeconds: 0.912},
		},
	}, err
}

func (f *fakeCluster) AckFailover(context.Context, string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.lost {
		return admin.ErrNothingToAck
	}
	f.lost = false
	return nil
}

func (f *fakeCluster) HoldFailover(_ context.Context, reason, _ string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.held = &admin.Hold{Reason: reason, By: "ann@desk", At: fakeStart}
	return nil
}

func (f *fakeCluster) ResumeFailover(context.Context, string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.held = nil
	return nil
}

func (f *fakeCluster) ReleaseQuarantine(context.Context) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.state != "lost" {
		return admin.ErrNotQuarantined
	}
	return nil
}

func (f *fakeCluster) PlanDrill(_ context.Context, r admin.DrillRequest, _ string) (admin.DrillPlan, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	well := f.state == "healthy"
	return admin.DrillPlan{Kind: r.Kind, Site: r.Site, OK: well, Rehearses: "the loss of the primary", Checks: []admin.Check{
		{Name: "quorum", OK: true, Detail: "this node's lease is good for 1.1s"},
		{Name: "healthy", OK: well, Waivable: true, Detail: f.state},
	}}, nil
}

func (f *fakeCluster) StartDrill(ctx context.Context, r admin.DrillRequest, by string) (admin.Drill, error) {
	if p, err := f.PlanDrill(ctx, r, by); err != nil || !p.OK {
		return admin.Drill{}, &admin.Error{Code: "precheck_failed", Message: "the drill can't begin: healthy (" + f.state + ")"}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	d := admin.Drill{ID: fmt.Sprintf("drill-%d", len(f.drills)+1), Kind: r.Kind, Site: r.Site, By: "ann@desk", StartedAt: fakeStart, Deadline: fakeStart.Add(time.Minute)}
	f.drills, f.asked = append(f.drills, d), 0
	return d, nil
}

func (f *fakeCluster) Drills(context.Context) ([]admin.Drill, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]admin.Drill{}, f.drills...), nil
}

// Drill ends a drill at the second request for it. Drills of beijing fail.
func (f *fakeCluster) Drill(_ context.Context, id string) (admin.Drill, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i := range f.drills {
		d := &f.drills[i]
		if d.ID != id {
			continue
		}
		f.asked++
		r := drill.Report{
			Format: 1, ID: d.ID, Kind: drill.Kind(d.Kind), Site: d.Site, By: d.By, Runner: fakeNode, StartedAt: d.StartedAt, Requests: 120,
			Rehearsed: "the loss of the primary", Timeline: []drill.Event{{At: fakeStart, What: "started"}},
		}
		if f.asked > 1 && d.Verdict == nil {
			d.Verdict, d.EndedAt = ptr("pass"), ptr(fakeStart.Add(time.Minute))
			if d.Site == "beijing" {
				d.Verdict = ptr("fail")
			}
		}
		if d.Verdict != nil {
			r.Verdict, r.RTO.Achieved = drill.Verdict(*d.Verdict), ptr(3.25)
			r.Timeline = append(r.Timeline, drill.Event{At: fakeStart, After: 61.5, What: "ended", Detail: *d.Verdict})
			r.Criteria = []drill.Criterion{{Name: "client_errors", OK: *d.Verdict == "pass", Detail: "0 of 120 requests failed"}}
		}
		out := *d
		var err error
		out.Report, err = r.Encode()
		return out, err
	}
	return admin.Drill{}, fmt.Errorf("%w: %s", drill.ErrUnknown, id)
}

func (f *fakeCluster) AbortDrill(_ context.Context, id, _ string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i := range f.drills {
		if f.drills[i].ID == id {
			if f.drills[i].Verdict != nil {
				return fmt.Errorf("%w: %s", agreed.ErrDrillEnded, id)
			}
			f.drills[i].Verdict = ptr("aborted")
			return nil
		}
	}
	return fmt.Errorf("%w: %s", drill.ErrUnknown, id)
}

func (f *fakeCluster) CheckJobs(context.Context) error { return nil }

func (f *fakeCluster) JobStreams(context.Context) (admin.JobStreams, error) {
	return admin.JobStreams{}, nil
}
