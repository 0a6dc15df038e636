//go:build linux

package test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/dsnode/dsnode/node/admin"
	"github.com/dsnode/dsnode/test/lab"
)

// What these tests promise: a removed node learns of it from any member that it reaches,
// stops serving within seconds and ends, and never comes back by itself. What only it has
// is not lost: after dsnode node admit it brings it back.

const learns = 10 * time.Second

// awaitFeatureLevel waits until the cluster notes removals, a few seconds after its start.
func awaitFeatureLevel(t *testing.T, l *lab.Lab) {
	t.Helper()
	l.WaitFor(within(20*time.Second), "feature level 2", func(ctx context.Context) error {
		for _, n := range l.Running() {
			samples, err := n.Metrics(ctx)
			if err != nil {
				return err
			}
			if level := samples["dsnode_feature_level"]; level < 2 {
				return fmt.Errorf("%s is at level %v", n.Name, level)
			}
		}
		return nil
	})
}

// wantEnd waits until a removed node has ended, and checks what it said last.
func wantEnd(t *testing.T, n *lab.Node) {
	t.Helper()
	code := n.WaitEnded(within(learns))
	log := n.LogTail(3)
	if code != 1 || !strings.Contains(log, "the node was removed from the cluster") || !strings.Contains(log, "dsnode node admit") {
		t.Errorf("%s ended with exit code %d and these last words, want 1 and what to do:\n%s", n.Name, code, log)
	}
}

// wantGone checks that no running node knows another one.
func wantGone(t *testing.T, l *lab.Lab, name string) {
	t.Helper()
	for _, n := range l.Running() {
		status, err := n.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, seen := range status.Nodes {
			if seen.Name == name {
				t.Errorf("%s still shows %s, which was removed", n.Name, name)
			}
		}
	}
}

// submit submits jobs to a node that only it will have.
func submit(t *testing.T, n *lab.Node, count int) []string {
	t.Helper()
	var ids []string
	for i := range count {
		body := fmt.Sprintf(`{"endpoint":"/v1/chat/completions","durability":"node","body":{"model":%q,"messages":[{"role":"user","content":"alone %d"}]}}`, jobModel, i)
		status, header, answer, err := n.Post(t.Context(), "/v1/jobs", []byte(body), nil)
		if err != nil || status != http.StatusAccepted {
			t.Fatalf("%s answered %d to a job: %s, %v", n.Name, status, answer, err)
		}
		at := header.Get("Location")
		ids = append(ids, at[strings.LastIndex(at, "/")+1:])
	}
	return ids
}

// wantJobs waits until every running node shows all jobs as succeeded.
func wantJobs(t *testing.T, l *lab.Lab, ids []string) {
	t.Helper()
	took := l.WaitFor(within(20*time.Second), "the jobs at every node", func(ctx context.Context) error {
		for _, n := range l.Running() {
			for _, id := range ids {
				if v, err := n.Job(ctx, id); err != nil || v.Status != "succeeded" {
					return fmt.Errorf("%s shows job %s as %q: %w", n.Name, id, v.Status, err)
				}
			}
		}
		return nil
	})
	t.Logf("all %d jobs are everywhere after %s", len(ids), took)
}

// A node is removed while it is cut off and takes jobs alone. After the cut it learns of its
// removal from the others, does not join again, and refuses to start. Admitted again, it
// brings its jobs back.
func TestCutOffNodeLearnsOfItsRemovalAndComesBack(t *testing.T) {
	parallelIfShort(t)
	l := lab.Start(t, lab.Topology{Link: lab.RoundTrip(30 * time.Millisecond), Cluster: withJobs})
	awaitFeatureLevel(t, l)
	asked, victim := l.Sites[0].Nodes[0], l.Sites[2].Nodes[0]
	before := submit(t, victim, 5)
	wantJobs(t, l, before)

	l.Net.Isolate(2)
	l.WaitFor(within(10*time.Second), "the victim to be alone", func(ctx context.Context) error {
		status, err := victim.Status(ctx)
		if err == nil && status.Raft.Quorum {
			err = errors.New("it has a quorum")
		}
		return err
	})
	alone := submit(t, victim, 10)
	l.WaitFor(within(15*time.Second), "the removal of a node that is not heard", func(ctx context.Context) error {
		plan, err := asked.PlanRemoval(ctx, victim.Name)
		if err != nil {
			return err
		}
		return asked.RemoveNode(ctx, admin.RemovalRequest{Node: victim.Name, AcceptLoss: plan.Loses != ""})
	})
	if _, err := victim.Job(t.Context(), alone[0]); err != nil {
		t.Errorf("the victim can't know of its removal, and does not serve: %v", err)
	}

	l.Net.MendAll()
	wantEnd(t, victim)
	wantGone(t, l, victim.Name)
	victim.Start()
	wantEnd(t, victim)
	wantGone(t, l, victim.Name)

	// The others have run what they had of its jobs, and dropped its streams.
	l.WaitFor(within(30*time.Second), "the removed node's streams to be dropped", func(ctx context.Context) error {
		streams, err := asked.JobStreams(ctx)
		for _, s := range streams.Data {
			if s.Origin == victim.Name {
				return fmt.Errorf("stream %s belongs to %s", s.Incarnation, s.Owner)
			}
		}
		return err
	})
	if err := asked.AdmitNode(t.Context(), victim.Name); err != nil {
		t.Fatal(err)
	}
	victim.Start()
	t.Logf("healthy with the returned node after %s", l.WaitHealthy(within(20*time.Second)))
	wantJobs(t, l, append(before, alone...))
	for _, n := range l.Running() {
		l.WaitFor(within(10*time.Second), "journals and tables to agree", n.CheckJobs)
	}
}

