//go:build linux

package test

import (
	"fmt"
	"testing"
	"time"

	"github.com/dsnode/dsnode/test/lab"
)

// Two builds whose records differ by one format share a cluster: it is upgraded
// node by node, and goes back, under load. No request fails, no job is lost.
func TestUpgradeAndBackLosesNothing(t *testing.T) {
	fullOnly(t, "it builds a second binary and restarts all nodes twice, in a minute")
	l := lab.Start(t, lab.Topology{Link: lab.RoundTrip(30 * time.Millisecond), Node: draining, Cluster: withJobs})
	next := lab.BuildTagged(t, "dsnode_next_format")
	requests := l.StartLoad(lab.Load{Rate: 50, Streams: 5, Balanced: true})
	ledger := l.StartJobs(lab.JobLoad{Clients: 4, Durabilities: []string{"", "two-sites", "node"}, Model: jobModel, Every: 50 * time.Millisecond})
	for _, to := range []struct{ what, binary string }{{"the next build", next}, {"the build before", ""}} {
		for _, n := range l.Nodes() {
			n.Terminate(25 * time.Second)
			n.Use(to.binary)
			n.Start()
			t.Logf("%s runs %s: healthy after %v", n.Name, to.what, l.WaitHealthy(within(15*time.Second)))
			before := ledger.Count()
			s := &lossTrial{t: t, lab: l, ledger: ledger}
			s.awaitCount(before + 50)
		}
	}
	wantNoFailure(t, requests.Stop(), false)
	jobs := ledger.Stop()
	refused := map[string]int{}
	for _, j := range jobs {
		if j.Acknowledged.IsZero() {
			refused[fmt.Sprint(j.Code)]++
		}
	}
	t.Logf("submissions that were not accepted, by status: %v", refused)
	s := &lossTrial{t: t, lab: l, ledger: ledger, wiped: map[string]bool{}, lostAt: time.Now()}
	s.verify(lossRow{keeps: all}, jobs)
}
