//go:build linux

package test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"testing"
	"time"

	"github.com/dsnode/dsnode/failover/drill"
	"github.com/dsnode/dsnode/node/admin"
	"github.com/dsnode/dsnode/test/lab"
)

// askAdmin asks a node's admin port from within its site.
func askAdmin(ctx context.Context, n *lab.Node, method, path string, body, answer any) error {
	var sent io.Reader
	if body != nil {
		text, err := json.Marshal(body)
		if err != nil {
			return err
		}
		sent = bytes.NewReader(text)
	}
	req, err := http.NewRequestWithContext(ctx, method, n.AdminURL()+path, sent)
	if err != nil {
		return err
	}
	resp, err := n.Site.Client().Do(req)
	if err != nil {
		return err
	}
	text, err := io.ReadAll(resp.Body)
	if err = errors.Join(err, resp.Body.Close()); err != nil {
		return err
	}
	if resp.StatusCode/100 != 2 {
		return fmt.Errorf("%s %s at %s answered %s: %s", method, path, n.Name, resp.Status, text)
	}
	if answer == nil {
		return nil
	}
	return json.Unmarshal(text, answer)
}

// runDrill starts a drill at a node and waits until it has passed.
func runDrill(t *testing.T, l *lab.Lab, n *lab.Node, r admin.DrillRequest) (admin.Drill, drill.Report) {
	t.Helper()
	var d admin.Drill
	if err := askAdmin(t.Context(), n, http.MethodPost, "/admin/v1/drills?author=test", r, &d); err != nil {
		t.Fatal(err)
	}
	begun := time.Now()
	var report drill.Report
	l.WaitFor(3*time.Minute, "the drill's verdict", func(ctx context.Context) error {
		if err := askAdmin(ctx, n, http.MethodGet, "/admin/v1/drills/"+d.ID, nil, &d); err != nil {
			return err
		}
		if d.Verdict == nil {
			return fmt.Errorf("it is running")
		}
		var err error
		report, err = drill.DecodeReport(d.Report)
		return err
	})
	for _, e := range report.Timeline {
		t.Logf("%6.2fs %s: %s", e.After, e.What, e.Detail)
	}
	for _, c := range report.Criteria {
		t.Logf("%s: %t: %s", c.Name, c.OK, c.Detail)
	}
	t.Logf("%s %s after %v: %s, %d requests, %d errors", d.Kind, d.Site, time.Since(begun).Round(time.Millisecond), *d.Verdict, report.Requests, report.Errors)
	if *d.Verdict != string(drill.Pass) {
		text, err := report.Render("markdown")
		t.Fatalf("the verdict is %s: %s\n%s (%v)", *d.Verdict, report.Why, text, err)
	}
	return d, report
}

// An isolation drill cuts the primary's connections: another site takes over, and
// the first one returns as a standby. A switchover drill then moves the primary back.
// No client fails.
func TestDrillsOfThePrimary(t *testing.T) {
	parallelIfShort(t)
	l := lab.Start(t, lab.Topology{Link: lab.RoundTrip(30 * time.Millisecond)})
	first, second := l.Sites[0], l.Sites[1]
	wantVoters(t, l, 3)
	before := l.WaitPrimary(within(5*time.Second), first.Name)
	running := l.StartLoad(lab.Load{Rate: 20, Streams: 2})
	await(t, running, 50)

	err := askAdmin(t.Context(), first.Nodes[0], http.MethodPost, "/admin/v1/drills", admin.DrillRequest{Kind: "isolation", Site: first.Name}, nil)
	if err == nil {
		t.Fatal("a node of the site that is to be isolated started the drill")
	}
	_, report := runDrill(t, l, second.Nodes[0], admin.DrillRequest{Kind: "isolation", Site: first.Name, ForSeconds: 12})
	if report.RTO.Achieved == nil || seconds(*report.RTO.Achieved) > within(10*time.Second) {
		t.Errorf("RTO %v", report.RTO)
	}
	l.WaitHealthy(within(returns))
	after := l.WaitPrimary(within(5*time.Second), second.Name)
	if after.Epoch != before.Epoch+1 {
		t.Errorf("the epoch went from %d to %d, want one step", before.Epoch, after.Epoch)
	}
	status, err := second.Nodes[0].Status(t.Context())
	if err != nil || status.LastFailover == nil || !status.LastFailover.Acknowledged || status.LastFailover.Kind != "unplanned" {
		t.Errorf("the last failover: %+v, %v", status.LastFailover, err)
	}

	l.WaitFor(within(5*time.Second), "the isolated site to learn of the drill's end", func(ctx context.Context) error {
		var heard struct{ Data []admin.Drill }
		if err := askAdmin(ctx, first.Nodes[0], http.MethodGet, "/admin/v1/drills", nil, &heard); err != nil {
			return err
		}
		if len(heard.Data) != 1 || heard.Data[0].Verdict == nil {
			return fmt.Errorf("it knows %+v", heard.Data)
		}
		return nil
	})
	_, report = runDrill(t, l, first.Nodes[0], admin.DrillRequest{Kind: "switchover", Site: first.Name})
	if report.IdleSeconds == nil || seconds(*report.IdleSeconds) > within(5*time.Second) {
		t.Errorf("idle %v", report.IdleSeconds)
	}
	if p := l.WaitPrimary(within(5*time.Second), first.Name); p.Epoch != after.Epoch+1 {
		t.Errorf("the epoch is %d after the switchover, want %d", p.Epoch, after.Epoch+1)
	}
	wantNoFailure(t, running.Stop(), false)
}
