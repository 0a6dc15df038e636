package node

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/node/admin"
	"github.com/dsnode/dsnode/node/upstream"
)

// This file is admin.Cluster: what operators ask of a node.

var _ admin.Cluster = (*Node)(nil)

// Bootstrap founds the cluster with this node.
func (n *Node) Bootstrap(ctx context.Context, text []byte, author string) error {
	return n.cluster.Bootstrap(ctx, text, author)
}

// Config is the agreed configuration.
func (n *Node) Config(context.Context) (admin.ConfigVersion, error) {
	s := n.cluster.State()
	if s.ClusterID == "" {
		return admin.ConfigVersion{}, n.notMember()
	}
	return s.Config, nil
}

// notMember says why this node knows nothing yet.
func (n *Node) notMember() error {
	if why := n.cluster.Waiting(); why != "" {
		return fmt.Errorf("%w; %s", cluster.ErrNotMember, why)
	}
	return fmt.Errorf("%w: it has not heard the agreed state since its start", cluster.ErrNoQuorum)
}

// ConfigHistory lists the versions before the current one.
func (n *Node) ConfigHistory(context.Context) ([]admin.ConfigVersion, error) {
	s := n.cluster.State()
	if s.ClusterID == "" {
		return nil, n.notMember()
	}
	return s.History, nil
}

// ApplyConfig agrees on another configuration.
func (n *Node) ApplyConfig(ctx context.Context, text []byte, expect *uint64, author string) (admin.ConfigVersion, error) {
	next, err := config.Parse("cluster.yaml", text)
	if err != nil {
		return admin.ConfigVersion{}, fmt.Errorf("%w: %w", admin.ErrInvalidConfig, err)
	}
	s := n.cluster.State()
	if s.ClusterID == "" {
		return admin.ConfigVersion{}, n.notMember()
	}
	if err := mayFollow(s, next); err != nil {
		return admin.ConfigVersion{}, err
	}
	version := s.Config.Version
	if expect != nil {
		version = *expect
	}
	hash := cluster.HashConfig(text)
	if version == s.Config.Version && hash == s.Config.Hash {
		return s.Config, nil // nothing to agree on
	}
	_, err = n.cluster.Propose(ctx, agreed.CmdConfigSet, agreed.ConfigSet{Expect: version, Text: string(text), Hash: hash, Author: author})
	if err != nil {
		return admin.ConfigVersion{}, err
	}
	return n.cluster.State().Config, nil
}

// mayFollow refuses what is valid in itself but can't follow the present
// configuration.
func mayFollow(s *agreed.State, next *config.Config) error {
	if s.Parsed != nil && next.Timing != s.Parsed.Timing {
		return fmt.Errorf("%w: timing.heartbeat is %s since the bootstrap and can't change while the cluster runs: nodes would differ about who is in charge",
			admin.ErrInvalidConfig, s.Parsed.Timing.Heartbeat)
	}
	for name, node := range s.Nodes {
		if _, known := next.Sites[node.Site]; !known {
			return fmt.Errorf("%w: site %s still has node %s: remove its nodes first with dsnode node remove", admin.ErrInvalidConfig, node.Site, name)
		}
	}
	if _, known := next.Sites[s.Primary.Site]; !known {
		return fmt.Errorf("%w: site %s is the primary", admin.ErrInvalidConfig, s.Primary.Site)
	}
	return nil
}

// RollbackConfig agrees on the text of an earlier version, as a new one.
func (n *Node) RollbackConfig(ctx context.Context, to uint64, expect *uint64, author string) (admin.ConfigVersion, error) {
	s := n.cluster.State()
	if s.ClusterID == "" {
		return admin.ConfigVersion{}, n.notMember()
	}
	if to == s.Config.Version {
		return s.Config, nil
	}
	i := slices.IndexFunc(s.History, func(v agreed.ConfigVersion) bool { return v.Version == to })
	if i < 0 {
		return admin.ConfigVersion{}, fmt.Errorf("%w: %d", admin.ErrUnknownVersion, to)
	}
	if expect == nil {
		expect = &s.Config.Version
	}
	return n.ApplyConfig(ctx, []byte(s.History[i].Text), expect, author)
}

