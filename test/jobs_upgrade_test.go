//go:build linux

package test

import (
	"context"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/dsnode/dsnode/node"
	"github.com/dsnode/dsnode/test/lab"
)

// oldCommit names the commit whose build TestUpgradeAndBackLosesNothing upgrades from.
const oldCommit = "DSNODE_TEST_OLD_COMMIT"

// builds returns the two builds between which the cluster moves: that of oldCommit
// and the present one. Without it, or in a clone without that commit, they are the
// present build and one whose journal records have the next format.
func builds(t *testing.T) (older, newer string) {
	t.Helper()
	if commit := os.Getenv(oldCommit); commit != "" {
		if older, ok := lab.BuildCommit(t, commit); ok {
			t.Logf("from commit %s to the present build", commit)
			return older, lab.Build(t)
		}
		t.Logf("this clone has no commit %s", commit)
	}
	t.Log("from the present build to one with the next format of records")
	return lab.Build(t), lab.BuildTagged(t, "dsnode_next_format")
}

// A cluster is upgraded node by node to a newer build and downgraded again, under
// load. In between both builds share the cluster. No request fails, no job is lost. The
// newer build is held at the feature level of the older one, as for an operator who wants
// to be able to go back.
func TestUpgradeAndBackLosesNothing(t *testing.T) {
	fullOnly(t, "it builds a second binary and restarts all nodes twice, in a minute")
	older, newer := builds(t)
	l := lab.Start(t, lab.Topology{Link: lab.RoundTrip(30 * time.Millisecond), Node: draining, Cluster: withJobs, Binary: older})
	level := featureLevel(t, l.Nodes()[0])
	held := func(c *node.Config) { c.FeatureLevel = level }
	requests := l.StartLoad(lab.Load{Rate: 50, Streams: 5, Balanced: true})
	ledger := l.StartJobs(lab.JobLoad{Clients: 4, Durabilities: []string{"", "two-sites", "node"}, Model: jobModel, Every: 50 * time.Millisecond})
	for _, to := range []struct {
		what, binary string
		edit         func(*node.Config)
	}{{"the newer build", newer, held}, {"the older build", older, nil}} {
		for _, n := range l.Nodes() {
			n.Terminate(25 * time.Second)
			n.Use(to.binary)
			n.Configure(to.edit)
			n.Start()
			t.Logf("%s runs %s: healthy after %v", n.Name, to.what, l.WaitHealthy(within(15*time.Second)))
			before := ledger.Count()
			s := &lossTrial{t: t, lab: l, ledger: ledger}
			s.awaitCount(before + 50)
		}
	}
	for _, n := range l.Nodes() {
		if now := featureLevel(t, n); now != level {
			t.Errorf("%s is at feature level %d, and the cluster was held at %d", n.Name, now, level)
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

// featureLevel is the agreed feature level as a node's metrics show it, which builds of
// every level have.
func featureLevel(t *testing.T, n *lab.Node) int {
	t.Helper()
	ctx, stop := context.WithTimeout(t.Context(), 10*time.Second)
	defer stop()
	samples, err := n.Metrics(ctx)
	if err != nil {
		t.Fatal(err)
	}
	level, shown := samples["dsnode_feature_level"]
	if !shown {
		t.Fatalf("%s shows no feature level", n.Name)
	}
	return int(level)
}