// A node that lives is removed only by force. It lets running requests finish, refuses new
// ones, and ends. With an empty disk it joins as a new node. Removed while its process is
// stopped, it does not act as primary for a moment when it continues.
func TestLivingNodeIsRemovedByForce(t *testing.T) {
	parallelIfShort(t)
	l := lab.Start(t, lab.Topology{Nodes: []int{2, 1, 1}, Link: lab.RoundTrip(30 * time.Millisecond), Cluster: withJobs})
	awaitFeatureLevel(t, l)
	asked, victim := l.Sites[1].Nodes[0], l.Sites[0].Nodes[1]
	plan, err := asked.PlanRemoval(t.Context(), victim.Name)
	if err != nil || plan.State != admin.NodeAlive || plan.LastHeardSeconds == nil {
		t.Fatalf("the plan is %+v, %v, want that the node is alive", plan, err)
	}
	if err := asked.RemoveNode(t.Context(), admin.RemovalRequest{Node: victim.Name, AcceptLoss: true}); err == nil || !strings.Contains(err.Error(), "node_alive") {
		t.Fatalf("removing a node that is alive: %v, want node_alive", err)
	}
	// A request that takes three seconds.
	type result struct {
		status int
		answer []byte
		err    error
	}
	ended := make(chan result, 1)
	chat := func(model string) []byte {
		return fmt.Appendf(nil, `{"model":%q,"messages":[{"role":"user","content":"hello"}]}`, model)
	}
	go func() {
		status, _, answer, err := victim.Post(t.Context(), "/v1/chat/completions", chat(lab.SlowModel), nil)
		ended <- result{status, answer, err}
	}()
	l.WaitFor(within(5*time.Second), "the request to run", func(ctx context.Context) error {
		samples, err := victim.Metrics(ctx)
		if err == nil && samples["dsnode_requests_in_flight"] < 1 {
			err = errors.New("none is in flight")
		}
		return err
	})
	removedAt := time.Now()
	if err := asked.RemoveNode(t.Context(), admin.RemovalRequest{Node: victim.Name, AcceptLoss: true, Force: true}); err != nil {
		t.Fatal(err)
	}
	// New connections are refused once it drains, so only the reason of one that got
	// through is checked.
	l.WaitFor(within(learns), "the victim to refuse requests", func(ctx context.Context) error {
		status, _, answer, err := victim.Post(ctx, "/v1/chat/completions", chat(lab.FastModel), nil)
		switch {
		case err != nil:
			return nil
		case status == http.StatusServiceUnavailable && strings.Contains(string(answer), "node_removed"):
			return nil
		}
		return fmt.Errorf("status %d: %.200s", status, answer)
	})
	t.Logf("the victim refused requests %s after the removal", time.Since(removedAt))
	if r := <-ended; r.err != nil || r.status != http.StatusOK {
		t.Errorf("the request that ran got %d, %v: %s", r.status, r.err, r.answer)
	}
	wantEnd(t, victim)
	wantGone(t, l, victim.Name)

	victim.WipeDisk()
	if err := asked.AdmitNode(t.Context(), victim.Name); err != nil {
		t.Fatal(err)
	}
	victim.Start()
	t.Logf("healthy with the wiped node after %s", l.WaitHealthy(within(20*time.Second)))

	victim.Stop()
	l.WaitFor(within(15*time.Second), "the removal of a node that is stopped", func(ctx context.Context) error {
		return asked.RemoveNode(ctx, admin.RemovalRequest{Node: victim.Name, AcceptLoss: true})
	})
	victim.Continue()
	l.WaitFor(within(learns), "the end of the removed node, which is not the primary before", func(ctx context.Context) error {
		if !victim.Running() {
			return nil
		}
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, victim.API()+"/healthz/primary", nil)
		if err != nil {
			return err
		}
		if answer, err := victim.Site.Client().Do(req); err == nil {
			_ = answer.Body.Close()
			if answer.StatusCode == http.StatusOK {
				t.Errorf("%s answers as primary after its removal", victim.Name)
			}
		}
		return errors.New("it still runs")
	})
	wantEnd(t, victim)
	wantGone(t, l, victim.Name)
}
