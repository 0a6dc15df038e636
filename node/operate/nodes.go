package operate

import (
	"context"
	"fmt"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/node/admin"
)

// RemoveNode removes a node that will not come back from the cluster. The Raft leader then
// removes it from the voters.
func (o *Operator) RemoveNode(ctx context.Context, name string) error {
	s := o.Cluster.State()
	if _, known := s.Nodes[name]; !known {
		return fmt.Errorf("%w: %s", agreed.ErrUnknownNode, name)
	}
	if len(s.Nodes) == 1 {
		return agreed.ErrLastVoter
	}
	if name == o.Name || o.Cluster.Peers()[name].HeardWithin(o.Cluster.Timing().Patience) {
		return fmt.Errorf("%w: %s", admin.ErrNodeAlive, name)
	}
	_, err := o.Cluster.Propose(ctx, agreed.CmdNodeRemove, agreed.NodeRemove{Name: name})
	return err
}

// DrainNode makes this node not ready, so that load balancers send it no new requests.
func (o *Operator) DrainNode(_ context.Context, name string) error { return o.drain(name, true) }

// ResumeNode makes this node ready again.
func (o *Operator) ResumeNode(_ context.Context, name string) error { return o.drain(name, false) }

// drain works for this node only. For another one it says where to ask.
func (o *Operator) drain(name string, draining bool) error {
	if name == o.Name {
		o.SetDraining(draining)
		return nil
	}
	m, known := o.Cluster.State().Nodes[name]
	if !known {
		return fmt.Errorf("%w: %s", agreed.ErrUnknownNode, name)
	}
	return fmt.Errorf("%w: ask %s at its admin address %s", admin.ErrWrongNode, name, m.Admin)
}
