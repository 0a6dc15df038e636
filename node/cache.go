package node

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/node/admin"
	"github.com/dsnode/dsnode/node/cache"
)

// This file wires the answer cache into a node, and implements admin.Caches.

// cacheDir is the directory of the embedded tier's files in the data directory.
const cacheDir = "cache"

const (
	// cacheOutbound bounds the bytes of answers that wait to be handed to replication.
	cacheOutbound = 16 << 20
	cacheBatch    = 64
)

// passOn hands the answers that this node keeps to replication, until ctx ends.
func (n *Node) passOn(ctx context.Context) error {
	for {
		batch, err := n.cache.Outbound().Take(ctx, cacheBatch)
		if err != nil {
			return nil // ctx has ended
		}
		for _, e := range batch {
			if err := n.work.replication.Offer(e.AppendTo(nil)); err != nil {
				n.log.Debug("can't send an answer of the cache to other nodes", "err", err)
			}
		}
	}
}

// absorb adds an answer of another node to the cache.
func (n *Node) absorb(item []byte) {
	e, err := cache.DecodeEntry(item)
	if err == nil {
		err = n.cache.Absorb(e)
	}
	if err != nil {
		n.log.Debug("refused another node's answer for the cache", "err", err)
	}
}

func (n *Node) openCache() error {
	dir := filepath.Join(n.cfg.DataDir, cacheDir)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make the cache's directory: %w", err)
	}
	var err error
	n.cache, err = cache.New(cache.Options{
		Dir: dir, Site: n.cfg.Site, Ring: n.keys.ring,
		Purges: func() *agreed.CachePurges { return &n.cluster.State().Purges },
		Files: cache.Files{
			LookupEnv: os.LookupEnv,
			ReadFile:  func(path string) ([]byte, error) { return os.ReadFile(n.cfg.Path(path)) },
		},
		OutboundBytes: cacheOutbound, Logger: n.log, Registerer: n.reg,
	})
	if err != nil {
		return fmt.Errorf("make the cache: %w", err)
	}
	return nil
}

// CacheStats gives the figures of this node's cache.
func (n *Node) CacheStats(context.Context) (admin.CacheStats, error) {
	s := n.cache.Stats()
	tier := func(t cache.TierStats) admin.CacheTier {
		return admin.CacheTier{Kind: t.Kind, State: t.State, Reason: t.Reason, Entries: t.Entries, Bytes: t.Bytes, MaxBytes: t.Max}
	}
	return admin.CacheStats{
		Node: n.cfg.Name, Site: n.cfg.Site, Local: tier(s.Local), Shared: tier(s.Shared),
		Requests: s.Requests, Stored: s.Stored, Absorbed: s.Absorbed, Dropped: s.Dropped, Rebuilds: s.Rebuilds, Purges: s.Purges,
	}, nil
}

// PurgeCache makes cached answers unusable on all nodes. A node that is unreachable now
// uses none of them once it has the agreed state again.
func (n *Node) PurgeCache(ctx context.Context, r admin.CachePurge, by string) error {
	s := n.cluster.State()
	if s.Parsed == nil {
		return n.notMember()
	}
	if _, known := s.Parsed.Models[r.Model]; r.Model != "" && !known {
		return fmt.Errorf("%w: model %q is not in the configuration", admin.ErrInvalidRequest, r.Model)
	}
	if _, ok := cache.ParseKey(r.Key); r.Key != "" && !ok {
		return fmt.Errorf("%w: %q is not a key of the cache; the header Cache-Status shows keys", admin.ErrInvalidRequest, r.Key)
	}
	now := time.Now()
	_, err := n.cluster.Propose(ctx, agreed.CmdCachePurge, agreed.CachePurge{
		All: r.All, Model: r.Model, Key: r.Key, Until: now.Add(2 * s.Parsed.MaxAge()), By: by,
	})
	return err
}