// CreateAPIKey makes a client's key; its secret is in the answer and nowhere
// else.
func (n *Node) CreateAPIKey(ctx context.Context, r admin.APIKeyRequest) (admin.APIKeyCreated, error) {
	s := n.cluster.State()
	if s.Parsed == nil {
		return admin.APIKeyCreated{}, n.notMember()
	}
	for _, m := range r.Models {
		if _, known := s.Parsed.Models[m]; !known {
			return admin.APIKeyCreated{}, fmt.Errorf("%w: model %q is not in the configuration", admin.ErrInvalidRequest, m)
		}
	}
	expires := time.Time{}
	if r.ExpiresAt != nil {
		expires = *r.ExpiresAt
	}
	key, secret := agreed.NewAPIKey(r.Tenant, r.Note, r.Models, expires, time.Now())
	if _, err := n.cluster.Propose(ctx, agreed.CmdAPIKeyPut, key); err != nil {
		return admin.APIKeyCreated{}, err
	}
	return admin.APIKeyCreated{APIKeyInfo: keyInfo(key), Secret: secret}, nil
}

func keyInfo(k agreed.APIKey) admin.APIKeyInfo {
	info := admin.APIKeyInfo{ID: k.ID, Tenant: k.Tenant, Note: k.Note, Models: k.Models, CreatedAt: k.CreatedAt}
	if info.Models == nil {
		info.Models = []string{}
	}
	if !k.ExpiresAt.IsZero() {
		info.ExpiresAt = &k.ExpiresAt
	}
	if !k.RevokedAt.IsZero() {
		info.RevokedAt = &k.RevokedAt
	}
	return info
}

// APIKeys lists all keys, oldest first.
func (n *Node) APIKeys(context.Context) ([]admin.APIKeyInfo, error) {
	s := n.cluster.State()
	if s.ClusterID == "" {
		return nil, n.notMember()
	}
	keys := make([]admin.APIKeyInfo, 0, len(s.APIKeys))
	for _, k := range s.APIKeys {
		keys = append(keys, keyInfo(k))
	}
	slices.SortFunc(keys, func(a, b admin.APIKeyInfo) int { return a.CreatedAt.Compare(b.CreatedAt) })
	return keys, nil
}

// RevokeAPIKey ends a key at once, on every node that hears of it.
func (n *Node) RevokeAPIKey(ctx context.Context, id string) error {
	_, err := n.cluster.Propose(ctx, agreed.CmdAPIKeyRevoke, agreed.APIKeyRevoke{ID: id})
	return err
}

// RemoveNode takes a node that is gone for good out of the cluster; the raft
// leader then takes away its vote.
func (n *Node) RemoveNode(ctx context.Context, name string) error {
	s := n.cluster.State()
	if _, known := s.Nodes[name]; !known {
		return fmt.Errorf("%w: %s", agreed.ErrUnknownNode, name)
	}
	if len(s.Nodes) == 1 {
		return agreed.ErrLastVoter
	}
	if p := n.cluster.Peers()[name]; name == n.cfg.Name || (p.Heard && p.Ago < n.cluster.Timing().Patience) {
		return fmt.Errorf("%w: %s", admin.ErrNodeAlive, name)
	}
	_, err := n.cluster.Propose(ctx, agreed.CmdNodeRemove, agreed.NodeRemove{Name: name})
	return err
}

// DrainNode takes this node out of the balancers' sight.
func (n *Node) DrainNode(_ context.Context, name string) error { return n.ownDraining(name, true) }

// ResumeNode brings it back.
func (n *Node) ResumeNode(_ context.Context, name string) error { return n.ownDraining(name, false) }

func (n *Node) ownDraining(name string, draining bool) error {
	if name == n.cfg.Name {
		n.setDraining(draining)
		return nil
	}
	m, known := n.cluster.State().Nodes[name]
	if !known {
		return fmt.Errorf("%w: %s", agreed.ErrUnknownNode, name)
	}
	return fmt.Errorf("%w: ask %s at its admin address %s", admin.ErrWrongNode, name, m.Admin)
}

