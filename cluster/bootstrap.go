package cluster

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/cluster/mesh"
)

// Bootstrap founds a cluster with this node as its first member. Repeating it with the
// same configuration is not an error. It is refused if this node or a seed already
// belongs to a cluster.
func (c *Cluster) Bootstrap(ctx context.Context, text []byte, author string) error {
	cfg, err := config.Parse("cluster.yaml", text)
	if err != nil {
		return err
	}
	if _, known := cfg.Sites[c.opts.Site]; !known {
		return fmt.Errorf("%w: this node's site is %q, the configuration has %v", ErrUnknownSite, c.opts.Site, sortedKeys(cfg.Sites))
	}
	if c.returning != nil {
		return fmt.Errorf("%w: %s", ErrNodeRemoved, c.returning.Removed)
	}
	if level, key := cfg.FeatureLevel(); level > c.self().Feature {
		return fmt.Errorf("%w: %s in the configuration needs feature level %d, this node announces %d", ErrFeatureLevel, key, level, c.self().Feature)
	}
	hash := HashConfig(text)
	if s := c.State(); s.ClusterID != "" {
		return sameCluster(s, hash)
	}
	m := c.member.Load()
	if m == nil {
		if m, err = c.foundCluster(ctx, cfg); err != nil {
			return err
		}
	}
	// After a crash from here on, repeating the call completes the bootstrap: only the
	// first entry may be missing.
	if err := c.waitLeader(ctx, c.opts.Name); err != nil {
		return fmt.Errorf("bootstrap: %w", err)
	}
	if s := c.State(); s.ClusterID != "" {
		return sameCluster(s, hash)
	}
	_, err = c.Propose(ctx, agreed.CmdInit, agreed.Init{
		ClusterID: m.ClusterID, Name: m.Name, Generation: m.Generation, Node: c.self(),
		Config: agreed.ConfigVersion{Hash: hash, Author: author, Text: string(text)},
	})
	if errors.Is(err, agreed.ErrAlreadyFounded) {
		return sameCluster(c.State(), hash)
	}
	return err
}

// HashConfig is the SHA-256 of a configuration's text, in hex.
func HashConfig(text []byte) string {
	h := sha256.Sum256(text)
	return hex.EncodeToString(h[:])
}

func sameCluster(s *agreed.State, hash string) error {
	if s.Config.Hash == hash {
		return nil
	}
	for _, old := range s.History {
		if old.Version == 1 && old.Hash == hash {
			return nil
		}
	}
	return fmt.Errorf("%w, with another configuration: change it with dsnode config apply", agreed.ErrAlreadyFounded)
}

// foundCluster creates the membership of a new cluster and passes it to Run, which
// saves it and bootstraps raft's stores.
func (c *Cluster) foundCluster(ctx context.Context, cfg *config.Config) (*memberFile, error) {
	for _, seed := range c.opts.Seeds {
		sctx, cancel := context.WithTimeout(ctx, probeTimeout)
		err := c.checkSeed(sctx, seed)
		cancel()
		if err != nil {
			return nil, err
		}
	}
	c.founding.Lock()
	defer c.founding.Unlock()
	if m := c.member.Load(); m != nil {
		return nil, fmt.Errorf("%w: this node has just joined %q", agreed.ErrAlreadyFounded, m.Name)
	}
	var id, generation [16]byte
	_, _ = rand.Read(id[:]) // never fails
	_, _ = rand.Read(generation[:])
	m := memberFile{
		ClusterID: hex.EncodeToString(id[:]), Name: c.opts.ClusterName,
		Generation:  agreed.Generation{Number: 1, ID: hex.EncodeToString(generation[:])},
		HeartbeatMS: cfg.Timing.Heartbeat.D().Milliseconds(),
		Nodes:       []agreed.Node{c.self()}, Founder: true,
	}
	select {
	case c.founded <- m:
		c.foundedNow.Store(true)
		return &m, nil
	default:
		return nil, fmt.Errorf("%w: another bootstrap is in progress", agreed.ErrAlreadyFounded)
	}
}

// checkSeed returns ErrSeedKnows if a seed belongs to a cluster, which it says in the
// handshake. A seed that does not answer is ignored: the first node must be able to start
// alone.
func (c *Cluster) checkSeed(ctx context.Context, seed string) error {
	conn, err := c.mesh.DialAddr(ctx, mesh.KindGRPC, seed)
	if err != nil {
		return nil
	}
	defer func() { _ = conn.Close() }() // nothing was sent on it
	if !conn.Founded() {
		return nil
	}
	return fmt.Errorf("%w (%s)", ErrSeedKnows, seed)
}
