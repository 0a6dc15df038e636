package cluster

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/clusterpb"
	"github.com/dsnode/dsnode/cluster/mesh"
)

const (
	joinTimeout   = 5 * time.Second
	joinRetry     = 500 * time.Millisecond
	probeTimeout  = time.Second
	announceRetry = time.Second
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

// awaitMembership returns when this node belongs to a cluster: from an earlier run, by
// Bootstrap, or by joining through a seed.
func (c *Cluster) awaitMembership(ctx context.Context) error {
	if c.member.Load() != nil {
		return nil
	}
	if c.returning != nil {
		return c.comeBack(ctx)
	}
	retry := time.NewTicker(joinRetry)
	defer retry.Stop()
	lastLogged := ""
	for {
		for _, seed := range c.opts.Seeds {
			m, err := c.joinThrough(ctx, seed)
			if err == nil {
				c.log.Info("joined the cluster", "cluster", m.Name, "cluster_id", m.ClusterID, "generation", m.Generation.Number, "through", seed)
				return nil
			}
			if errors.Is(err, ErrNotMember) || ctx.Err() != nil {
				continue // the seed belongs to no cluster either
			}
			if errors.Is(err, agreed.ErrOperatorKey) {
				return err // retrying can't help; an operator must correct the key
			}
			message := fmt.Sprintf("seed %s: %v", seed, err)
			c.waiting.Store(&message)
			if message != lastLogged {
				lastLogged = message
				c.log.Warn("could not join the cluster, retrying", "seed", seed, "err", err)
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
		c.book.recordIndirect(n)
	}
	c.member.Store(&m)
	c.waiting.Store(nil)
	close(c.joined)
	return nil
}

// dialSeed returns a client for an address whose node's name is unknown.
func (c *Cluster) dialSeed(addr string) (clusterpb.PeerClient, func(), error) {
	conn, err := c.mesh.SeedConn(addr)
	if err != nil {
		return nil, nil, fmt.Errorf("connect to %s: %w", addr, err)
	}
	return clusterpb.NewPeerClient(conn), func() { _ = conn.Close() }, nil // no call is in progress by then
}

// tryDial dials once without gRPC, whose errors would hide the reason of a refusal at
// the preface.
func (c *Cluster) tryDial(ctx context.Context, addr string) error {
	conn, err := c.mesh.DialAddr(ctx, mesh.KindGRPC, addr)
	if err != nil {
		return err
	}
	return conn.Close()
}

func (c *Cluster) joinThrough(ctx context.Context, seed string) (memberFile, error) {
	ctx, cancel := context.WithTimeout(ctx, joinTimeout)
	defer cancel()
	if err := c.tryDial(ctx, seed); err != nil {
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
		Ticket: ticketOf(got), ClusterKey: got.GetClusterKey(), NodesAt: got.GetIndex(),
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

// join admits a node: the leader commits it, other nodes forward to the leader.
func (c *Cluster) join(ctx context.Context, r *clusterpb.JoinRequest) (*clusterpb.JoinResponse, error) {
	n := nodeOf(r.GetNode())
	if c.raft.Load() == nil {
		return nil, ErrNotMember
	}
	leader, _ := c.leader()
	switch {
	case leader == "":
		return nil, c.noQuorum()
	case leader != c.opts.Name && r.GetForwarded():
		return nil, ErrNotLeader
	case leader != c.opts.Name:
		client, err := c.client(leader)
		if err != nil {
			return nil, err
		}
		forward := proto.CloneOf(r)
		forward.Forwarded = true
		return client.Join(ctx, forward)
	}
	n.Admitted = c.State().Nodes[n.Name].Admitted
	if err := c.checkJoin(ctx, n, r); err != nil {
		c.log.Warn("join refused", "node", n.Name, "site", n.Site, "err", err)
		return nil, err
	}
	if r.GetFresh() || r.GetReturning() {
		if err := c.demoteRejoiner(n.Name); err != nil {
			return nil, err
		}
	}
	index, err := c.putNode(ctx, n, r)
	if err != nil {
		return nil, err
	}
	s := c.State()
	resp := &clusterpb.JoinResponse{
		Format: rpcFormat, ClusterId: s.ClusterID, Name: s.Name,
		Generation: s.Generation.Number, GenerationId: s.Generation.ID,
		HeartbeatMs: c.Timing().Heartbeat.Milliseconds(), Index: index,
	}
	for _, m := range s.Nodes {
		resp.Nodes = append(resp.Nodes, infoOf(m))
	}
	if s.MembersOnly() {
		resp.ClusterKey = s.PublicKey()
		if t := c.ticket(s, n.Name); t != nil {
			resp.TicketIndex, resp.Ticket = t.Index, t.Signature
		}
	}
	return resp, nil
}

// putNode agrees on a node that joins, or on what a member announces. A member that only
// lacks its ticket changes nothing.
func (c *Cluster) putNode(ctx context.Context, n agreed.Node, r *clusterpb.JoinRequest) (index uint64, err error) {
	old, known := c.State().Nodes[n.Name]
	n.JoinedAt = old.JoinedAt
	admit := emptyDisk(r) || r.GetReturning()
	if known && !r.GetFresh() && !admit && n == old {
		return old.Admitted, nil
	}
	index, err = c.Propose(ctx, agreed.CmdNodePut, agreed.NodePut{
		Node: n, Admit: admit, Empty: emptyDisk(r) && c.State().MembersOnly(),
	})
	if err != nil {
		return 0, err
	}
	attrs := []any{"node", n.Name, "site", n.Site, "rpc", n.RPC, "version", n.Version}
	switch {
	case !known && r.GetReturning():
		c.metrics.joins.WithLabelValues("returned").Inc()
		c.log.Warn("a removed node joined again with its data", append(attrs, "event", "node_joined")...)
	case !known:
		c.metrics.joins.WithLabelValues("joined").Inc()
		c.log.Warn("a node joined the cluster", append(attrs, "event", "node_joined")...)
	case r.GetFresh():
		c.metrics.joins.WithLabelValues("rejoined").Inc()
		c.log.Warn("a member joined again without its data", append(attrs, "event", "node_joined")...)
	default:
		c.log.Info("a member announced its addresses", attrs...)
	}
	return index, nil
}

// checkJoin returns an error if n can't join.
func (c *Cluster) checkJoin(ctx context.Context, n agreed.Node, r *clusterpb.JoinRequest) error {
	s := c.State()
	if s.ClusterID == "" {
		return ErrNotMember
	}
	if n.Feature < s.FeatureLevel {
		return fmt.Errorf("%w: the cluster is at feature level %d, %s announces %d: run a newer version there, or remove feature_level from its node.yaml", ErrFeatureLevel, s.FeatureLevel, n.Name, n.Feature)
	}
	if s.Parsed != nil {
		// A new cluster reaches the level of its configuration some seconds after its start.
		if level, key := s.Parsed.FeatureLevel(); n.Feature < level {
			return fmt.Errorf("%w: %s in the configuration needs feature level %d, %s announces %d", ErrFeatureLevel, key, level, n.Name, n.Feature)
		}
		if _, known := s.Parsed.Sites[n.Site]; !known {
			return fmt.Errorf("%w: %q; add it under sites with dsnode config apply first (known: %v)", ErrUnknownSite, n.Site, sortedKeys(s.Parsed.Sites))
		}
	}
	if err := s.MayOpen(n); err != nil {
		return err
	}
	if err := checkStanding(s, n, r); err != nil {
		return err
	}
	old, known := s.Nodes[n.Name]
	if known && old.Site != n.Site {
		return fmt.Errorf("%w: %s is a node of site %s; remove it there first with dsnode node remove", ErrNameTaken, n.Name, old.Site)
	}
	if err := c.admit(ctx, s, n); err != nil {
		return err
	}
	if !known || old.Instance == n.Instance {
		return nil
	}
	if there, alive := c.pingAddr(ctx, old.RPC); alive && there.Instance == old.Instance {
		return fmt.Errorf("%w: %s runs at %s since %s; stop it, or give the new node another name", ErrNameTaken, n.Name, old.RPC, old.StartedAt.Format(time.RFC3339))
	}
	return nil
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }

// pingAddr asks the node at addr about itself; false if it does not answer.
func (c *Cluster) pingAddr(ctx context.Context, addr string) (agreed.Node, bool) {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	client, done, err := c.dialSeed(addr)
	if err != nil {
		return agreed.Node{}, false
	}
	defer done()
	got, err := client.Ping(ctx, c.pingRequest())
	return nodeOf(got.GetNode()), err == nil
}

// announce proposes this process's addresses, version and instance until the agreed
// state has them. While there is no leader it also pings the seeds.
func (c *Cluster) announce(ctx context.Context) error {
	retry := time.NewTicker(announceRetry)
	defer retry.Stop()
	lastLogged := ""
	for {
		changed := c.Changed()
		c.checkOwnRemoval()
		me := c.self()
		old, known := c.State().Nodes[c.opts.Name]
		me.JoinedAt, me.Admitted = old.JoinedAt, old.Admitted
		founded, lost := c.State().ClusterID != "", c.member.Load().StoreLost
		if founded && c.removedWhy() == "" && (!known || old != me || lost || lacksTicket(c.State(), old, c.member.Load().Ticket)) {
			err := c.announceOnce(ctx, me, lost)
			if err != nil && ctx.Err() == nil && err.Error() != lastLogged {
				lastLogged = err.Error()
				c.log.Warn("could not announce this node's addresses, retrying", "err", err)
			}
		}
		if leader, _ := c.leader(); leader == "" {
			c.pingSeeds(ctx)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-retry.C:
		}
	}
}

// announceOnce proposes this process as me. A node whose raft store was lost is admitted
// like one with an empty disk, so that it may vote again.
func (c *Cluster) announceOnce(ctx context.Context, me agreed.Node, storeLost bool) error {
	ctx, cancel := context.WithTimeout(ctx, joinTimeout)
	defer cancel()
	m := c.member.Load()
	resp, err := c.join(ctx, &clusterpb.JoinRequest{
		Format: rpcFormat, Node: infoOf(me), Fresh: storeLost, Admitted: m.VoteFrom, ClusterId: m.ClusterID,
	})
	if err == nil {
		err = unrefuse(resp.GetRefused())
	}
	if err == nil && storeLost {
		err = c.voteFrom(resp.GetIndex())
	}
	if err == nil {
		err = c.keepTicket(resp)
	}
	return err
}

// pingSeeds exchanges addresses with the seeds. A member needs them only if all
// addresses in its member file are out of date, as after all other nodes restarted with
// new addresses.
func (c *Cluster) pingSeeds(ctx context.Context) {
	for _, seed := range c.opts.Seeds {
		if n, alive := c.pingAddr(ctx, seed); alive && c.isMember(n.Name) {
			c.book.recordDirect(n)
		}
	}
}

// isMember reports whether a node is a member: by the agreed state or, before this
// node has it, by the address book.
func (c *Cluster) isMember(name string) bool {
	s := c.State()
	if s.ClusterID != "" {
		_, member := s.Nodes[name]
		return member
	}
	_, known := c.book.node(name)
	return known
}
