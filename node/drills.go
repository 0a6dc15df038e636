package node

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/clock"
	"github.com/dsnode/dsnode/failover/drill"
	"github.com/dsnode/dsnode/node/admin"
)

// This file is admin.Drills: rehearsals.

func (n *Node) newDrills(c *command) *drill.Runner {
	return drill.NewRunner(drill.Options{
		Node: n.cfg.Name, Site: n.cfg.Site, API: n.doors.apiAddr, Agreement: n.cluster, Switcher: c.coordinator,
		Quarantined: func() bool { return n.cluster.Quarantined() != "" },
		Health:      func() cluster.Health { return n.surround.Load().health },
		Unwell:      func() []string { return n.status().Reasons },
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
		return admin.DrillPlan{}, refusedDrill(err)
	}
	p := admin.DrillPlan{Kind: r.Kind, Site: r.Site, Rehearses: rehearses}
	p.Checks, p.OK = checks, allPass(checks, r.Waive)
	return p, nil
}

// StartDrill begins a drill that goes on in this node.
func (n *Node) StartDrill(ctx context.Context, r admin.DrillRequest, by string) (admin.Drill, error) {
	c, err := n.commanding()
	if err != nil {
		return admin.Drill{}, err
	}
	d, err := c.drills.Start(ctx, drillRequest(r, by))
	if err != nil {
		return admin.Drill{}, refusedDrill(err)
	}
	return n.drillOf(d), nil
}

// refusedDrill gives what a drill died of before it began an operator's name.
func refusedDrill(err error) error {
	for _, end := range []struct {
		is   error
		code string
	}{
		{drill.ErrWrongPlace, "wrong_node"},
		{drill.ErrInvalid, "invalid_request"},
		{drill.ErrUnknown, "unknown_drill"},
	} {
		if errors.Is(err, end.is) {
			return &admin.Error{Code: end.code, Message: err.Error()}
		}
	}
	return err
}

// drillOf is a record without its report. One whose runner died is aborted.
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

// Drills lists the newest ones, oldest first.
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

// Drill gives one with its report; while it runs, the report so far where it
// runs, and none elsewhere.
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
	return admin.Drill{}, fmt.Errorf("%w: %s", admin.ErrUnknownDrill, id)
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

// AbortDrill ends a drill wherever it runs, and this node's part of it at once.
func (n *Node) AbortDrill(ctx context.Context, id, by string) error {
	if n.isolation.Heal(id) {
		// The record can't be changed from here yet; who runs the drill finds the
		// site back before its time. A node of this site that nobody tells waits
		// for its own timer.
		n.log.Warn("drill aborted at this node", "drill", id, "by", by)
		return nil
	}
	c, err := n.commanding()
	if err != nil {
		return err
	}
	return refusedDrill(c.drills.Abort(ctx, id, by))
}
