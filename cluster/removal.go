package cluster

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/clusterpb"
	"github.com/dsnode/dsnode/cluster/mesh"
)

// A node that was removed while it lives, or that returns afterwards, must not go on: its
// agreed state is old, and its jobs have other owners. Members refuse every connection
// with it (Cluster.wasRemoved), also those that are open, and the refusal has the reason.
// So it learns it from the first member that it reaches, or from its own agreed state. Then
// it holds no lease any more, and notes the removal in its member file. Whoever runs the
// Cluster sees it by Removed, and stops it.
//
// At its next start a removed node asks whether an operator has admitted it again. If so,
// it joins with its data, as a member that was admitted later.

// wasRemoved says that a peer was removed; empty: not by this node's agreed state.
func (c *Cluster) wasRemoved(peer mesh.Identity, admitted uint64) string {
	s := c.State()
	if s.ClusterID == "" || !s.WasRemoved(peer.Node, admitted) {
		return ""
	}
	return removalText(s, peer.Node)
}

// removalText is for the removed node's operator.
func removalText(s *agreed.State, name string) string {
	r, known := s.Removal(name)
	switch {
	case !known:
		return fmt.Sprintf("node %s was removed, or joined again with another disk", name)
	case r.By != "":
		return fmt.Sprintf("node %s was removed at %s by %.100s", name, r.At.Format(time.RFC3339), r.By)
	}
	return fmt.Sprintf("node %s was removed at %s", name, r.At.Format(time.RFC3339))
}

// learnRemoval is called when this node learns that it was removed. It does not block.
func (c *Cluster) learnRemoval(why string) {
	if !c.removal.CompareAndSwap(nil, &why) {
		return
	}
	c.lease.end()
	close(c.removed)
	c.log.Error("this node was removed from the cluster", "reason", why)
}

// checkOwnRemoval looks for this node's removal in its own agreed state.
func (c *Cluster) checkOwnRemoval() {
	s, m := c.State(), c.member.Load()
	if s.ClusterID != "" && m != nil && s.WasRemoved(c.opts.Name, m.VoteFrom) {
		c.learnRemoval(removalText(s, c.opts.Name))
	}
}

// Removed returns a channel that closes when this node has learned that it was removed
// from the cluster: then it must stop.
func (c *Cluster) Removed() <-chan struct{} { return c.removed }

// RemovedError is ErrNodeRemoved with the reason; nil if this node has not learned of a
// removal.
func (c *Cluster) RemovedError() error {
	if why := c.removedWhy(); why != "" {
		return fmt.Errorf("%w: %s", ErrNodeRemoved, why)
	}
	return nil
}

func (c *Cluster) removedWhy() string {
	if why := c.removal.Load(); why != nil {
		return *why
	}
	return ""
}

// Returns reports whether the node with this data directory was removed: it can only join
// again, and the cluster has gone on without it.
func Returns(dataDir string) (bool, error) {
	m, err := readMemberFile(dataDir)
	return m.Removed != "", err
}

// returnWithin is how long a removed node asks at its start whether it was admitted again.
const returnWithin = 15 * time.Second

// comeBack joins again with the data of a removed node, if an operator has allowed it. The
// error wraps ErrNodeRemoved if not, also when no member could be asked.
func (c *Cluster) comeBack(ctx context.Context) error {
	m := *c.returning
	ctx, cancel := context.WithTimeout(ctx, returnWithin)
	defer cancel()
	addrs := c.opts.Seeds
	for _, n := range m.Nodes {
		if n.Name != c.opts.Name {
			addrs = append(addrs[:len(addrs):len(addrs)], n.RPC)
		}
	}
	retry := time.NewTicker(joinRetry)
	defer retry.Stop()
	err := errors.New("its node.yaml has no seeds")
	for {
		for _, addr := range addrs {
			got, askErr := c.askToReturn(ctx, addr, m)
			if askErr == nil {
				c.log.Warn("this node was removed and was admitted again: it has joined with its data", "index", got.GetIndex(), "through", addr)
				m.VoteFrom, m.Nodes, m.Removed = got.GetIndex(), nil, ""
				for _, n := range got.GetNodes() {
					m.Nodes = append(m.Nodes, nodeOf(n))
				}
				m.Ticket, m.ClusterKey, m.NodesAt = ticketOf(got), got.GetClusterKey(), got.GetIndex()
				return c.becomeMember(m)
			}
			if errors.Is(askErr, ErrNodeRemoved) {
				return askErr
			}
			if errors.Is(askErr, agreed.ErrOperatorKey) {
				return askErr // retrying can't help; an operator must correct the key
			}
			if ctx.Err() == nil {
				err = fmt.Errorf("%s: %w", addr, askErr)
			}
		}
		message := fmt.Sprintf("%s; no member could be asked yet whether it was admitted again: %s", m.Removed, err)
		c.waiting.Store(&message)
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: %s; no member could be asked whether it was admitted again: %w", ErrNodeRemoved, m.Removed, err)
		case <-retry.C:
		}
	}
}

// askToReturn asks the member at addr. The call is made as a node without a cluster:
// members refuse all others of a removed node.
func (c *Cluster) askToReturn(ctx context.Context, addr string, m memberFile) (*clusterpb.JoinResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, joinTimeout)
	defer cancel()
	if err := c.tryDial(ctx, addr); err != nil {
		return nil, err
	}
	client, done, err := c.dialSeed(addr)
	if err != nil {
		return nil, err
	}
	defer done()
	got, err := client.Join(ctx, &clusterpb.JoinRequest{
		Format: rpcFormat, Node: infoOf(c.self()), Returning: true, Admitted: m.VoteFrom,
		ClusterId: m.ClusterID, Generation: m.Generation.Number, GenerationId: m.Generation.ID,
	})
	if err != nil {
		return nil, fmt.Errorf("join again: %w", err)
	}
	return got, unrefuse(got.GetRefused())
}

// emptyDisk reports whether a node joins that knows nothing of the cluster. A member that
// lost only raft's stores knows its cluster.
func emptyDisk(r *clusterpb.JoinRequest) bool { return r.GetFresh() && r.GetClusterId() == "" }

// checkStanding is the leader's check of what a node that joins says of its past.
func checkStanding(s *agreed.State, n agreed.Node, r *clusterpb.JoinRequest) error {
	member, known := s.Nodes[n.Name]
	switch {
	case r.GetReturning():
		theirs := agreed.Generation{Number: r.GetGeneration(), ID: r.GetGenerationId()}
		if r.GetClusterId() != s.ClusterID || theirs != s.Generation {
			return fmt.Errorf("%w: its data is of another cluster or generation and can't be used here: start %s with an empty data directory", ErrNodeRemoved, n.Name)
		}
		if known && member.Instance == n.Instance {
			return nil // the answer to its first call was lost
		}
		if removal, ok := s.Removal(n.Name); !ok || removal.AdmittedAt.IsZero() || removal.Site != n.Site {
			return fmt.Errorf("%w: %s", ErrNodeRemoved, removalText(s, n.Name))
		}
	case emptyDisk(r):
		// It has nothing of an earlier member.
	case !known:
		return fmt.Errorf("%w: %s is no member", ErrNodeRemoved, n.Name)
	case s.WasRemoved(n.Name, r.GetAdmitted()):
		return fmt.Errorf("%w: %s", ErrNodeRemoved, removalText(s, n.Name))
	}
	return nil
}
