//go:build linux

package test

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/dsnode/dsnode/failover/drill"
	"github.com/dsnode/dsnode/node/admin"
	"github.com/dsnode/dsnode/test/lab"
)

// beginDrill starts an isolation and waits until the node that runs it reports the cut.
func beginDrill(t *testing.T, l *lab.Lab, n *lab.Node, site *lab.Site, forSeconds float64) admin.Drill {
	t.Helper()
	var d admin.Drill
	request := admin.DrillRequest{Kind: "isolation", Site: site.Name, ForSeconds: forSeconds}
	if err := askAdmin(t.Context(), n, http.MethodPost, "/admin/v1/drills?author=test", request, &d); err != nil {
		t.Fatal(err)
	}
	l.WaitFor(within(10*time.Second), site.Name+" to be cut off", func(ctx context.Context) error {
		var now admin.Drill
		if err := askAdmin(ctx, n, http.MethodGet, "/admin/v1/drills/"+d.ID, nil, &now); err != nil {
			return err
		}
		r, err := drill.DecodeReport(now.Report)
		if err != nil {
			return err
		}
		for _, e := range r.Timeline {
			if e.What == "cut off" {
				return nil
			}
		}
		return fmt.Errorf("its timeline: %+v", r.Timeline)
	})
	return d
}

// endOf waits until a node shows a drill's verdict, and returns it with its report.
func endOf(t *testing.T, l *lab.Lab, n *lab.Node, id string, limit time.Duration) (admin.Drill, drill.Report) {
	t.Helper()
	var d admin.Drill
	took := l.WaitFor(limit, "the drill's verdict at "+n.Name, func(ctx context.Context) error {
		if err := askAdmin(ctx, n, http.MethodGet, "/admin/v1/drills/"+id, nil, &d); err != nil {
			return err
		}
		if d.Verdict == nil {
			return fmt.Errorf("it is running")
		}
		return nil
	})
	report, err := drill.DecodeReport(d.Report)
	if err != nil {
		t.Fatalf("the report of drill %s: %v", id, err)
	}
	for _, e := range report.Timeline {
		t.Logf("%6.2fs %s: %s", e.After, e.What, e.Detail)
	}
	t.Logf("%s %v later: %s", *d.Verdict, took, report.Why)
	return d, report
}

// startsWithin is until a node that starts answers for its status.
const startsWithin = time.Minute

// A node that restarts while a drill cuts its site off stays cut off to the end, and the
// report names the restart.
func TestDrillOfASiteThatRestarts(t *testing.T) {
	parallelIfShort(t)
	l := lab.Start(t, lab.Topology{Link: lab.RoundTrip(30 * time.Millisecond)})
	wantVoters(t, l, 3)
	l.WaitHealthy(within(returns))
	runner, site := l.Sites[0].Nodes[0], l.Sites[2]
	const length = 14 * time.Second
	d := beginDrill(t, l, runner, site, length.Seconds())
	for range 3 {
		site.Kill()
		site.Start()
		l.WaitFor(startsWithin, "the node to answer again", func(ctx context.Context) error {
			_, err := site.Nodes[0].Status(ctx)
			return err
		})
	}
	_, report := endOf(t, l, runner, d.ID, 3*time.Minute)
	if report.Verdict != drill.Pass {
		t.Errorf("the verdict is %s: %s", report.Verdict, report.Why)
	}
	heard, restarted := time.Duration(0), ""
	for _, e := range report.Timeline {
		switch e.What {
		case "heard again":
			heard = seconds(e.After)
		case "restarted":
			restarted = e.Detail
		}
	}
	if heard < length || !strings.Contains(restarted, "beijing-1 was restarted during the cut") {
		t.Errorf("heard again after %v, of a cut of %v; restarts: %q", heard, length, restarted)
	}
	l.WaitHealthy(within(returns))
}

// A drill that is aborted at the isolated site is recorded as aborted, and its cut ends at
// once.
func TestDrillIsAbortedAtTheIsolatedSite(t *testing.T) {
	parallelIfShort(t)
	l := lab.Start(t, lab.Topology{Link: lab.RoundTrip(30 * time.Millisecond)})
	wantVoters(t, l, 3)
	l.WaitHealthy(within(returns))
	runner, victim := l.Sites[0].Nodes[0], l.Sites[2].Nodes[0]
	d := beginDrill(t, l, runner, victim.Site, 120)
	if err := askAdmin(t.Context(), victim, http.MethodPost, "/admin/v1/drills/"+d.ID+"/abort?author=bob", nil, nil); err != nil {
		t.Fatal(err)
	}
	_, report := endOf(t, l, runner, d.ID, within(10*time.Second))
	if report.Verdict != drill.Aborted || !strings.Contains(report.Why, "aborted by bob") {
		t.Errorf("the verdict is %s: %s", report.Verdict, report.Why)
	}
	l.WaitHealthy(within(returns))
}

// The node that runs a drill dies. Soon after the end of the cut another node ends the
// drill, and the next one can begin.
func TestDrillOfARunnerThatDies(t *testing.T) {
	parallelIfShort(t)
	l := lab.Start(t, lab.Topology{Link: lab.RoundTrip(30 * time.Millisecond)})
	wantVoters(t, l, 3)
	l.WaitHealthy(within(returns))
	runner, other, site := l.Sites[1], l.Sites[0].Nodes[0], l.Sites[2]
	d := beginDrill(t, l, runner.Nodes[0], site, 10)
	runner.Kill()
	d, report := endOf(t, l, other, d.ID, time.Until(d.Deadline)+within(15*time.Second))
	if report.Verdict != drill.Aborted || !strings.Contains(report.Why, runner.Nodes[0].Name+", the node that ran the drill, has not been heard") {
		t.Errorf("the verdict is %s: %s", report.Verdict, report.Why)
	}
	if d.EndedAt == nil || d.EndedAt.Before(d.Deadline) {
		t.Errorf("it ended at %v, before its cut did at %v", d.EndedAt, d.Deadline)
	}
	runner.Start()
	l.WaitHealthy(within(returns))
	var plan admin.DrillPlan
	if err := askAdmin(t.Context(), other, http.MethodGet, "/admin/v1/drills/plan?kind=isolation&site="+site.Name, nil, &plan); err != nil {
		t.Fatal(err)
	}
	if !plan.OK {
		t.Errorf("the next drill can't begin: %+v", plan.Checks)
	}
}
