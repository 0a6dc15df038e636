//go:build linux

package test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dsnode/dsnode/test/lab"
)

// canaries are texts that must not occur in plaintext anywhere.
type canaries struct {
	texts [][]byte
	names []string
}

func (c *canaries) add(name, text string) {
	if len(text) < 12 {
		panic("the canary is so short that it could occur by chance: " + text)
	}
	c.names, c.texts = append(c.names, name), append(c.texts, []byte(text))
}

// find returns the names of the canaries in b.
func (c *canaries) find(b []byte) []string {
	var found []string
	for i, text := range c.texts {
		if bytes.Contains(b, text) {
			found = append(found, c.names[i])
		}
	}
	return found
}

// Prompts, answers and keys of requests, jobs and cached answers are in no file of a
// data directory and in no packet between sites.
func TestNothingInClear(t *testing.T) {
	parallelIfShort(t)
	l := lab.Start(t, lab.Topology{Link: lab.RoundTrip(30 * time.Millisecond), Cluster: withJobs})
	var c canaries
	const prompt, key = "canary-of-a-prompt-4711", "canary-of-an-idempotency-key"
	c.add("a prompt", prompt)
	c.add("an idempotency key", key)
	text, err := os.ReadFile(filepath.Join(filepath.Dir(filepath.Dir(l.Nodes()[0].DataDir())), "operator.key"))
	if err != nil {
		t.Fatal(err)
	}
	c.add("the operator's key", strings.TrimSpace(string(text)))
	answer, err := l.Ask(t.Context(), l.Nodes()[0], lab.FastModel, prompt)
	if err != nil {
		t.Fatal(err)
	}
	c.add("an answer", answer[len(answer)/3:len(answer)/3+40])
	var mu sync.Mutex // guards wire, packets
	wire, packets := map[string]bool{}, 0
	l.Net.Tap(func(packet []byte) {
		found := c.find(packet)
		mu.Lock()
		defer mu.Unlock()
		packets++
		for _, name := range found {
			wire[name] = true
		}
	})
	body := map[string]any{"model": lab.FastModel, "temperature": 0, "messages": []map[string]string{{"role": "user", "content": prompt}}}
	for _, n := range l.Nodes() {
		post(t, n, "/v1/chat/completions", body, nil, http.StatusOK)
		job := post(t, n, "/v1/jobs", map[string]any{"endpoint": "/v1/chat/completions", "body": body, "durability": "two-cities"},
			map[string]string{"Idempotency-Key": key + n.Name}, http.StatusAccepted)
		var v lab.JobView
		if err := json.Unmarshal(job, &v); err != nil {
			t.Fatal(err)
		}
		for _, other := range l.Nodes() {
			l.WaitFor(within(30*time.Second), "all nodes to show the job as succeeded", func(ctx context.Context) error {
				got, err := other.Job(ctx, v.ID)
				if err == nil && got.Status != "succeeded" {
					err = fmt.Errorf("%s shows it as %s", other.Name, got.Status)
				}
				if err == nil && len(c.find(got.Result)) == 0 {
					err = fmt.Errorf("the answer does not contain the canary: %s", got.Result)
				}
				return err
			})
		}
	}
	// A site without its model server is served by another site, over a link.
	l.Sites[0].Model.Kill()
	post(t, l.Nodes()[0], "/v1/chat/completions", map[string]any{"model": lab.FastModel, "messages": body["messages"]}, nil, http.StatusOK)
	for _, n := range l.Nodes() {
		n.Terminate(25 * time.Second) // writes what is in memory to the disk
	}
	l.Net.Tap(nil)
	mu.Lock()
	for name := range wire {
		t.Errorf("%s was sent between sites in plaintext", name)
	}
	if packets < 500 {
		t.Errorf("only %d packets were searched", packets)
	}
	mu.Unlock()
	files, size := 0, 0
	for _, n := range l.Nodes() {
		err := filepath.WalkDir(n.DataDir(), func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			b, err := os.ReadFile(path)
			files, size = files+1, size+len(b)
			for _, name := range c.find(b) {
				t.Errorf("%s is in plaintext in %s", name, path)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("searched %d packets and %d files with %d bytes", packets, files, size)
	if size < 100_000 {
		t.Error("the disks hold too little for the test to prove anything")
	}
}

// post sends a body as JSON; the test fails unless the answer has that status.
func post(t *testing.T, n *lab.Node, path string, body any, header map[string]string, want int) []byte {
	t.Helper()
	b, err := json.Marshal(body)
	if err != nil {
		t.Fatal(err)
	}
	status, _, answer, err := n.Post(t.Context(), path, b, header)
	if err != nil || status != want {
		t.Fatalf("POST %s at %s: status %d, want %d: %s %v", path, n.Name, status, want, answer, err)
	}
	return answer
}
