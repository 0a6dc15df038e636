package admin

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
)

// This file has the API of the answer cache, for server and client.

// Caches are the operations on the answer cache.
type Caches interface {
	// CacheStats returns the statistics of the asked node since its start.
	CacheStats(ctx context.Context) (CacheStats, error)
	// PurgeCache makes cached answers unusable in all sites, also in sites that can't be
	// reached now.
	PurgeCache(ctx context.Context, r CachePurge, by string) error
}

// CacheStats are the statistics of one node's cache.
type CacheStats struct {
	Node   string    `json:"node"`
	Site   string    `json:"site"`
	Local  CacheTier `json:"local"`
	Shared CacheTier `json:"shared"`
	// Requests counts lookups by tier and result.
	Requests map[string]map[string]uint64 `json:"requests"`
	Stored   uint64                       `json:"stored"`   // answers that this node stored
	Absorbed uint64                       `json:"absorbed"` // answers that it got from peers
	Dropped  map[string]uint64            `json:"dropped"`  // by reason
	Rebuilds uint64                       `json:"rebuilds"` // of a damaged file
	Purges   uint64                       `json:"purges"`   // agreed so far
}

// CacheTier is one tier of the cache.
type CacheTier struct {
	Kind     string `json:"kind"`  // memory, embedded, redis or off
	State    string `json:"state"` // ok, opening, resting (not used after failures), read-only (stores nothing new), or off
	Reason   string `json:"reason,omitempty"`
	Entries  *int64 `json:"entries"`   // nil: not known
	Bytes    *int64 `json:"bytes"`     // nil: not known
	MaxBytes int64  `json:"max_bytes"` // 0: the store has its own bound
}

// CachePurge says what is purged: exactly one of all, a model, a key.
type CachePurge struct {
	All   bool   `json:"all,omitempty"`
	Model string `json:"model,omitempty"`
	Key   string `json:"key,omitempty"` // as Cache-Status shows it
}

func (s *Server) postCachePurge(ctx context.Context, c call) (any, error) {
	var r CachePurge
	if err := c.decode(&r, "a purge"); err != nil {
		return nil, err
	}
	return nil, s.cluster.PurgeCache(ctx, r, c.author)
}

func (c *Client) CacheStats(ctx context.Context) (CacheStats, error) {
	return ask[CacheStats](ctx, c, http.MethodGet, "/admin/v1/cache", nil, nil)
}

func (c *Client) PurgeCache(ctx context.Context, r CachePurge, by string) error {
	body, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("encode the request for a purge: %w", err)
	}
	_, err = ask[struct{}](ctx, c, http.MethodPost, "/admin/v1/cache/purge", c.by(by), body)
	return err
}
