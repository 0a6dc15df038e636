package admin

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
)

// This file is the surface of the answer cache, on both sides of the wire.

// Caches is what operators ask about kept answers.
type Caches interface {
	// CacheStats gives the figures of the node that is asked, since its start.
	CacheStats(ctx context.Context) (CacheStats, error)
	// PurgeCache makes answers that are kept anywhere unusable, also those in
	// sites that are away now.
	PurgeCache(ctx context.Context, r CachePurge, by string) error
}

// CacheStats are one node's figures.
type CacheStats struct {
	Node   string    `json:"node"`
	Site   string    `json:"site"`
	Local  CacheTier `json:"local"`
	Shared CacheTier `json:"shared"`
	// Requests are looks by tier and result.
	Requests map[string]map[string]uint64 `json:"requests"`
	Stored   uint64                       `json:"stored"`   // answers that this node kept
	Absorbed uint64                       `json:"absorbed"` // and took from peers
	Dropped  map[string]uint64            `json:"dropped"`  // by reason
	Rebuilds uint64                       `json:"rebuilds"` // of a damaged file
	Purges   uint64                       `json:"purges"`   // agreed on so far
}

// CacheTier is one tier.
type CacheTier struct {
	Kind     string `json:"kind"`  // memory, embedded, redis or off
	State    string `json:"state"` // ok, opening, resting after failures, read-only (it takes nothing new), or off
	Reason   string `json:"reason,omitempty"`
	Entries  *int64 `json:"entries"`   // nil: not known
	Bytes    *int64 `json:"bytes"`     // nil: not known
	MaxBytes int64  `json:"max_bytes"` // 0: a bound of its own
}

// CachePurge names what is purged: exactly one of everything, a model, a key.
type CachePurge struct {
	All   bool   `json:"all,omitempty"`
	Model string `json:"model,omitempty"`
	Key   string `json:"key,omitempty"` // as Cache-Status shows it
}

func (s *Server) getCache(ctx context.Context, _ call) (any, error) {
	return s.cluster.CacheStats(ctx)
}

func (s *Server) postCachePurge(ctx context.Context, c call) (any, error) {
	var r CachePurge
	if err := c.decode(&r, "a purge"); err != nil {
		return nil, err
	}
	return nil, s.cluster.PurgeCache(ctx, r, c.author)
}

// CacheStats implements Caches.
func (c *Client) CacheStats(ctx context.Context) (CacheStats, error) {
	return ask[CacheStats](ctx, c, http.MethodGet, "/admin/v1/cache", nil, nil)
}

// PurgeCache implements Caches.
func (c *Client) PurgeCache(ctx context.Context, r CachePurge, by string) error {
	body, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("encode the request for a purge: %w", err)
	}
	_, err = ask[struct{}](ctx, c, http.MethodPost, "/admin/v1/cache/purge", c.by(by), body)
	return err
}
