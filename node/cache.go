package node

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/node/cache"
)

// This file is the answer cache of a node.

// cacheDir is where the embedded tier's file is, in the data directory.
const cacheDir = "cache"

const (
	// cacheOutbound bounds the kept answers that wait to be passed on.
	cacheOutbound = 16 << 20
	cacheBatch    = 64
)

// passOn offers the answers that this node keeps to every site, until ctx ends.
func (n *Node) passOn(ctx context.Context) error {
	for {
		batch, err := n.cache.Outbound().Take(ctx, cacheBatch)
		if err != nil {
			return nil // ctx has ended
		}
		for _, e := range batch {
			if err := n.work.replication.Offer(e.AppendTo(nil)); err != nil {
				n.log.Debug("a kept answer stays in this site", "err", err)
			}
		}
	}
}

// absorb takes an answer that another node keeps.
func (n *Node) absorb(item []byte) {
	e, err := cache.DecodeEntry(item)
	if err == nil {
		err = n.cache.Absorb(e)
	}
	if err != nil {
		n.log.Debug("a peer's kept answer is not taken", "err", err)
	}
}

func (n *Node) openCache() error {
	dir := filepath.Join(n.cfg.DataDir, cacheDir)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make the cache's directory: %w", err)
	}
	var err error
	n.cache, err = cache.New(cache.Options{
		Dir: dir, Site: n.cfg.Site, Ring: n.keys.Ring,
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
