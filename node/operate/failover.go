package operate

import (
	"context"
	"fmt"
	"slices"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/failover"
	"github.com/dsnode/dsnode/node/admin"
)

func switchoverRequest(r admin.FailoverRequest, by string) failover.SwitchoverRequest {
	return failover.SwitchoverRequest{To: r.To, By: by, Kind: agreed.FailoverPlanned, AcceptLoss: r.AcceptLoss, Waive: r.Waive}
}

// PlanFailover runs the checks of a switchover and changes nothing.
func (o *Operator) PlanFailover(_ context.Context, r admin.FailoverRequest, by string) (admin.FailoverPlan, error) {
	c, err := o.control()
	if err != nil {
		return admin.FailoverPlan{}, err
	}
	p := admin.FailoverPlan{To: r.To, Checks: c.Coordinator.Precheck(switchoverRequest(r, by))}
	p.OK = allPass(p.Checks, r.Waive)
	if s := o.Cluster.State(); s.ClusterID != "" {
		p.From, p.Epoch = &s.Primary.Site, &s.Primary.Epoch
	}
	return p, nil
}

func allPass(checks []failover.Check, waive []string) bool {
	return !slices.ContainsFunc(checks, func(c failover.Check) bool { return !c.Passes(waive) })
}

// Failover moves the primary in a planned switchover. It goes on when the caller hangs up:
// every step has its own deadline.
func (o *Operator) Failover(ctx context.Context, r admin.FailoverRequest, by string) (admin.FailoverResult, error) {
	c, err := o.control()
	if err != nil {
		return admin.FailoverResult{}, err
	}
	res, err := c.Coordinator.Switchover(context.WithoutCancel(ctx), switchoverRequest(r, by))
	if err != nil {
		return admin.FailoverResult{}, err
	}
	out := admin.FailoverResult{
		ID: res.ID, From: res.From, To: res.To, Epoch: res.Epoch, IdleSeconds: res.Idle.Seconds(),
		RecordsAtRisk: res.RecordsAtRisk, RPOSeconds: res.RPOSeconds, LeaderMoved: res.LeaderMoved, Checks: res.Checks,
	}
	for _, step := range res.Steps {
		out.Steps = append(out.Steps, admin.FailoverStep{Name: step.Name, At: step.At.UTC(), TookSeconds: step.Took.Seconds(), Error: step.Err})
	}
	return out, nil
}

// AckFailover records that an operator has seen the last failover.
func (o *Operator) AckFailover(ctx context.Context, by string) error {
	s := o.Cluster.State()
	if s.ClusterID == "" {
		return o.notMember()
	}
	if s.LastFailover == nil || s.LastFailover.Acknowledged {
		return admin.ErrNothingToAck
	}
	_, err := o.Cluster.Propose(ctx, agreed.CmdFailoverAck, agreed.FailoverAck{Epoch: s.LastFailover.Epoch, By: by})
	return err
}

// HoldFailover pauses automatic promotions.
func (o *Operator) HoldFailover(ctx context.Context, reason, by string) error {
	_, err := o.Cluster.Propose(ctx, agreed.CmdFailoverHold, agreed.FailoverHold{Held: true, Reason: reason, By: by})
	return err
}

// ResumeFailover allows automatic promotions again.
func (o *Operator) ResumeFailover(ctx context.Context, by string) error {
	_, err := o.Cluster.Propose(ctx, agreed.CmdFailoverHold, agreed.FailoverHold{By: by})
	return err
}

// ReleaseQuarantine ends the quarantine, because an operator knows that the cluster was
// not recovered elsewhere. Only the Raft leader can do it.
func (o *Operator) ReleaseQuarantine(context.Context) error {
	if o.Cluster.Quarantined() == "" {
		return o.notQuarantined()
	}
	o.EndQuarantine()
	o.Log.Warn("quarantine released by an operator")
	return nil
}

// failbackAvailable is the site to which the primary could be moved back, nil for none.
func (o *Operator) failbackAvailable() *string {
	c := o.Control()
	if c == nil {
		return nil
	}
	view, _, _, looked := c.Coordinator.Look()
	if !looked {
		return nil
	}
	site, ok := failover.FailbackAvailable(view)
	if !ok {
		return nil
	}
	return &site
}

// notQuarantined says why this node can't end a quarantine.
func (o *Operator) notQuarantined() error {
	r := o.Cluster.Raft()
	if r.Quorum || r.Leads {
		return admin.ErrNotQuarantined
	}
	if m, known := o.Cluster.State().Nodes[r.Leader]; known {
		return fmt.Errorf("%w: ask the raft leader, %s, at its admin address %s", admin.ErrWrongNode, r.Leader, m.Admin)
	}
	return fmt.Errorf("%w: it is not the raft leader, and it does not know the leader", admin.ErrWrongNode)
}
