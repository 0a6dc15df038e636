package node

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/node/cache"
)

const (
	cacheDir = "cache" // in the data directory; has the files of the embedded tier
	// outboundBytes bounds the cache entries that wait to be offered to other nodes.
	outboundBytes = 16 << 20
	// outboundBatch is how many entries are taken at a time.
	outboundBatch = 64
)

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
		OutboundBytes: outboundBytes, Now: n.host.Now, Logger: n.log, Registerer: n.reg,
	})
	if err != nil {
		return fmt.Errorf("make the cache: %w", err)
	}
	return nil
}

// replicateEntries offers the cache entries of this node to the other nodes, until ctx
// ends.
func (n *Node) replicateEntries(ctx context.Context) error {
	for {
		batch, err := n.cache.Outbound().Take(ctx, outboundBatch)
		if err != nil {
			return nil // ctx has ended
		}
		for _, e := range batch {
			if err := n.jobs.replication.Offer(e.AppendTo(nil)); err != nil {
				n.log.Debug("can't offer a cache entry to other nodes", "err", err)
			}
		}
	}
}

// storeEntry stores a cache entry of another node.
func (n *Node) storeEntry(item []byte) {
	e, err := cache.DecodeEntry(item)
	if err == nil {
		err = n.cache.Absorb(e)
	}
	if err != nil {
		n.log.Debug("can't store a cache entry of another node", "err", err)
	}
}
