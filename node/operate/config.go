package operate

import (
	"context"
	"fmt"
	"slices"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/node/admin"
)

// Bootstrap makes this node the first member of a new cluster.
func (o *Operator) Bootstrap(ctx context.Context, text []byte, author string) error {
	return o.Cluster.Bootstrap(ctx, text, author)
}

// Config returns the agreed configuration.
func (o *Operator) Config(context.Context) (admin.ConfigVersion, error) {
	s := o.Cluster.State()
	if s.ClusterID == "" {
		return admin.ConfigVersion{}, o.notMember()
	}
	return s.Config, nil
}

// ConfigHistory lists the versions before the current one, oldest first.
func (o *Operator) ConfigHistory(context.Context) ([]admin.ConfigVersion, error) {
	s := o.Cluster.State()
	if s.ClusterID == "" {
		return nil, o.notMember()
	}
	return s.History, nil
}

// ApplyConfig replaces the configuration. expect is the version that it replaces, nil for
// the current one.
func (o *Operator) ApplyConfig(ctx context.Context, text []byte, expect *uint64, author string) (admin.ConfigVersion, error) {
	next, err := config.Parse("cluster.yaml", text)
	if err != nil {
		return admin.ConfigVersion{}, fmt.Errorf("%w: %w", admin.ErrInvalidConfig, err)
	}
	s := o.Cluster.State()
	if s.ClusterID == "" {
		return admin.ConfigVersion{}, o.notMember()
	}
	if err := checkChange(s, next); err != nil {
		return admin.ConfigVersion{}, err
	}
	version := s.Config.Version
	if expect != nil {
		version = *expect
	}
	hash := cluster.HashConfig(text)
	if version == s.Config.Version && hash == s.Config.Hash {
		return s.Config, nil
	}
	_, err = o.Cluster.Propose(ctx, agreed.CmdConfigSet, agreed.ConfigSet{Expect: version, Text: string(text), Hash: hash, Author: author})
	if err != nil {
		return admin.ConfigVersion{}, err
	}
	return o.Cluster.State().Config, nil
}

// checkChange refuses a configuration that is valid but can't replace the present one.
func checkChange(s *agreed.State, next *config.Config) error {
	if s.Parsed != nil && next.Timing != s.Parsed.Timing {
		return fmt.Errorf("%w: timing.heartbeat is %s since the bootstrap and can't change while the cluster runs: nodes with different leases could act as primary at the same time",
			admin.ErrInvalidConfig, s.Parsed.Timing.Heartbeat)
	}
	present := s.FeatureLevel
	if s.Parsed != nil { // a new cluster reaches the level of its configuration some seconds after its start
		level, _ := s.Parsed.FeatureLevel()
		present = max(present, level)
	}
	if level, key := next.FeatureLevel(); level > present {
		return fmt.Errorf("%w: %s needs feature level %d, the cluster is at %d", cluster.ErrFeatureLevel, key, level, s.FeatureLevel)
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

// RollbackConfig applies the text of an earlier version as a new version.
func (o *Operator) RollbackConfig(ctx context.Context, to uint64, expect *uint64, author string) (admin.ConfigVersion, error) {
	s := o.Cluster.State()
	if s.ClusterID == "" {
		return admin.ConfigVersion{}, o.notMember()
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
	return o.ApplyConfig(ctx, []byte(s.History[i].Text), expect, author)
}
