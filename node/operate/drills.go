package operate

import (
	"context"
	"fmt"
	"time"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/failover/drill"
	"github.com/dsnode/dsnode/node/admin"
)

func drillRequest(r admin.DrillRequest, by string) drill.Request {
	return drill.Request{
		Kind: drill.Kind(r.Kind), Site: r.Site, For: time.Duration(r.ForSeconds * float64(time.Second)),
		Return: r.Return, Waive: r.Waive, ProbeModel: r.ProbeModel, By: by,
	}
}

// PlanDrill runs the prechecks of a drill and changes nothing.
func (o *Operator) PlanDrill(_ context.Context, r admin.DrillRequest, by string) (admin.DrillPlan, error) {
	c, err := o.control()
	if err != nil {
		return admin.DrillPlan{}, err
	}
	checks, rehearses, err := c.Drills.Plan(drillRequest(r, by))
	if err != nil {
		return admin.DrillPlan{}, err
	}
	p := admin.DrillPlan{Kind: r.Kind, Site: r.Site, Rehearses: rehearses}
	p.Checks, p.OK = checks, allPass(checks, r.Waive)
	return p, nil
}

// StartDrill begins a drill, which this node runs in the background.
func (o *Operator) StartDrill(ctx context.Context, r admin.DrillRequest, by string) (admin.Drill, error) {
	c, err := o.control()
	if err != nil {
		return admin.Drill{}, err
	}
	d, err := c.Drills.Start(ctx, drillRequest(r, by))
	if err != nil {
		return admin.Drill{}, err
	}
	return o.drillInfo(d), nil
}

// drillInfo describes a drill without its report. A drill whose runner has ended without a
// verdict counts as aborted.
func (o *Operator) drillInfo(d agreed.DrillRecord) admin.Drill {
	out := admin.Drill{ID: d.ID, Kind: d.Kind, Site: d.Site, By: d.By, StartedAt: d.StartedAt, Deadline: d.Deadline}
	verdict, end := d.Verdict, d.EndedAt
	if verdict == "" && !d.Running(o.Host.Now()) {
		verdict, end = string(drill.Aborted), d.AbandonedAt
	}
	if verdict != "" {
		out.Verdict = &verdict
		if !end.IsZero() {
			out.EndedAt = &end
		}
	}
	return out
}

// Drills lists the newest drills, oldest first.
func (o *Operator) Drills(context.Context) ([]admin.Drill, error) {
	s := o.Cluster.State()
	if s.ClusterID == "" {
		return nil, o.notMember()
	}
	list := []admin.Drill{}
	for _, d := range s.Drills {
		list = append(list, o.drillInfo(d))
	}
	return list, nil
}

// Drill returns a drill with its report. While the drill runs, the node that runs it has
// the report so far, and other nodes have none.
func (o *Operator) Drill(_ context.Context, id string) (admin.Drill, error) {
	s := o.Cluster.State()
	if s.ClusterID == "" {
		return admin.Drill{}, o.notMember()
	}
	for _, d := range s.Drills {
		if d.ID != id {
			continue
		}
		out := o.drillInfo(d)
		out.Report = d.Report
		if d.Verdict == "" { // the record has only what was known at the start
			var err error
			if out.Report, err = o.liveReport(id); err != nil {
				return admin.Drill{}, err
			}
		}
		return out, nil
	}
	return admin.Drill{}, fmt.Errorf("%w: %s", drill.ErrUnknown, id)
}

// liveReport returns the report so far of a drill that this node runs, or nil.
func (o *Operator) liveReport(id string) ([]byte, error) {
	c := o.Control()
	if c == nil {
		return nil, nil
	}
	r, runs := c.Drills.Live(id)
	if !runs {
		return nil, nil
	}
	return r.Encode()
}

// AbortDrill ends a drill on whichever node it runs.
func (o *Operator) AbortDrill(ctx context.Context, id, by string) error {
	if o.Reconnect(id) {
		// This node was cut off and can't change the drill's record yet. It does so when it
		// hears the others. The other nodes of this site stay cut off until they get the
		// same call, or until their own timer ends.
		o.Log.Warn("drill aborted on this node", "drill", id, "by", by)
		if c := o.Control(); c != nil {
			c.Drills.AbortLater(id, by)
		}
		return nil
	}
	c, err := o.control()
	if err != nil {
		return err
	}
	return c.Drills.Abort(ctx, id, by)
}
