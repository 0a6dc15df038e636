package main

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/node/admin"
)

// fakeCluster stands behind a real admin port in the scripts: it remembers
// what it was told and knows three moods.
type fakeCluster struct {
	mu       sync.Mutex // guards all below
	mood     string     // healthy, degraded, lost, outside
	versions []admin.ConfigVersion
	keys     []admin.APIKeyInfo
	draining bool
}

var _ admin.Cluster = (*fakeCluster)(nil)

const fakeNode = "shanghai-a-1"

var fakeStart = time.Date(2026, 11, 22, 9, 0, 0, 0, time.UTC)

func (f *fakeCluster) setMood(mood string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.mood = mood
}

// change says whether a change can be made, as a node would.
func (f *fakeCluster) change() error {
	switch f.mood {
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
	if f.mood == "outside" {
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
	roles := map[string]admin.Role{"shanghai-a": admin.RolePrimary, "shanghai-b": admin.RoleSameCity, "beijing": admin.RoleRemote}
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
		if f.mood == "lost" && i > 0 || f.mood == "degraded" && i > 1 {
			site.State, site.NodesAlive, site.LastHeardSeconds = admin.SiteDown, ptr(0), ptr(754.0)
			site.UpstreamsHealthy = nil
			node.State, node.LastHeardSeconds, node.PID = admin.NodeDead, ptr(754.0), nil
		}
		s.Sites, s.Nodes = append(s.Sites, site), append(s.Nodes, node)
	}
	if f.mood == "lost" {
		s.Raft.Quorum, s.Raft.QuorumSince = false, ptr(fakeStart.Add(50*time.Minute))
		s.Raft.Leader, s.Raft.LeaderSite, s.Nodes[0].Leader = nil, nil, ptr(false)
	}
	switch f.mood {
	case "degraded":
		s.Reasons = []string{"site beijing is down: last heard 12m34s ago"}
	case "lost":
		s.Reasons = []string{"no quorum since 2026-11-22T09:50:00Z: nothing can be changed, requests go on", "site shanghai-b is down", "site beijing is down"}
	}
	s.Healthy = len(s.Reasons) == 0
	return s, nil
}

func (f *fakeCluster) Upstreams(context.Context) ([]admin.UpstreamInfo, error) {
	return []admin.UpstreamInfo{
		{Name: "a-vllm", Site: "shanghai-a", Kind: "vllm", URL: "http://10.0.0.1:8000/v1", Models: []string{"deepseek-chat"}, State: admin.UpstreamHealthy, InFlight: ptr(3), MaxConcurrency: 256},
		{Name: "b-vllm", Site: "beijing", Kind: "vllm", URL: "http://10.0.1.1:8000/v1", Models: []string{"deepseek-chat"}, State: admin.UpstreamUnknown, Reason: "nobody has asked it yet", MaxConcurrency: 256},
	}, nil
}

func (f *fakeCluster) Bootstrap(_ context.Context, text []byte, author string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.versions) > 0 && f.versions[0].Text != string(text) {
		return cluster.ErrAlreadyFounded
	}
	if len(f.versions) == 0 {
		f.put(string(text), author)
	}
	f.mood = "healthy"
	return nil
}

func (f *fakeCluster) put(text, author string) admin.ConfigVersion {
	n := uint64(len(f.versions) + 1)
	v := admin.ConfigVersion{
		Version: n, Hash: fmt.Sprintf("%064x", n), Author: author, Text: text,
		Time: fakeStart.Add(time.Duration(n) * time.Minute), //nolint:gosec // a handful
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
		return admin.ConfigVersion{}, fmt.Errorf("%w: version %d was expected, it is %d now", cluster.ErrVersionConflict, *expect, now)
	}
	return f.put(string(text), author), nil
}

func (f *fakeCluster) RollbackConfig(_ context.Context, to uint64, expect *uint64, author string) (admin.ConfigVersion, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := uint64(len(f.versions))
	if expect != nil && *expect != now {
		return admin.ConfigVersion{}, cluster.ErrVersionConflict
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
	return fmt.Errorf("%w: %s", cluster.ErrUnknownKey, id)
}

func (f *fakeCluster) RemoveNode(_ context.Context, name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case name == "beijing-1" && f.mood == "degraded":
		return nil
	case name == fakeNode || name == "shanghai-b-1" || name == "beijing-1":
		return fmt.Errorf("%w: %s was heard just now", admin.ErrNodeAlive, name)
	}
	return fmt.Errorf("%w: %s", cluster.ErrUnknownNode, name)
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
