package node

import (
	"context"
	"fmt"
	"time"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/clock"
	"github.com/dsnode/dsnode/failover/drill"
	"github.com/dsnode/dsnode/node/admin"
)

// This file is admin.Drills.

func (n *Node) newDrills(c *command) *drill.Runner {
	return drill.NewRunner(drill.Options{
		Node: n.cfg.Name, Site: n.cfg.Site, API: n.doors.apiAddr, Agreement: n.cluster, Switcher: c.coordinator,
		Quarantined: func() bool { return n.cluster.Quarantined() != "" },
		Health:      func() cluster.Health { return n.surround.Load().health },
		Unhealthy:   func() []string { return n.status().Reasons },
		NewAsker: func(model string) (drill.Asker, func()) {
			a := drill.NewHTTPAsker(model, n.cfg.API.TLS.On())
			return a, a.Close
		},
		Boottime: clock.Boottime, Now: time.Now, Logger: n.log,
	})
}

func drillRequest(r admin.DrillRequest, by string) drill.Request {
	return drill.Request{
		Kind: drill.Kind(r.Kind), Site: r.Site, For: time.Duration(r.ForSeconds * float64(time.Second)),
		Return: r.Return, Waive: r.Waive, ProbeModel: r.ProbeModel, By: by,
	}
}

// PlanDrill gives the prechecks of a drill and changes nothing.
func (n *Node) PlanDrill(_ context.Context, r admin.DrillRequest, by string) (admin.DrillPlan, error) {
	c, err := n.commanding()
	if err != nil {
		return admin.DrillPlan{}, err
	}
	checks, rehearses, err := c.drills.Plan(drillRequest(r, by))
	if err != nil {
		return admin.DrillPlan{}, err
	}
	p := admin.DrillPlan{Kind: r.Kind, Site: r.Site, Rehearses: rehearses}
	p.Checks, p.OK = checks, allPass(checks, r.Waive)
	return p, nil
}

// StartDrill begins a drill, which this node runs.
func (n *Node) StartDrill(ctx context.Context, r admin.DrillRequest, by string) (admin.Drill, error) {
	c, err := n.commanding()
	if err != nil {
		return admin.Drill{}, err
	}
	d, err := c.drills.Start(ctx, drillRequest(r, by))
	if err != nil {
		return admin.Drill{}, err
	}
	return n.drillOf(d), nil
}

// drillOf is a drill's record without its report. A drill whose runner died is aborted.
func (n *Node) drillOf(d agreed.DrillRecord) admin.Drill {
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
func (n *Node) Drills(context.Context) ([]admin.Drill, error) {
	s := n.cluster.State()
	if s.ClusterID == "" {
		return nil, n.notMember()
	}
	list := []admin.Drill{}
	for _, d := range s.Drills {
		list = append(list, n.drillOf(d))
	}
	return list, nil
}

// Drill gives a drill with its report. While the drill runs, the node that runs it gives
// the report so far, and other nodes give none.
func (n *Node) Drill(_ context.Context, id string) (admin.Drill, error) {
	s := n.cluster.State()
	if s.ClusterID == "" {
		return admin.Drill{}, n.notMember()
	}
	for _, d := range s.Drills {
		if d.ID != id {
			continue
		}
		out := n.drillOf(d)
		switch {
		case len(d.Report) > 0:
			out.Report = d.Report
		default:
			if err := n.liveReport(&out); err != nil {
				return admin.Drill{}, err
			}
		}
		return out, nil
	}
	return admin.Drill{}, fmt.Errorf("%w: %s", drill.ErrUnknown, id)
}

func (n *Node) liveReport(d *admin.Drill) error {
	c := n.command.Load()
	if c == nil {
		return nil
	}
	r, runs := c.drills.Live(d.ID)
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
func (n *Node) AbortDrill(ctx context.Context, id, by string) error {
	if n.isolation.Heal(id) {
		// This node was cut off, so it can't change the record yet. The runner notices
		// that the site is heard early. Other nodes of this site that get no abort heal
		// by their own timers.
		n.log.Warn("drill aborted at this node", "drill", id, "by", by)
		return nil
	}
	c, err := n.commanding()
	if err != nil {
		return err
	}
	return c.drills.Abort(ctx, id, by)
}
