//go:build linux

package test

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"testing"

	"github.com/dsnode/dsnode/test/lab"
)

// A node whose data directory is deleted while it runs accepts no job any more, since no later
// process would find it. Every node says so, clients are served, and the process lives. With
// an empty directory it starts again and gets everything from the others.
func TestDataDirectoryDeletedWhileRunning(t *testing.T) {
	parallelIfShort(t)
	l := lab.Start(t, lab.Topology{})
	wantVoters(t, l, 3)
	n, pid := l.Sites[2].Nodes[0], l.Sites[2].Nodes[0].PID()
	request := fmt.Sprintf(`{"model":%q,"messages":[{"role":"user","content":"hello"}]}`, lab.FastModel)
	post := func(path, body string) int {
		t.Helper()
		status, _, answer, err := n.Post(t.Context(), path, []byte(body), nil)
		if err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		t.Logf("%s: %d %.200s", path, status, answer)
		return status
	}
	job := fmt.Sprintf(`{"endpoint":"/v1/chat/completions","body":%s}`, request)
	l.WaitFor(within(healsWithin), "a job to be accepted", func(context.Context) error {
		if status := post("/v1/jobs", job); status != http.StatusAccepted {
			return fmt.Errorf("status %d", status)
		}
		return nil
	})
	if err := os.RemoveAll(n.DataDir()); err != nil {
		t.Fatal(err)
	}
	for range 5 {
		if status := post("/v1/jobs", job); status != http.StatusServiceUnavailable {
			t.Errorf("a job without a data directory: status %d", status)
		}
	}
	wantReasons(t, l, "the data directory is gone", "node "+n.Name, "the data directory was deleted or replaced while the node runs", "it refuses jobs")
	if status := post("/v1/chat/completions", request); status != http.StatusOK {
		t.Errorf("chat without a data directory: status %d", status)
	}
	if !n.Running() || n.PID() != pid {
		t.Errorf("the process of %s has ended", n.Name)
	}
	n.Kill()
	if err := os.Mkdir(n.DataDir(), 0o700); err != nil {
		t.Fatal(err)
	}
	n.Start()
	t.Logf("healthy %v after the restart", l.WaitHealthy(within(healsWithin)))
}
