package main

import (
	"context"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/node/admin"
)

// CacheStats implements admin.Caches.
func (*fakeCluster) CacheStats(context.Context) (admin.CacheStats, error) {
	return admin.CacheStats{
		Node:  fakeNode,
		Local: admin.CacheTier{Kind: "memory", State: "ok", Entries: ptr(int64(12)), Bytes: ptr(int64(4096)), MaxBytes: 1 << 20},
		// A Redis does not say.
		Shared:   admin.CacheTier{Kind: "redis", State: "resting", Reason: "redis: connection refused"},
		Requests: map[string]map[string]uint64{"local": {"hit": 5, "miss": 2}},
	}, nil
}

// PurgeCache implements admin.Caches.
func (f *fakeCluster) PurgeCache(_ context.Context, r admin.CachePurge, _ string) error {
	if r.Key == "full" {
		return agreed.ErrStateFull
	}
	return nil
}
