//go:build linux

package test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dsnode/dsnode/test/lab"
)

const cacheCanary = "canary-51c0de"

// askCached sends a deterministic request to a node and returns status, X-Dsnode-Cache,
// body and header of the answer.
func askCached(t *testing.T, n *lab.Node, question, mode string) (status int, label, text string, header http.Header) {
	t.Helper()
	body := fmt.Sprintf(`{"model":%q,"temperature":0,"stream":true,"messages":[{"role":"user","content":%q}]}`, lab.FastModel, question)
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, n.API()+"/v1/chat/completions", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	if mode != "" {
		req.Header.Set("X-Dsnode-Cache", mode)
	}
	resp, err := n.Site.Client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }() // read to its end
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, resp.Header.Get("X-Dsnode-Cache"), string(b), resp.Header
}

// A cached answer is found again after the node was killed, a purge takes effect on a
// node that was down, and no file contains the question or the answer.
func TestTheCacheOfRealNodes(t *testing.T) {
	parallelIfShort(t)
	l := lab.Start(t, lab.Topology{})
	here, away := l.Sites[0].Nodes[0], l.Sites[2].Nodes[0]
	for _, n := range []*lab.Node{here, away} {
		// Answers are cached once the cluster has agreed on a data key.
		deadline := time.Now().Add(within(30 * time.Second))
		question, first, before := "", "", int64(0)
		for i := 0; ; i++ {
			question = fmt.Sprintf("Tell me of %s, %d", cacheCanary, i)
			var err error
			if before, err = n.CacheEntries(t.Context()); err != nil {
				before = 0 // the shared tier is not open yet
			}
			status, label, text, _ := askCached(t, n, question, "")
			if status != http.StatusOK {
				t.Fatalf("%s: %d %s", n.Name, status, text)
			}
			if first = text; label == "miss" {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s still says %s", n.Name, label)
			}
		}
		_, label, text, header := askCached(t, n, question, "")
		if label != "hit-local" || text != first || header.Get("Age") == "" || !strings.Contains(header.Get("Cache-Status"), "hit") {
			t.Fatalf("%s: %s, %v, %q then %q", n.Name, label, header, first, text)
		}
		// The shared tier is written asynchronously.
		l.WaitFor(within(10*time.Second), "the answer to be in the file", func(ctx context.Context) error {
			entries, err := n.CacheEntries(ctx)
			if err == nil && entries <= before {
				err = fmt.Errorf("%d entries, there were %d", entries, before)
			}
			return err
		})
		l.WaitFor(within(20*time.Second), "the node to find the answer after a restart", func(context.Context) error {
			n.Restart()
			l.WaitHealthy(within(20 * time.Second))
			_, label, text, _ := askCached(t, n, question, "only")
			if label != "hit-shared" || text != first {
				return fmt.Errorf("%s: %s", n.Name, label)
			}
			return nil
		})
		if n == away {
			purgeWhileAway(t, l, here, away, question)
		}
	}
	for _, n := range l.Nodes() {
		wantNoCanary(t, n)
	}
}

// purgeWhileAway purges the cache while a node is down, restarts the node, and checks
// that it applies the purge.
func purgeWhileAway(t *testing.T, l *lab.Lab, here, away *lab.Node, question string) {
	t.Helper()
	away.Kill()
	// The killed node may have led raft. Until another one leads, a purge is refused.
	l.WaitFor(within(20*time.Second), "a purge", func(ctx context.Context) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, here.AdminURL()+"/admin/v1/cache/purge", strings.NewReader(fmt.Sprintf(`{"model":%q}`, lab.FastModel)))
		if err != nil {
			return err
		}
		resp, err := here.Site.Client().Do(req)
		if err != nil {
			return err
		}
		if err := resp.Body.Close(); err != nil || resp.StatusCode != http.StatusNoContent {
			return fmt.Errorf("%s, %w", resp.Status, err)
		}
		return nil
	})
	away.Start()
	l.WaitHealthy(within(20 * time.Second))
	if status, label, _, _ := askCached(t, away, question, "only"); status != http.StatusGatewayTimeout || label != "miss" {
		t.Errorf("after the purge: %d %s", status, label)
	}
}

func wantNoCanary(t *testing.T, n *lab.Node) {
	t.Helper()
	files := 0
	err := filepath.WalkDir(n.DataDir(), func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		files++
		b, err := os.ReadFile(path)
		if err == nil && bytes.Contains(b, []byte(cacheCanary)) {
			t.Errorf("%s contains a question or an answer as plaintext", path)
		}
		return err
	})
	if err != nil || files == 0 {
		t.Errorf("%s: %d files, %v", n.Name, files, err)
	}
}
