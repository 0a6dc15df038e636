package failover

import (
	"context"
	"fmt"

	"github.com/dsnode/dsnode/cluster/agreed"
)

// Proposer has a command agreed on; *cluster.Cluster is one.
type Proposer interface {
	Propose(ctx context.Context, t agreed.CommandType, data any) (index uint64, err error)
}

// Ownership checks the starts of a node's job streams with its Fence, and proposes
// changes of their owners.
type Ownership struct {
	fence    *Fence
	proposer Proposer
}

// NewOwnership makes an Ownership of the fence's node.
func NewOwnership(f *Fence, p Proposer) *Ownership { return &Ownership{fence: f, proposer: p} }

// Check permits one start of a job of a stream (its agreed.StreamKey); see
// Fence.Check.
func (o *Ownership) Check(stream string) (Permit, error) { return o.fence.Check(Stream(stream)) }

// Mine are the streams that this node owns by its copy of the agreed state,
// whether it may start their jobs now or not.
func (o *Ownership) Mine() []agreed.JobStream {
	return o.fence.standing.State().StreamsOf(o.fence.node)
}

// Changed closes at the next change of the agreed state.
func (o *Ownership) Changed() <-chan struct{} { return o.fence.standing.Changed() }

// Leased reports whether this node holds a lease now.
func (o *Ownership) Leased() bool {
	left, _ := o.fence.standing.OwnershipLease()
	return left > 0
}

// Open makes a stream of this node known to the cluster. Others may adopt it from
// the moment of the proposal, so from then on each start of its jobs needs a
// Permit. Repeating it is safe.
func (o *Ownership) Open(ctx context.Context, incarnation string) (agreed.FenceToken, error) {
	d := agreed.StreamOpen{Origin: o.fence.node, Incarnation: incarnation}
	if _, err := o.proposer.Propose(ctx, agreed.CmdStreamOpen, d); err != nil {
		return agreed.FenceToken{}, fmt.Errorf("open job stream: %w", err)
	}
	return o.agreed(ctx, agreed.StreamKey(o.fence.node, incarnation))
}

// Inherit makes a stream known that a removed node wrote and never proposed, and
// asks for it: the first node that has jobs of it and asks becomes its owner.
// Repeating it is safe. The error wraps agreed.ErrStillMember when the origin is a
// member.
func (o *Ownership) Inherit(ctx context.Context, origin, incarnation string) error {
	d := agreed.StreamInherit{Origin: origin, Incarnation: incarnation, Owner: o.fence.node}
	if _, err := o.proposer.Propose(ctx, agreed.CmdStreamInherit, d); err != nil {
		return fmt.Errorf("inherit job stream: %w", err)
	}
	_, err := o.agreed(ctx, agreed.StreamKey(origin, incarnation))
	return err
}

// agreed waits until this node's copy of the state has a stream.
func (o *Ownership) agreed(ctx context.Context, key string) (agreed.FenceToken, error) {
	for {
		changed := o.Changed()
		if j, agreed := o.fence.standing.State().Streams[key]; agreed {
			return j.Token, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return agreed.FenceToken{}, fmt.Errorf("wait for job stream %s: %w", key, ctx.Err())
		}
	}
}

// Drop removes streams of this node's from the agreed state, when no job of theirs
// is left to do.
func (o *Ownership) Drop(ctx context.Context, streams ...string) error {
	d := agreed.StreamDrop{Owner: o.fence.node, Streams: streams}
	if _, err := o.proposer.Propose(ctx, agreed.CmdStreamDrop, d); err != nil {
		return fmt.Errorf("drop job streams: %w", err)
	}
	return nil
}
