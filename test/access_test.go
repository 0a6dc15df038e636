//go:build linux

package test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dsnode/dsnode/node/admin"
	"github.com/dsnode/dsnode/test/lab"
)

// A site that is cut off accepts keys for access.stale_for, also one that is revoked
// meanwhile. After that it answers 503, also after a restart, until the cut ends.
func TestRevokedKeyAtASiteThatIsCutOff(t *testing.T) {
	parallelIfShort(t)
	const staleFor = 10 * time.Second
	l := lab.Start(t, lab.Topology{Link: lab.RoundTrip(betweenCities), Cluster: func(text string) string {
		return strings.Replace(text, "access: {anonymous: true}", "access: {stale_for: "+staleFor.String()+"}", 1)
	}})
	away, here := l.Sites[2].Nodes[0], l.Sites[0].Nodes[0]
	kept, revoked := createKey(t, here), createKey(t, here)
	answers := func(within time.Duration, key admin.APIKeyCreated, status int, code string) {
		t.Helper()
		took := l.WaitFor(within, fmt.Sprintf("%d %s at %s", status, code, away.Name), func(ctx context.Context) error {
			return wantAnswer(ctx, away, key.Secret, status, code)
		})
		t.Logf("%d %s after %v", status, code, took)
	}
	for _, key := range []admin.APIKeyCreated{kept, revoked} {
		answers(within(returns), key, http.StatusOK, "")
	}
	l.Net.Isolate(2)
	cut := time.Now()
	l.WaitFor(within(20*time.Second), "the key to be revoked", func(ctx context.Context) error { return revokeKey(ctx, here, revoked.ID) })
	if err := wantAnswer(t.Context(), away, revoked.Secret, http.StatusOK, ""); err != nil && time.Since(cut) < staleFor {
		t.Errorf("%v after the cut: %v", time.Since(cut), err)
	}
	answers(within(20*time.Second), kept, http.StatusServiceUnavailable, "auth_stale")
	if cutFor := time.Since(cut); cutFor < staleFor-time.Second {
		t.Errorf("keys were refused %v after the cut", cutFor)
	}
	answers(time.Second, revoked, http.StatusServiceUnavailable, "auth_stale")
	saysSo := func(ctx context.Context) error {
		s, err := away.Status(ctx)
		if err == nil && !slices.ContainsFunc(s.Reasons, func(r string) bool { return strings.Contains(r, "refuses the API keys of clients") }) {
			err = fmt.Errorf("reasons %q", s.Reasons)
		}
		return err
	}
	l.WaitFor(within(5*time.Second), "a status that says so", saysSo)
	away.Restart()
	l.WaitFor(within(20*time.Second), "the same after a restart", saysSo)
	answers(time.Second, revoked, http.StatusServiceUnavailable, "auth_stale")
	l.Net.MendAll()
	answers(within(returns), kept, http.StatusOK, "")
	answers(within(returns), revoked, http.StatusUnauthorized, "invalid_api_key")
	l.WaitHealthy(within(returns))
}

// wantAnswer asks a node for its models with a key.
func wantAnswer(ctx context.Context, n *lab.Node, secret string, status int, code string) error {
	resp, text, err := askNode(ctx, n, http.MethodGet, n.API()+"/v1/models", "", secret)
	if err != nil {
		return err
	}
	var body struct {
		Error struct{ Code string }
	}
	if err := json.Unmarshal(text, &body); err != nil {
		return fmt.Errorf("answer %s: %w", text, err)
	}
	if resp.StatusCode != status || body.Error.Code != code {
		return fmt.Errorf("answered %s %s", resp.Status, text)
	}
	return nil
}

func createKey(t *testing.T, n *lab.Node) admin.APIKeyCreated {
	t.Helper()
	resp, text, err := askNode(t.Context(), n, http.MethodPost, n.AdminURL()+"/admin/v1/apikeys?author=lab", `{"tenant":"t"}`, "")
	var key admin.APIKeyCreated
	if err == nil {
		err = json.Unmarshal(text, &key)
	}
	if err != nil || key.Secret == "" {
		t.Fatalf("create a key: %v, %v, %s", err, resp, text)
	}
	return key
}

func revokeKey(ctx context.Context, n *lab.Node, id string) error {
	resp, text, err := askNode(ctx, n, http.MethodDelete, n.AdminURL()+"/admin/v1/apikeys/"+id+"?author=lab", "", "")
	if err == nil && resp.StatusCode != http.StatusNoContent {
		err = fmt.Errorf("answered %s: %s", resp.Status, text)
	}
	return err
}

// askNode sends a request from within the node's site.
func askNode(ctx context.Context, n *lab.Node, method, url, body, key string) (*http.Response, []byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, url, strings.NewReader(body))
	if err != nil {
		return nil, nil, err
	}
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	if key != "" {
		req.Header.Set("Authorization", "Bearer "+key)
	}
	resp, err := n.Site.Client().Do(req)
	if err != nil {
		return nil, nil, err
	}
	text, err := io.ReadAll(resp.Body)
	return resp, text, errors.Join(err, resp.Body.Close())
}
