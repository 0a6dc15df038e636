package node

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/node/cache"
)

// This file wires the answer cache into a node.

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
