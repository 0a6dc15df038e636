package cluster

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/clusterpb"
	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/cluster/mesh"
)

const (
	joinTimeout   = 5 * time.Second
	joinRetry     = 500 * time.Millisecond
	aliveTimeout  = time.Second
	announceRetry = time.Second
	rememberEvery = 2 * time.Second
)

func infoOf(n agreed.Node) *clusterpb.NodeInfo {
	return &clusterpb.NodeInfo{
		Name: n.Name, Site: n.Site, Rpc: n.RPC, Gossip: n.Gossip, Api: n.API, Admin: n.Admin,
		Version: n.Version, Feature: uint32(n.Feature), Instance: n.Instance, //nolint:gosec // a small constant
		StartedUnixMs: n.StartedAt.UnixMilli(),
		OperatorKey:   n.OperatorKey, OperatorKeyPrevious: n.OperatorKeyPrevious,
	}
}

func nodeOf(i *clusterpb.NodeInfo) agreed.Node {
	return agreed.Node{
		Name: i.GetName(), Site: i.GetSite(), RPC: i.GetRpc(), Gossip: i.GetGossip(), API: i.GetApi(),
		Admin: i.GetAdmin(), Version: i.GetVersion(), Feature: int(i.GetFeature()), Instance: i.GetInstance(),
		StartedAt:   time.UnixMilli(i.GetStartedUnixMs()).UTC(),
		OperatorKey: i.GetOperatorKey(), OperatorKeyPrevious: i.GetOperatorKeyPrevious(),
	}
}