// Upstreams lists every configured upstream: the own site's as this node sees
// them, the others' as their sites' nodes said last.
func (n *Node) Upstreams(context.Context) ([]admin.UpstreamInfo, error) {
	s := n.cluster.State()
	if s.Parsed == nil {
		return nil, n.notMember()
	}
	list := []admin.UpstreamInfo{}
	at := map[string]int{}
	for _, name := range sortedNames(s.Parsed.Upstreams) {
		u := s.Parsed.Upstreams[name]
		info := admin.UpstreamInfo{
			Name: name, Site: u.Site, Kind: string(u.Kind), URL: u.URL, Models: []string{},
			State: admin.UpstreamUnknown, MaxConcurrency: u.MaxConcurrency,
		}
		_, info.Drained = s.Drained[name]
		for _, model := range sortedNames(s.Parsed.Models) {
			for _, serve := range s.Parsed.Models[model].Serve {
				if serve.Upstream == name {
					info.Models = append(info.Models, model)
				}
			}
		}
		if u.Site != n.cfg.Site {
			n.hearsay(&info)
		}
		at[name] = len(list)
		list = append(list, info)
	}
	for _, u := range n.fleet.Status() {
		i, known := at[u.Name]
		if !known {
			continue
		}
		info := &list[i]
		info.InFlight = &u.InFlight
		info.State, info.Reason = stateOf(u.Health)
		for _, i := range u.Instances {
			state, why := stateOf(i.Health)
			info.Instances = append(info.Instances, admin.InstanceInfo{Address: i.Address, State: state, Reason: why, InFlight: i.InFlight})
		}
		if !u.Since.IsZero() {
			info.Since = &u.Since
		}
	}
	return list, nil
}

func stateOf(s upstream.Health) (admin.UpstreamState, string) {
	switch {
	case s.Healthy:
		return admin.UpstreamHealthy, ""
	case s.Known:
		return admin.UpstreamUnhealthy, s.LastErr
	}
	return admin.UpstreamUnknown, ""
}

// DrainUpstream lets an upstream get no new request from any node.
func (n *Node) DrainUpstream(ctx context.Context, name, by string) error {
	return n.setUpstream(ctx, agreed.UpstreamDrain{Name: name, Drained: true, By: by})
}

// ResumeUpstream ends that.
func (n *Node) ResumeUpstream(ctx context.Context, name, by string) error {
	return n.setUpstream(ctx, agreed.UpstreamDrain{Name: name, By: by})
}

func (n *Node) setUpstream(ctx context.Context, d agreed.UpstreamDrain) error {
	s := n.cluster.State()
	if s.Parsed == nil {
		return n.notMember()
	}
	if _, known := s.Parsed.Upstreams[d.Name]; !known {
		return fmt.Errorf("%w: %s", agreed.ErrUnknownUpstream, d.Name)
	}
	d.Configured, d.Expect = sortedNames(s.Parsed.Upstreams), s.Config.Version
	_, err := n.cluster.Propose(ctx, agreed.CmdUpstreamDrain, d)
	return err
}

// hearsay fills in what a node of the upstream's site said in its newest ping.
func (n *Node) hearsay(info *admin.UpstreamInfo) {
	var newest time.Duration = -1
	for _, p := range n.cluster.Peers() {
		if p.Site != info.Site || !p.Heard || p.Ago >= n.cluster.Timing().Patience || (newest >= 0 && p.Ago > newest) {
			continue
		}
		newest = p.Ago
		switch {
		case slices.Contains(p.UpstreamsDown, info.Name):
			info.State, info.Reason = admin.UpstreamUnhealthy, "says node "+p.Name
		case p.UpstreamsHealthy+len(p.UpstreamsDown) == p.UpstreamsTotal:
			info.State, info.Reason = admin.UpstreamHealthy, ""
		}
	}
}

// Status is the cluster at a glance.
func (n *Node) Status(context.Context) (admin.Status, error) { return n.status(), nil }

var errNoConfig = errors.New("no configuration is known here yet")
