package operate

import (
	"context"
	"fmt"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/node/admin"
	"github.com/dsnode/dsnode/node/cache"
)

// CacheStats returns the statistics of this node's cache.
func (o *Operator) CacheStats(context.Context) (admin.CacheStats, error) {
	s := o.Cache.Stats()
	tier := func(t cache.TierStats) admin.CacheTier {
		return admin.CacheTier{Kind: t.Kind, State: t.State, Reason: t.Reason, Entries: t.Entries, Bytes: t.Bytes, MaxBytes: t.Max}
	}
	return admin.CacheStats{
		Node: o.Name, Site: o.Site, Local: tier(s.Local), Shared: tier(s.Shared),
		Requests: s.Requests, Stored: s.Stored, Absorbed: s.Absorbed, Dropped: s.Dropped, Rebuilds: s.Rebuilds, Purges: s.Purges,
	}, nil
}

// PurgeCache makes cached answers unusable on each node as soon as it has applied the
// purge.
func (o *Operator) PurgeCache(ctx context.Context, r admin.CachePurge, by string) error {
	s := o.Cluster.State()
	if s.Parsed == nil {
		return o.notMember()
	}
	if _, known := s.Parsed.Models[r.Model]; r.Model != "" && !known {
		return fmt.Errorf("%w: model %q is not in the configuration", admin.ErrInvalidRequest, r.Model)
	}
	if _, ok := cache.ParseKey(r.Key); r.Key != "" && !ok {
		return fmt.Errorf("%w: %q is not a cache key: the Cache-Status header of an answer shows the key", admin.ErrInvalidRequest, r.Key)
	}
	now := o.Host.Now()
	_, err := o.Cluster.Propose(ctx, agreed.CmdCachePurge, agreed.CachePurge{
		All: r.All, Model: r.Model, Key: r.Key, Until: now.Add(2 * s.Parsed.MaxAge()), By: by,
	})
	return err
}
