package cluster

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/hashicorp/raft"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/clusterpb"
	"github.com/dsnode/dsnode/storage/notify"
)

const (
	enqueueTimeout = time.Second
	// proposeTimeout bounds a proposal whose caller set no deadline.
	proposeTimeout = 5 * time.Second
)

// Propose commits a command on any node and returns the raft index of its entry. By then
// this node has applied the entry, so the caller sees the change in State. It fails at
// once with ErrNoQuorum when no leader is known. A refusal of agreed.Apply is returned as
// the same sentinel on every node.
func (c *Cluster) Propose(ctx context.Context, t agreed.CommandType, data any) (uint64, error) {
	cmd, err := agreed.NewCommand(t, c.opts.Host.Now(), data)
	if err != nil {
		return 0, err
	}
	b, err := cmd.Encode()
	if err != nil {
		return 0, err
	}
	ctx, cancel := context.WithTimeout(ctx, proposeTimeout)
	defer cancel()
	index, err := c.route(ctx, cmd, b)
	if err != nil {
		return 0, err // without the command's name, which means nothing to users
	}
	return index, c.waitApplied(ctx, index)
}

// route commits on this node if it leads, otherwise on the leader.
func (c *Cluster) route(ctx context.Context, cmd agreed.Command, b []byte) (uint64, error) {
	if err := c.RemovedError(); err != nil {
		return 0, err
	}
	if c.member.Load() == nil {
		return 0, ErrNotMember
	}
	leader, _ := c.leader()
	switch leader {
	case "":
		return 0, c.noQuorum()
	case c.opts.Name:
		return c.commit(ctx, cmd, b)
	}
	// Raft reports a leader for a while after it has failed. If the quorum is known to
	// be lost, refuse at once instead of returning an unknown outcome later.
	if v := c.Raft(); !v.Quorum && !v.Since.IsZero() {
		return 0, c.noQuorum()
	}
	client, err := c.client(leader)
	if err != nil {
		return 0, err
	}
	got, err := client.Propose(ctx, &clusterpb.ProposeRequest{Format: rpcFormat, Command: b})
	if err != nil {
		return 0, fmt.Errorf("forward to leader %s: %w (%w)", leader, ErrLeadershipMoved, err)
	}
	if err := unrefuse(got.GetRefused()); err != nil {
		return 0, err
	}
	return got.GetIndex(), nil
}

// noQuorum is ErrNoQuorum with the time of the loss.
func (c *Cluster) noQuorum() error {
	if v := c.Raft(); !v.Quorum && !v.Since.IsZero() {
		return fmt.Errorf("%w since %s: no raft leader is known, so nothing can be changed", ErrNoQuorum, v.Since.UTC().Format(time.RFC3339))
	}
	return fmt.Errorf("%w: no raft leader is known at the moment, so nothing can be changed", ErrNoQuorum)
}

// allowedInQuarantine are the commands that a quarantined leader accepts: they can't
// contradict the decisions of a newer generation.
var allowedInQuarantine = map[agreed.CommandType]bool{agreed.CmdInit: true, agreed.CmdNodePut: true, agreed.CmdTick: true}

// commit is the leader's part of Propose.
func (c *Cluster) commit(ctx context.Context, cmd agreed.Command, b []byte) (uint64, error) {
	r := c.raft.Load()
	if r == nil {
		return 0, ErrNotMember
	}
	if c.votes.tooEarly() {
		return 0, fmt.Errorf("%w: its log is being filled again", ErrNotLeader)
	}
	if why := c.Quarantined(); why != "" && !allowedInQuarantine[cmd.Type] {
		return 0, fmt.Errorf("%w: %s", ErrQuarantined, why)
	}
	s := c.State()
	if cmd.Type != agreed.CmdInit && cmd.Type != agreed.CmdTick && cmd.Type.Level() > s.FeatureLevel {
		return 0, fmt.Errorf("%s needs feature level %d, the cluster is at %d: %w", cmd.Type, cmd.Type.Level(), s.FeatureLevel, ErrFeatureLevel)
	}
	if err := agreed.CheckProposal(s, cmd); err != nil {
		return 0, refusedByApply(err)
	}
	f := r.Apply(b, enqueueTimeout)
	done := make(chan error, 1)
	go func() { done <- f.Error() }()
	select {
	case <-ctx.Done():
		return 0, fmt.Errorf("%w (%w)", ErrLeadershipMoved, ctx.Err())
	case err := <-done:
		if err != nil {
			if errors.Is(err, raft.ErrNotLeader) {
				return 0, c.noQuorum()
			}
			return 0, translate(err)
		}
	}
	// Followers learn with the next entry that this one is committed. So lead commits a
	// tick at once: a follower that waits for this entry waits half a round trip longer,
	// without a short CommitTimeout, whose timer would run all the time.
	notify.Wake(c.committed)
	if err, refused := f.Response().(error); refused {
		return 0, refusedByApply(err)
	}
	return f.Index(), nil
}

func (c *Cluster) waitApplied(ctx context.Context, index uint64) error {
	for {
		advanced := c.fsm.advanced.Next()
		if c.fsm.applied.Load() >= index {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("committed at index %d, but not yet applied on this node: %w", index, ctx.Err())
		case <-advanced:
		}
	}
}