// awaitMembership returns once this node belongs to a cluster: it did before,
// somebody bootstraps it, or a seed lets it in.
func (c *Cluster) awaitMembership(ctx context.Context) error {
	if c.member.Load() != nil {
		return nil
	}
	retry := time.NewTicker(joinRetry)
	defer retry.Stop()
	said := ""
	for {
		for _, seed := range c.opts.Seeds {
			m, err := c.joinThrough(ctx, seed)
			if err == nil {
				c.log.Info("joined", "cluster", m.Name, "cluster_id", m.ClusterID, "generation", m.Generation.Number, "through", seed)
				return nil
			}
			if errors.Is(err, ErrNotMember) || ctx.Err() != nil {
				continue // a seed that waits like us
			}
			if errors.Is(err, agreed.ErrOperatorKey) {
				return err // no wait helps; a person must look
			}
			words := fmt.Sprintf("seed %s: %v", seed, err)
			c.waiting.Store(&words)
			if words != said {
				said = words
				c.log.Warn("not joined", "seed", seed, "err", err)
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case m := <-c.founded:
			return c.becomeMember(m)
		case <-retry.C:
		}
	}
}

func (c *Cluster) becomeMember(m memberFile) error {
	c.founding.Lock()
	defer c.founding.Unlock()
	if err := writeMemberFile(c.opts.DataDir, m); err != nil {
		return err
	}
	if err := c.setTiming(m.heartbeat()); err != nil {
		return err
	}
	for _, n := range m.Nodes {
		c.book.learn(n)
	}
	c.member.Store(&m)
	c.waiting.Store(nil)
	close(c.joined)
	return nil
}

// dialSeed gives a client for an address whose node isn't known by name.
func (c *Cluster) dialSeed(addr string) (clusterpb.PeerClient, func(), error) {
	conn, err := c.mesh.SeedConn(addr)
	if err != nil {
		return nil, nil, fmt.Errorf("connect to %s: %w", addr, err)
	}
	return clusterpb.NewPeerClient(conn), func() { _ = conn.Close() }, nil // nothing is under way on it
}

// reachable dials once, so that a refusal at the preface keeps its words, which
// grpc would bury in its own.
func (c *Cluster) reachable(ctx context.Context, addr string) error {
	conn, err := c.mesh.DialAddr(ctx, mesh.KindGRPC, addr)
	if err != nil {
		return err
	}
	return conn.Close()
}

func (c *Cluster) joinThrough(ctx context.Context, seed string) (memberFile, error) {
	ctx, cancel := context.WithTimeout(ctx, joinTimeout)
	defer cancel()
	if err := c.reachable(ctx, seed); err != nil {
		return memberFile{}, err
	}
	client, done, err := c.dialSeed(seed)
	if err != nil {
		return memberFile{}, err
	}
	defer done()
	got, err := client.Join(ctx, &clusterpb.JoinRequest{Format: rpcFormat, Node: infoOf(c.self()), Fresh: true})
	if err != nil {
		return memberFile{}, fmt.Errorf("join: %w", err)
	}
	if err := unrefuse(got.GetRefused()); err != nil {
		return memberFile{}, err
	}
	if got.GetName() != c.opts.ClusterName {
		return memberFile{}, fmt.Errorf("%w: it is %q, this node is configured for %q", ErrWrongCluster, got.GetName(), c.opts.ClusterName)
	}
	m := memberFile{
		ClusterID: got.GetClusterId(), Name: got.GetName(), HeartbeatMS: got.GetHeartbeatMs(),
		Generation: agreed.Generation{Number: got.GetGeneration(), ID: got.GetGenerationId()}, VoteFrom: got.GetIndex(),
	}
	for _, n := range got.GetNodes() {
		m.Nodes = append(m.Nodes, nodeOf(n))
	}
	c.founding.Lock()
	already := c.member.Load() != nil
	c.founding.Unlock()
	if already {
		return *c.member.Load(), nil
	}
	return m, c.becomeMember(m)
}

// join admits n: on the leader by agreement, elsewhere by asking the leader. A
// fresh one has nothing on its disk.
func (c *Cluster) join(ctx context.Context, n agreed.Node, fresh, forwarded bool) (*clusterpb.JoinResponse, error) {
	if c.raft.Load() == nil {
		return nil, ErrNotMember
	}
	leader, _ := c.leader()
	switch {
	case leader == "":
		return nil, c.noQuorum()
	case leader != c.opts.Name && forwarded:
		return nil, ErrNotLeader
	case leader != c.opts.Name:
		client, err := c.client(leader)
		if err != nil {
			return nil, err
		}
		return client.Join(ctx, &clusterpb.JoinRequest{Format: rpcFormat, Node: infoOf(n), Fresh: fresh, Forwarded: true})
	}
	if err := c.mayJoin(ctx, n); err != nil {
		c.log.Warn("join refused", "node", n.Name, "site", n.Site, "err", err)
		return nil, err
	}
	if fresh {
		if err := c.disenfranchise(n.Name); err != nil {
			return nil, err
		}
	}
	index, err := c.Propose(ctx, agreed.CmdNodePut, n)
	if err != nil {
		return nil, err
	}
	c.log.Info("join accepted", "node", n.Name, "site", n.Site, "rpc", n.RPC, "version", n.Version)
	s := c.State()
	resp := &clusterpb.JoinResponse{
		Format: rpcFormat, ClusterId: s.ClusterID, Name: s.Name,
		Generation: s.Generation.Number, GenerationId: s.Generation.ID,
		HeartbeatMs: c.Timing().Heartbeat.Milliseconds(), Index: index,
	}
	for _, m := range s.Nodes {
		resp.Nodes = append(resp.Nodes, infoOf(m))
	}
	return resp, nil
}

// mayJoin refuses what would break the cluster.
func (c *Cluster) mayJoin(ctx context.Context, n agreed.Node) error {
	s := c.State()
	if s.ClusterID == "" {
		return ErrNotMember
	}
	if n.Feature < s.FeatureLevel {
		return fmt.Errorf("%w: the cluster is at feature level %d, %s supports %d: run a newer version there", ErrFeatureLevel, s.FeatureLevel, n.Name, n.Feature)
	}
	if s.Parsed != nil {
		if _, known := s.Parsed.Sites[n.Site]; !known {
			return fmt.Errorf("%w: %q; add it under sites with dsnode config apply first (known: %v)", ErrUnknownSite, n.Site, sortedKeys(s.Parsed.Sites))
		}
	}
	if err := s.MayOpen(n); err != nil {
		return err
	}
	old, known := s.Nodes[n.Name]
	if !known || old.Instance == n.Instance {
		return nil
	}
	if old.Site != n.Site {
		return fmt.Errorf("%w: %s is a node of site %s; remove it there first with dsnode node remove", ErrNameTaken, n.Name, old.Site)
	}
	if instance, alive := c.aliveAt(ctx, old.RPC); alive && instance == old.Instance && instance != n.Instance {
		return fmt.Errorf("%w: %s runs at %s since %s; stop it, or give the new node another name", ErrNameTaken, n.Name, old.RPC, old.StartedAt.Format(time.RFC3339))
	}
	return nil
}

// aliveAt asks whoever listens at addr for its instance.
func (c *Cluster) aliveAt(ctx context.Context, addr string) (string, bool) {
	ctx, cancel := context.WithTimeout(ctx, aliveTimeout)
	defer cancel()
	client, done, err := c.dialSeed(addr)
	if err != nil {
		return "", false
	}
	defer done()
	got, err := client.Ping(ctx, &clusterpb.PingRequest{Format: rpcFormat, Node: infoOf(c.self()), Health: c.health()})
	if err != nil {
		return "", false
	}
	return got.GetNode().GetInstance(), true
}

// Bootstrap founds a cluster with this node as its first. Repeating it with the
// same configuration is fine; it is refused when this node or a seed already
// belongs to a cluster.
func (c *Cluster) Bootstrap(ctx context.Context, text []byte, author string) error {
	cfg, err := config.Parse("cluster.yaml", text)
	if err != nil {
		return err
	}
	if _, known := cfg.Sites[c.opts.Site]; !known {
		return fmt.Errorf("%w: this node's site %q; known: %v", ErrUnknownSite, c.opts.Site, sortedKeys(cfg.Sites))
	}
	hash := HashConfig(text)
	if s := c.State(); s.ClusterID != "" {
		return sameCluster(s, hash)
	}
	m := c.member.Load()
	if m == nil {
		if m, err = c.found(ctx, cfg); err != nil {
			return err
		}
	}
	// From here on a crash is cured by repeating the call: raft is founded, and
	// only the first entry may be missing.
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

// found makes the membership of a new cluster and gives it to Run, which saves
// it and bootstraps raft's stores.
func (c *Cluster) found(ctx context.Context, cfg *config.Config) (*memberFile, error) {
	for _, seed := range c.opts.Seeds {
		sctx, cancel := context.WithTimeout(ctx, aliveTimeout)
		err := c.seedIsFree(sctx, seed)
		cancel()
		if err != nil {
			return nil, err
		}
	}
	c.founding.Lock()
	defer c.founding.Unlock()
	if m := c.member.Load(); m != nil {
		return nil, fmt.Errorf("%w: this node joined %q a moment ago", agreed.ErrAlreadyFounded, m.Name)
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
		return nil, fmt.Errorf("%w: another bootstrap is under way", agreed.ErrAlreadyFounded)
	}
}

// seedIsFree refuses when a seed answers for a cluster. One that does not
// answer can't be asked, and must not block the first node of all.
func (c *Cluster) seedIsFree(ctx context.Context, seed string) error {
	client, done, err := c.dialSeed(seed)
	if err != nil {
		return nil
	}
	defer done()
	_, err = client.Ping(ctx, &clusterpb.PingRequest{Format: rpcFormat, Node: infoOf(c.self()), Health: c.health()})
	if err != nil {
		return nil
	}
	got, err := client.Join(ctx, &clusterpb.JoinRequest{Format: rpcFormat, Node: infoOf(c.self())})
	if err != nil {
		return nil
	}
	if err := unrefuse(got.GetRefused()); errors.Is(err, ErrNotMember) {
		return nil
	}
	return fmt.Errorf("%w (%s)", ErrSeedKnows, seed)
}

// announce tells the cluster this process's addresses, version and instance
// until the agreed state has them.
func (c *Cluster) announce(ctx context.Context) error {
	retry := time.NewTicker(announceRetry)
	defer retry.Stop()
	said := ""
	for {
		changed := c.Changed()
		me := c.self()
		old, known := c.State().Nodes[c.opts.Name]
		me.JoinedAt = old.JoinedAt
		if founded := c.State().ClusterID != ""; founded && (!known || old != me) {
			jctx, cancel := context.WithTimeout(ctx, joinTimeout)
			resp, err := c.join(jctx, me, false, false)
			cancel()
			if err == nil {
				err = unrefuse(resp.GetRefused())
			}
			if err != nil && ctx.Err() == nil && err.Error() != said {
				said = err.Error()
				c.log.Warn("the cluster does not know this node's addresses yet", "err", err)
			}
		}
		if leader, _ := c.leader(); leader == "" {
			c.meetSeeds(ctx)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-retry.C:
		}
	}
}

// meetSeeds exchanges addresses with the seeds. A member needs them only when
// every address that it remembers is stale, as after a restart of everything
// elsewhere.
func (c *Cluster) meetSeeds(ctx context.Context) {
	for _, seed := range c.opts.Seeds {
		client, done, err := c.dialSeed(seed)
		if err != nil {
			continue
		}
		sctx, cancel := context.WithTimeout(ctx, aliveTimeout)
		got, err := client.Ping(sctx, &clusterpb.PingRequest{Format: rpcFormat, Node: infoOf(c.self()), Health: c.health()})
		cancel()
		done()
		if err == nil && c.knows(got.GetNode().GetName()) {
			c.book.heard(nodeOf(got.GetNode()))
		}
	}
}

// knows reports whether a node is a member, as agreed or, before this node has
// learnt the agreed state, as remembered.
func (c *Cluster) knows(name string) bool {
	s := c.State()
	if s.ClusterID != "" {
		_, member := s.Nodes[name]
		return member
	}
	_, remembered := c.book.node(name)
	return remembered
}

// remember keeps the member file's list of nodes up to date, for the next start.
func (c *Cluster) remember(ctx context.Context) error {
	tick := time.NewTicker(rememberEvery)
	defer tick.Stop()
	for {
		changed := c.Changed()
		if err := c.rememberNow(); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return c.rememberNow()
		case <-changed:
		case <-tick.C:
		}
	}
}

func (c *Cluster) rememberNow() error {
	s, m := c.State(), *c.member.Load()
	if s.ClusterID == "" {
		return nil
	}
	nodes := make([]agreed.Node, 0, len(s.Nodes))
	for name, n := range s.Nodes {
		if known, ok := c.book.node(name); ok && known.StartedAt.After(n.StartedAt) {
			known.JoinedAt = n.JoinedAt
			n = known
		}
		nodes = append(nodes, n)
	}
	slices.SortFunc(nodes, func(a, b agreed.Node) int { return compareStrings(a.Name, b.Name) })
	if !m.Founder && slices.Equal(nodes, m.Nodes) {
		return nil
	}
	m.Nodes, m.Founder = nodes, false
	if err := writeMemberFile(c.opts.DataDir, m); err != nil {
		c.log.Warn("membership not saved; the next start knows older addresses", "err", err)
		return nil
	}
	c.member.Store(&m)
	return nil
}
