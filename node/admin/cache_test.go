package admin

import (
	"context"
	"reflect"
	"testing"

	"github.com/dsnode/dsnode/cluster/agreed"
)

// CacheStats implements Caches.
func (f *fakeCluster) CacheStats(context.Context) (CacheStats, error) {
	n := int64(7)
	return CacheStats{
		Node: "shanghai-a-1", Local: CacheTier{Kind: "memory", State: "ok", Entries: &n}, Shared: CacheTier{Kind: "redis", State: "resting"},
		Requests: map[string]map[string]uint64{"local": {"hit": 3}},
	}, nil
}

// PurgeCache implements Caches.
func (f *fakeCluster) PurgeCache(_ context.Context, r CachePurge, by string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if r == (CachePurge{}) {
		return agreed.ErrBadPurge
	}
	f.notes = append(f.notes, "purge "+r.Model+r.Key+" by "+by)
	return nil
}

func TestCacheRoutes(t *testing.T) {
	f := newFake("me-1")
	c := dial(t, ClientOptions{Author: "bob"}, serve(t, f, "").URL)
	stats, err := c.CacheStats(t.Context())
	if err != nil || *stats.Local.Entries != 7 || stats.Shared.Entries != nil || stats.Requests["local"]["hit"] != 3 {
		t.Errorf("%v: %+v", err, stats)
	}
	for _, r := range []CachePurge{{Model: "m"}, {Key: "k"}} {
		if err := c.PurgeCache(t.Context(), r, "ann"); err != nil {
			t.Error(err)
		}
	}
	if err := c.PurgeCache(t.Context(), CachePurge{}, "ann"); err == nil {
		t.Error("nothing was purged without a word")
	}
	if !reflect.DeepEqual(f.notes, []string{"purge m by ann", "purge k by ann"}) {
		t.Errorf("%q", f.notes)
	}
}
