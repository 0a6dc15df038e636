//go:build linux

package test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"testing"
	"time"

	"github.com/dsnode/dsnode/test/lab"
)

// An answer that was cached in one site is a cache hit in the other sites shortly
// afterwards, also when the first site is gone, and after a restart of all nodes.
func TestKeptAnswersAreEverywhere(t *testing.T) {
	parallelIfShort(t)
	l := lab.Start(t, lab.Topology{Link: lab.RoundTrip(30 * time.Millisecond)})
	question := func(n int, stream bool) []byte {
		b, err := json.Marshal(map[string]any{
			"model": lab.FastModel, "temperature": 0, "stream": stream,
			"messages": []map[string]string{{"role": "user", "content": fmt.Sprintf("Question %d?", n)}},
		})
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	// With "only" a miss does not ask a model server, so looking does not fill the cache.
	only := map[string]string{"X-Dsnode-Cache": "only"}
	hit := func(n *lab.Node, body []byte, want string, within time.Duration) time.Duration {
		t.Helper()
		return l.WaitFor(within, "a hit at "+n.Name, func(context.Context) error {
			status, header, answer, err := n.Post(t.Context(), "/v1/chat/completions", body, only)
			cache := header.Get("X-Dsnode-Cache")
			switch {
			case err != nil:
				return err
			case status != http.StatusOK || cache != "hit-shared" && cache != "hit-local":
				return fmt.Errorf("status %d, X-Dsnode-Cache: %s", status, cache)
			case string(answer) != want:
				t.Errorf("%s gave another answer: %.200s", n.Name, answer)
			}
			return nil
		})
	}
	a, b, c := l.Sites[0].Nodes[0], l.Sites[1].Nodes[0], l.Sites[2].Nodes[0]
	kept := map[string]string{}
	for i, stream := range []bool{false, true} {
		body := question(i, stream)
		status, header, text, err := a.Post(t.Context(), "/v1/chat/completions", body, nil)
		if cache := header.Get("X-Dsnode-Cache"); err != nil || status != http.StatusOK || cache != "miss" {
			t.Fatalf("first request: status %d, X-Dsnode-Cache: %s, %v", status, cache, err)
		}
		answer := string(text)
		kept[string(body)] = answer
		first := hit(b, body, answer, within(time.Second))
		t.Logf("stream %t: a hit in the other sites after %v", stream, first+hit(c, body, answer, within(time.Second)))
	}
	l.Sites[0].Kill()
	for body, answer := range kept {
		hit(b, []byte(body), answer, within(time.Second))
		hit(c, []byte(body), answer, within(time.Second))
	}
	// Answers cached while the site is down reach it when it is back.
	missed := map[string]string{}
	for i := range 200 {
		body := question(100+i, false)
		status, _, text, err := b.Post(t.Context(), "/v1/chat/completions", body, nil)
		if err != nil || status != http.StatusOK {
			t.Fatalf("question %d while a site is down: status %d, %v", i, status, err)
		}
		missed[string(body)] = string(text)
	}
	l.Sites[0].Start()
	l.WaitHealthy(within(15 * time.Second))
	for body, answer := range missed {
		hit(a, []byte(body), answer, within(10*time.Second))
	}
	for _, n := range l.Nodes() {
		n.Kill()
	}
	for _, n := range l.Nodes() {
		n.Start()
	}
	l.WaitHealthy(within(20 * time.Second))
	for body, answer := range kept {
		for _, n := range l.Nodes() {
			hit(n, []byte(body), answer, within(5*time.Second))
		}
	}
}
