package operate

import (
	"context"
	"fmt"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/node/admin"
)

// RemoveNode takes a node that is gone for good out of the cluster; the raft
// leader then takes away its vote.
func (o *Operator) RemoveNode(ctx context.Context, name string) error {
	s := o.cluster.State()
	if _, known := s.Nodes[name]; !known {
		return fmt.Errorf("%w: %s", agreed.ErrUnknownNode, name)
	}
	if len(s.Nodes) == 1 {
		return agreed.ErrLastVoter
	}
	if name == o.name || o.cluster.Peers()[name].HeardWithin(o.cluster.Timing().Patience) {
		return fmt.Errorf("%w: %s", admin.ErrNodeAlive, name)
	}
	_, err := o.cluster.Propose(ctx, agreed.CmdNodeRemove, agreed.NodeRemove{Name: name})
	return err
}

// DrainNode takes this node out of the balancers' sight.
func (o *Operator) DrainNode(_ context.Context, name string) error { return o.ownDraining(name, true) }

// ResumeNode brings it back.
func (o *Operator) ResumeNode(_ context.Context, name string) error {
	return o.ownDraining(name, false)
}

func (o *Operator) ownDraining(name string, draining bool) error {
	if name == o.name {
		o.setDraining(draining)
		return nil
	}
	m, known := o.cluster.State().Nodes[name]
	if !known {
		return fmt.Errorf("%w: %s", agreed.ErrUnknownNode, name)
	}
	return fmt.Errorf("%w: ask %s at its admin address %s", admin.ErrWrongNode, name, m.Admin)
}
