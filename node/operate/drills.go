package operate

import (
	"context"
	"fmt"
	"time"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/failover/drill"
	"github.com/dsnode/dsnode/node/admin"
)

// This file is admin.Drills.

func drillRequest(r admin.DrillRequest, by string) drill.Request {
	return drill.Request{
		Kind: drill.Kind(r.Kind), Site: r.Site, For: time.Duration(r.ForSeconds * float64(time.Second)),
		Return: r.Return, Waive: r.Waive, ProbeModel: r.ProbeModel, By: by,
	}
}

// PlanDrill gives the prechecks of a drill and changes nothing.
func (o *Operator) PlanDrill(_ context.Context, r admin.DrillRequest, by string) (admin.DrillPlan, error) {
	c, err := o.commanding()
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

// StartDrill begins a drill, which this node runs.
func (o *Operator) StartDrill(ctx context.Context, r admin.DrillRequest, by string) (admin.Drill, error) {
	c, err := o.commanding()
	if err != nil {
		return admin.Drill{}, err
	}
	d, err := c.Drills.Start(ctx, drillRequest(r, by))
	if err != nil {
		return admin.Drill{}, err
	}
	return o.drillOf(d), nil
}

// drillOf is a drill's record without its report. A drill whose runner died is aborted.
func (o *Operator) drillOf(d agreed.DrillRecord) admin.Drill {
	out := admin.Drill{ID: d.ID, Kind: d.Kind, Site: d.Site, By: d.By, StartedAt: d.StartedAt, Deadline: d.Deadline}
	verdict, end := d.Verdict, d.EndedAt
	if verdict == "" && !d.Running(time.Now()) {
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
	s := o.cluster.State()
	if s.ClusterID == "" {
		return nil, o.notMember()
	}
	list := []admin.Drill{}
	for _, d := range s.Drills {
		list = append(list, o.drillOf(d))
	}
	return list, nil
}

// Drill gives a drill with its report. While the drill runs, the node that runs it gives
// the report so far, and other nodes give none.
func (o *Operator) Drill(_ context.Context, id string) (admin.Drill, error) {
	s := o.cluster.State()
	if s.ClusterID == "" {
		return admin.Drill{}, o.notMember()
	}
	for _, d := range s.Drills {
		if d.ID != id {
			continue
		}
		out := o.drillOf(d)
		switch {
		case len(d.Report) > 0:
			out.Report = d.Report
		default:
			if err := o.liveReport(&out); err != nil {
				return admin.Drill{}, err
			}
		}
		return out, nil
	}
	return admin.Drill{}, fmt.Errorf("%w: %s", drill.ErrUnknown, id)
}

func (o *Operator) liveReport(d *admin.Drill) error {
	c := o.command()
	if c == nil {
		return nil
	}
	r, runs := c.Drills.Live(d.ID)
	if !runs {
		return nil
	}
	text, err := r.Encode()
	if err != nil {
		return err
	}
	d.Report = text
	return nil
}

// AbortDrill ends a drill, whichever node runs it, and this node's isolation at once.
func (o *Operator) AbortDrill(ctx context.Context, id, by string) error {
	if o.isolation.Heal(id) {
		// This node was cut off, so it can't change the record yet. The runner notices
		// that the site is heard early. Other nodes of this site that get no abort heal
		// by their own timers.
		o.log.Warn("drill aborted at this node", "drill", id, "by", by)
		return nil
	}
	c, err := o.commanding()
	if err != nil {
		return err
	}
	return c.Drills.Abort(ctx, id, by)
}
