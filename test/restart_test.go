//go:build linux

package test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/node"
	"github.com/dsnode/dsnode/test/lab"
)

var errStillQuorum = errors.New("the status still shows a healthy cluster, a quorum or a leader")

// Each node in turn is killed and restarted, on the same and on other ports; then all
// nodes are killed and started in a random order. Each time the cluster becomes
// healthy without help.
func TestAnyNodeComesBack(t *testing.T) {
	parallelIfShort(t)
	l := lab.Start(t, lab.Topology{Link: lab.RoundTrip(30 * time.Millisecond)})
	for _, n := range l.Nodes() {
		n.Restart()
		t.Logf("%s killed and restarted: healthy after %v", n.Name, l.WaitHealthy(within(returns)))
		n.RestartWithNewPorts()
		t.Logf("%s at new ports: healthy after %v", n.Name, l.WaitHealthy(within(returns)))
	}
	wantVoters(t, l, 3)
	for range 3 {
		awaitCommits(t, l, 10)
		nodes := l.Nodes()
		for _, n := range nodes {
			n.Kill()
		}
		l.Random.Shuffle(len(nodes), func(i, j int) { nodes[i], nodes[j] = nodes[j], nodes[i] })
		var order []string
		for _, n := range nodes {
			n.Start()
			order = append(order, n.Name)
		}
		t.Logf("all killed, started as %v: healthy after %v", order, l.WaitHealthy(within(20*time.Second)))
	}
}

// draining gives load balancers time to notice that a node stops.
func draining(c *node.Config) {
	c.Shutdown.Delay = config.Duration(time.Second)
	c.Shutdown.Grace = config.Duration(15 * time.Second)
}

func TestRollingRestartLosesNoRequest(t *testing.T) {
	l := lab.Start(t, lab.Topology{Link: lab.RoundTrip(30 * time.Millisecond), Node: draining})
	rolling := load(l)
	rolling.Balanced = true
	running := l.StartLoad(rolling)
	await(t, running, 600)
	for _, n := range l.Nodes() {
		begun := time.Now()
		n.Terminate(25 * time.Second)
		drained := time.Since(begun)
		n.Start()
		t.Logf("%s drained in %v, healthy again %v later", n.Name, drained, l.WaitHealthy(within(returns)))
		await(t, running, 300)
	}
	wantNoFailure(t, running.Stop(), false)
}

// A cluster grows from one node to three sites and then to 2+2+1 nodes. No client
// fails.
func TestGrowthUnderLoad(t *testing.T) {
	parallelIfShort(t)
	l := lab.Start(t, lab.Topology{Nodes: []int{2, 2, 1}, Link: lab.RoundTrip(30 * time.Millisecond), Alone: true})
	first := l.Sites[0].Nodes[0]
	running := l.StartLoad(lab.Load{Rate: 100, Streams: 20, Balanced: true, Sites: l.Sites[:1]})
	await(t, running, 200)
	if err := first.ApplyConfig(t.Context(), l.ConfigFor(l.Sites...)); err != nil {
		t.Fatal(err)
	}
	for _, s := range l.Sites[1:] {
		s.Nodes[0].Start()
	}
	t.Logf("three sites: healthy after %v", l.WaitHealthy(within(20*time.Second)))
	wantVoters(t, l, 3)
	l.Sites[0].Nodes[1].Start()
	l.Sites[1].Nodes[1].Start()
	t.Logf("2+2+1: healthy after %v", l.WaitHealthy(within(20*time.Second)))
	wantVoters(t, l, 5)
	await(t, running, 200)
	wantNoFailure(t, running.Stop(), false)
	for _, n := range slices.Backward(l.Nodes()) {
		if _, err := l.Ask(t.Context(), n, lab.FastModel, "Hello"); err != nil {
			t.Errorf("%s does not answer: %v", n.Name, err)
		}
	}
}

// awaitCommits waits for that many more Raft entries, so that earlier entries are old
// on every disk: Raft restores old and new entries in different ways.
func awaitCommits(t *testing.T, l *lab.Lab, more uint64) {
	t.Helper()
	var want uint64
	l.WaitFor(within(30*time.Second), fmt.Sprintf("%d more entries", more), func(ctx context.Context) error {
		for _, n := range l.Running() {
			status, err := n.Status(ctx)
			if err != nil {
				return err
			}
			at := status.Raft.CommitIndex
			if at == nil {
				return fmt.Errorf("%s shows no commit index", n.Name)
			}
			if want == 0 {
				want = *at + more
			}
			if *at < want {
				return fmt.Errorf("%s is at entry %d, not at %d", n.Name, *at, want)
			}
		}
		return nil
	})
}

// wantVoters waits until every node shows that many voters.
func wantVoters(t *testing.T, l *lab.Lab, want int) {
	t.Helper()
	took := l.WaitFor(within(60*time.Second), fmt.Sprintf("%d voters", want), func(ctx context.Context) error {
		for _, n := range l.Running() {
			status, err := n.Status(ctx)
			if err != nil {
				return err
			}
			if v := status.Raft.Voters; v == nil || *v != want {
				return fmt.Errorf("%s shows %v voters", n.Name, status.Raft.Voters)
			}
		}
		return nil
	})
	t.Logf("%d voters after %v", want, took)
}
