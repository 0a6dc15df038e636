package operate

import (
	"context"
	"fmt"
	"time"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/node/admin"
	"github.com/dsnode/dsnode/replication"
)

// RemoveNode removes a node that will not come back from the cluster. The Raft leader then
// removes it from the voters. If it lives, it learns of it from any member, and ends.
func (o *Operator) RemoveNode(ctx context.Context, r admin.RemovalRequest, by string) error {
	s := o.Cluster.State()
	plan, err := o.PlanRemoval(ctx, r.Node)
	switch {
	case err != nil:
		return err
	case len(s.Nodes) == 1:
		return agreed.ErrLastVoter
	case r.Node == o.Name:
		return fmt.Errorf("%w: %s can't remove itself, ask another node", admin.ErrNodeAlive, r.Node)
	case plan.State == admin.NodeAlive && !r.Force:
		return fmt.Errorf("%w: %s", admin.ErrNodeAlive, r.Node)
	case plan.Loses != "" && !r.AcceptLoss:
		return fmt.Errorf("%w: %s", admin.ErrOnlyThere, plan.Loses)
	}
	if heard, voters := o.othersHeard(r.Node); heard <= voters/2 {
		return fmt.Errorf("%w without %s: the asked node hears %d of the %d voters besides it", cluster.ErrNoQuorum, r.Node, heard, voters)
	}
	_, err = o.Cluster.Propose(ctx, agreed.CmdNodeRemove, agreed.NodeRemove{Name: r.Node, By: by})
	return err
}

// othersHeard counts the Raft voters, and those of them that this node hears now, with
// itself and without a node: that one still counts as a voter when it gets no entries any
// more.
func (o *Operator) othersHeard(without string) (heard, voters int) {
	peers, patience := o.Cluster.Peers(), o.Cluster.Timing().Patience
	for _, s := range o.Cluster.Raft().Servers {
		if !s.Voter {
			continue
		}
		voters++
		if s.Name != without && (s.Name == o.Name || peers[s.Name].HeardWithin(patience)) {
			heard++
		}
	}
	return heard, voters
}

// AdmitNode lets a removed node join again with its data.
func (o *Operator) AdmitNode(ctx context.Context, name, by string) error {
	if _, member := o.Cluster.State().Nodes[name]; member {
		return fmt.Errorf("%w: %s is a member", agreed.ErrNotRemoved, name)
	}
	_, err := o.Cluster.Propose(ctx, agreed.CmdNodeAdmit, agreed.NodeAdmit{Name: name, By: by})
	return err
}

// PlanRemoval says what would be lost with a node.
func (o *Operator) PlanRemoval(_ context.Context, name string) (admin.RemovalPlan, error) {
	v := o.view()
	n, known := v.state.Nodes[name]
	if !known {
		return admin.RemovalPlan{}, fmt.Errorf("%w: %s", agreed.ErrUnknownNode, name)
	}
	if name == o.Name {
		return admin.RemovalPlan{Node: name, Site: n.Site, State: admin.NodeAlive, LastHeardSeconds: new(0.0)}, nil
	}
	return planRemoval(n, v.nodeState(v.peers[name]), v.peers[name], o.Jobs.Alone(name)), nil
}

// reportsEvery is more than the time between two reports of a node that is heard.
const reportsEvery = 5 * time.Second

func planRemoval(n agreed.Node, state admin.NodeState, p cluster.PeerView, alone replication.Alone) admin.RemovalPlan {
	plan := admin.RemovalPlan{Node: n.Name, Site: n.Site, State: state, RecordsOnlyThere: alone.Records}
	if p.Heard {
		plan.LastHeardSeconds = new(p.Ago.Seconds())
	}
	if alone.Reported != nil {
		plan.ReportedSecondsAgo = new(alone.Reported.Seconds())
	}
	heard := lastHeard(plan.LastHeardSeconds)
	switch {
	case alone.Records == nil || alone.Reported == nil || !p.Heard:
		plan.RecordsOnlyThere = nil
		plan.Loses = fmt.Sprintf("it is not known which records only %s has, because it has not reported them to the asked node since that started; %s", n.Name, heard)
	case *alone.Records > 0:
		plan.Loses = fmt.Sprintf("%s has %d records that no other node has, as it said %s ago; %s", n.Name, *alone.Records, alone.Reported.Round(100*time.Millisecond), heard)
	case *alone.Reported > p.Ago+reportsEvery:
		plan.RecordsOnlyThere = nil
		plan.Loses = fmt.Sprintf("it is not known which records only %s has: it last said so %s ago, and may have accepted jobs since; %s", n.Name, alone.Reported.Round(100*time.Millisecond), heard)
	}
	return plan
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
