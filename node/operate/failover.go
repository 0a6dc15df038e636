package operate

import (
	"context"
	"fmt"
	"slices"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/failover"
	"github.com/dsnode/dsnode/node/admin"
)

// This file is admin.Failovers: planned switchovers, the hold, and the quarantine.

// commanding gives the coordinator and the drills, or the reason why there are none yet.
func (o *Operator) commanding() (*Command, error) {
	if c := o.command(); c != nil {
		return c, nil
	}
	return nil, o.notMember()
}

func switchoverOf(r admin.FailoverRequest, by string) failover.SwitchoverRequest {
	return failover.SwitchoverRequest{To: r.To, By: by, Kind: agreed.FailoverPlanned, AcceptLoss: r.AcceptLoss, Waive: r.Waive}
}

// PlanFailover gives the checks of a switchover and changes nothing.
func (o *Operator) PlanFailover(_ context.Context, r admin.FailoverRequest, by string) (admin.FailoverPlan, error) {
	c, err := o.commanding()
	if err != nil {
		return admin.FailoverPlan{}, err
	}
	p := admin.FailoverPlan{To: r.To, Checks: c.Coordinator.Precheck(switchoverOf(r, by))}
	p.OK = allPass(p.Checks, r.Waive)
	if s := o.cluster.State(); s.ClusterID != "" {
		p.From, p.Epoch = &s.Primary.Site, &s.Primary.Epoch
	}
	return p, nil
}

func allPass(checks []failover.Check, waive []string) bool {
	return !slices.ContainsFunc(checks, func(c failover.Check) bool { return !c.Passes(waive) })
}

// Failover carries out a planned switchover. It goes on when the client disconnects:
// every step has its own deadline.
func (o *Operator) Failover(ctx context.Context, r admin.FailoverRequest, by string) (admin.FailoverResult, error) {
	c, err := o.commanding()
	if err != nil {
		return admin.FailoverResult{}, err
	}
	res, err := c.Coordinator.Switchover(context.WithoutCancel(ctx), switchoverOf(r, by))
	if err != nil {
		return admin.FailoverResult{}, err
	}
	out := admin.FailoverResult{
		ID: res.ID, From: res.From, To: res.To, Epoch: res.Epoch, IdleSeconds: res.Idle.Seconds(),
		RecordsAtRisk: res.RecordsAtRisk, LeaderMoved: res.LeaderMoved, Checks: res.Checks,
	}
	for _, step := range res.Steps {
		out.Steps = append(out.Steps, admin.FailoverStep{Name: step.Name, At: step.At.UTC(), TookSeconds: step.Took.Seconds(), Error: step.Err})
	}
	return out, nil
}

// AckFailover records that an operator has seen the last failover.
func (o *Operator) AckFailover(ctx context.Context, by string) error {
	s := o.cluster.State()
	if s.ClusterID == "" {
		return o.notMember()
	}
	if s.LastFailover == nil || s.LastFailover.Acknowledged {
		return admin.ErrNothingToAck
	}
	_, err := o.cluster.Propose(ctx, agreed.CmdFailoverAck, agreed.FailoverAck{Epoch: s.LastFailover.Epoch, By: by})
	return err
}

// HoldFailover pauses automatic promotions.
func (o *Operator) HoldFailover(ctx context.Context, reason, by string) error {
	_, err := o.cluster.Propose(ctx, agreed.CmdFailoverHold, agreed.FailoverHold{Held: true, Reason: reason, By: by})
	return err
}

// ResumeFailover ends the pause.
func (o *Operator) ResumeFailover(ctx context.Context, by string) error {
	_, err := o.cluster.Propose(ctx, agreed.CmdFailoverHold, agreed.FailoverHold{By: by})
	return err
}

// ReleaseQuarantine ends the quarantine: an operator knows that the cluster was not
// recovered elsewhere. Only the node that leads Raft can do it.
func (o *Operator) ReleaseQuarantine(context.Context) error {
	if o.cluster.Quarantined() == "" {
		return o.notHere()
	}
	o.coldStart.Release()
	o.log.Warn("quarantine released by an operator")
	return nil
}

// failbackAvailable is the site to which a switchover could return, by the
// coordinator's newest look; nil when there is none.
func (o *Operator) failbackAvailable() *string {
	c := o.command()
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

// notHere tells why the quarantine can't be ended on this node.
func (o *Operator) notHere() error {
	r := o.cluster.Raft()
	if r.Quorum || r.Leads {
		return admin.ErrNotQuarantined
	}
	if m, known := o.cluster.State().Nodes[r.Leader]; known {
		return fmt.Errorf("%w: ask the raft leader %s at its admin address %s", admin.ErrWrongNode, r.Leader, m.Admin)
	}
	return fmt.Errorf("%w: this node does not lead raft, and knows no leader", admin.ErrWrongNode)
}
