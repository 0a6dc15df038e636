//go:build linux

package test

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/dsnode/dsnode/test/lab"
)

// load is the load under which the promised times hold: 300 requests/s and 100
// streams in all.
func load(l *lab.Lab) lab.Load {
	n := len(l.Sites)
	return lab.Load{Rate: 300 / float64(n), Streams: (100 + n - 1) / n}
}

// wantNoFailure fails the test if a request failed. With brokenStreams set, streams
// may end in an explicit error: a model server was killed while they had shown content.
func wantNoFailure(t *testing.T, results []lab.Result, brokenStreams bool) {
	t.Helper()
	t.Log(lab.Summary(results))
	if len(results) == 0 {
		t.Fatal("the load has no results")
	}
	for _, r := range lab.Failed(results) {
		if r.Stream && brokenStreams && lab.LawfulEnd(r) {
			continue
		}
		t.Errorf("%s asked %s at %s and failed: %v", r.Site, r.Node, r.At.Format(time.TimeOnly), r.Err)
		return // the summary has the others
	}
}

func TestEverySiteAnswersAndLosesItsModelServer(t *testing.T) {
	l := lab.Start(t, lab.Topology{Link: lab.RoundTrip(30 * time.Millisecond)})
	for _, s := range l.Sites {
		n := s.Nodes[0]
		plain, err := l.Ask(t.Context(), n, lab.FastModel, "Hello")
		if err != nil || plain == "" {
			t.Fatalf("%s: %q, %v", n.Name, plain, err)
		}
		stream, err := l.AskStream(t.Context(), n, lab.FastModel, "Hello")
		if err != nil || stream != plain {
			t.Errorf("%s streamed %q, %v; want %q", n.Name, stream, err, plain)
		}
		if mb := n.AnonMemory(t) >> 20; mb > 60 {
			t.Errorf("%s uses %d MB when idle, want 60 at most", n.Name, mb)
		}
	}

	running := l.StartLoad(load(l))
	first := l.Sites[0]
	await(t, running, 300)
	first.Model.Kill()
	gone := time.Now()
	await(t, running, 1500)
	back := time.Now()
	first.Model.Start()
	await(t, running, 600)
	results := running.Stop()
	wantNoFailure(t, results, true)
	elsewhere := 0
	for _, r := range results {
		if r.Site != first.Name || r.Err != nil || r.At.Before(gone) || !r.At.Add(r.Took).Before(back) {
			continue
		}
		elsewhere++
		if r.ServedBy != l.Sites[1].Name {
			t.Fatalf("without its model server %s was served by %q, want %s in the same city", first.Name, r.ServedBy, l.Sites[1].Name)
		}
	}
	if elsewhere < 100 {
		t.Errorf("only %d requests of %s were served while its model server was gone", elsewhere, first.Name)
	}
}

// await lets the load run until it has that many more results.
func await(t *testing.T, r *lab.Running, more int) {
	t.Helper()
	want := r.Count() + more
	deadline := time.After(2 * time.Minute)
	for tick := time.NewTicker(20 * time.Millisecond); r.Count() < want; {
		select {
		case <-deadline:
			t.Fatalf("the load has %d results after 2 minutes, want %d", r.Count(), want)
		case <-tick.C:
		}
	}
}

func TestTwoOfThreeSitesLost(t *testing.T) {
	parallelIfShort(t)
	l := lab.Start(t, lab.Topology{Link: lab.RoundTrip(30 * time.Millisecond)})
	last := l.Sites[2]
	running := l.StartLoad(lab.Load{Rate: 100, Streams: 10, Sites: l.Sites[2:]})
	await(t, running, 100)
	l.Sites[0].Kill()
	l.Sites[1].Kill()
	killed := time.Now()
	n := last.Nodes[0]
	l.WaitFor(within(10*time.Second), "the last site to notice that there is no quorum", func(ctx context.Context) error {
		status, err := n.Status(ctx)
		switch {
		case err != nil:
			return err
		case status.Healthy || status.Raft.Quorum || status.Raft.Leader != nil:
			return errStillQuorum
		case status.Raft.QuorumSince == nil || status.Raft.QuorumSince.Before(killed.Add(-time.Second)):
			t.Errorf("no quorum since %v, want a time after %v", status.Raft.QuorumSince, killed)
		}
		return nil
	})
	begun := time.Now()
	if err := n.ApplyConfig(t.Context(), l.ClusterYAML()+"# changed\n"); err == nil {
		t.Error("a change of the configuration was accepted without a quorum")
	} else if took := time.Since(begun); took > within(2*time.Second) {
		t.Errorf("a change was refused only after %v: %v", took, err)
	} else if !strings.Contains(err.Error(), "no_quorum") {
		t.Errorf("a change was refused for another reason than the quorum: %v", err)
	} else {
		t.Logf("refused after %v: %v", took, err)
	}
	await(t, running, 500)
	wantNoFailure(t, running.Stop(), false)
}
