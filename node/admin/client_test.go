package admin

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/failover"
	"github.com/dsnode/dsnode/failover/drill"
)

// closedURL is an address without a listener.
func closedURL(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	return "http://" + l.Addr().String()
}

// silentURL accepts connections and never answers; asked counts requests.
func silentURL(t *testing.T) (url string, asked *atomic.Int32) {
	t.Helper()
	asked = new(atomic.Int32)
	release := make(chan struct{})
	s := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		select {
		case <-release:
		case <-r.Context().Done():
		}
	}))
	t.Cleanup(func() { close(release); s.Close() })
	return s.URL, asked
}

func TestClientIsACluster(t *testing.T) {
	ctx := t.Context()
	f := newFake("me-1")
	c := dial(t, ClientOptions{Author: "ann@desk"}, serve(t, f, "").URL)

	status, err := c.Status(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(f.status, status); diff != "" {
		t.Errorf("the client returned another status (-want +got):\n%s", diff)
	}
	if ups, err := c.Upstreams(ctx); err != nil || len(ups) != 1 || ups[0].InFlight != nil {
		t.Errorf("upstreams %+v, %v", ups, err)
	}
	if err := c.Bootstrap(ctx, []byte(goodConfig), ""); err != nil {
		t.Errorf("repeated bootstrap: %v", err)
	}
	v, err := c.ApplyConfig(ctx, []byte(goodConfig+"# é\n"), ptr(uint64(1)), "")
	if err != nil || v.Version != 2 || v.Author != "ann@desk" || v.Text != goodConfig+"# é\n" {
		t.Errorf("apply: %+v, %v", v, err)
	}
	if _, err := c.ApplyConfig(ctx, []byte(goodConfig), ptr(uint64(1)), ""); !errors.Is(err, agreed.ErrVersionConflict) {
		t.Errorf("apply on an old version: %v", err)
	}
	if v, err := c.RollbackConfig(ctx, 1, ptr(uint64(2)), "bob"); err != nil || v.Version != 3 || v.Author != "bob" || v.Text != goodConfig {
		t.Errorf("rollback: %+v, %v", v, err)
	}
	if h, err := c.ConfigHistory(ctx); err != nil || len(h) != 2 || h[0].Version != 1 {
		t.Errorf("history: %+v, %v", h, err)
	}
	expires := time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC)
	key, err := c.CreateAPIKey(ctx, APIKeyRequest{Tenant: "acme", Models: []string{"m"}, ExpiresAt: &expires})
	if err != nil || key.Secret == "" || key.ExpiresAt == nil || !key.ExpiresAt.Equal(expires) {
		t.Errorf("create: %+v, %v", key, err)
	}
	if err := c.RevokeAPIKey(ctx, key.ID); err != nil {
		t.Errorf("revoke: %v", err)
	}
	if keys, err := c.APIKeys(ctx); err != nil || len(keys) != 1 || keys[0].State(expires) != "revoked" {
		t.Errorf("keys: %+v, %v", keys, err)
	}
	if err := c.RevokeAPIKey(ctx, "../nodes/gone-1"); !errors.Is(err, agreed.ErrUnknownKey) {
		t.Errorf("an id with slashes was not escaped: %v", err)
	}
	if err := c.DrainNode(ctx, "me-1"); err != nil || !f.draining {
		t.Errorf("drain: %v, draining %t", err, f.draining)
	}
	if err := c.DrainUpstream(ctx, "a-vllm", "ann"); err != nil || !f.drained || f.drainedBy != "ann" {
		t.Errorf("drain upstream: %v, drained %t by %q", err, f.drained, f.drainedBy)
	}
	if err := c.ResumeUpstream(ctx, "a-vllm", ""); err != nil || f.drained {
		t.Errorf("resume upstream: %v, drained %t", err, f.drained)
	}
	if err := c.DrainUpstream(ctx, "nobody", ""); !errors.Is(err, agreed.ErrUnknownUpstream) {
		t.Errorf("drain an unknown upstream: %v", err)
	}
	if err := c.ResumeNode(ctx, "me-1"); err != nil || f.draining {
		t.Errorf("resume: %v, draining %t", err, f.draining)
	}
	if err := c.RemoveNode(ctx, RemovalRequest{Node: "gone-1"}, ""); err != nil {
		t.Errorf("remove: %v", err)
	}
	if plan, err := c.PlanRemoval(ctx, "alone-1"); err != nil || plan.Node != "alone-1" || *plan.RecordsOnlyThere != 10 {
		t.Errorf("plan a removal: %+v, %v", plan, err)
	}
	if err := c.RemoveNode(ctx, RemovalRequest{Node: "alone-1"}, ""); !errors.Is(err, ErrOnlyThere) {
		t.Errorf("remove a node with records of its own: %v", err)
	}
	err = errors.Join(c.RemoveNode(ctx, RemovalRequest{Node: "alone-1", AcceptLoss: true, Force: true}, "ann"), c.AdmitNode(ctx, "alone-1", "bob"))
	want := []string{"plan the removal of alone-1", "remove alone-1 force=true by ann", "admit alone-1 by bob"}
	if err != nil || !slices.Equal(f.noted(), want) {
		t.Errorf("noted %v, %v, want %v", f.noted(), err, want)
	}
}

func TestClientAsksForFailoversAndDrills(t *testing.T) {
	f := newFake("me-1")
	c := dial(t, ClientOptions{Author: "ann@desk"}, serve(t, f, "").URL)
	ctx := t.Context()
	r := FailoverRequest{To: "shanghai-b", AcceptLoss: true, Waive: []string{"x", "y"}}
	plan, err := c.PlanFailover(ctx, r, "")
	if err != nil || !plan.OK || len(plan.Checks) != 1 {
		t.Errorf("plan: %+v, %v", plan, err)
	}
	if res, err := c.Failover(ctx, r, "bob"); err != nil || res.Epoch != 2 || res.To != "shanghai-b" {
		t.Errorf("failover: %+v, %v", res, err)
	}
	q := DrillRequest{Kind: "isolation", Site: "shanghai-b", ForSeconds: 12.5, Return: true, Waive: []string{"x"}, ProbeModel: "m"}
	if p, err := c.PlanDrill(ctx, q, ""); err != nil || !p.OK {
		t.Errorf("plan a drill: %+v, %v", p, err)
	}
	d, err := c.StartDrill(ctx, q, "")
	if err != nil || d.ID != "drill-1" || d.Verdict != nil {
		t.Errorf("drill: %+v, %v", d, err)
	}
	if all, err := c.Drills(ctx); err != nil || len(all) != 1 {
		t.Errorf("drills: %+v, %v", all, err)
	}
	if got, err := c.Drill(ctx, d.ID); err != nil || got.Site != "shanghai-b" {
		t.Errorf("drill: %+v, %v", got, err)
	}
	for _, err := range []error{
		c.AbortDrill(ctx, d.ID, ""), c.AckFailover(ctx, ""), c.HoldFailover(ctx, "new switches", ""), c.ResumeFailover(ctx, ""), c.ReleaseQuarantine(ctx),
	} {
		if err != nil {
			t.Error(err)
		}
	}
	drill := "{Kind:isolation Site:shanghai-b ForSeconds:12.5 Return:true Waive:[x] ProbeModel:m} by ann@desk"
	want := []string{
		"plan shanghai-b loss=true waive=[x y] by ann@desk", "move to shanghai-b loss=true waive=[x y] by bob",
		"plan drill " + drill, "drill " + drill, "abort drill-1 by ann@desk", "ack by ann@desk", `hold "new switches" by ann@desk`,
		"resume by ann@desk", "release",
	}
	if diff := cmp.Diff(want, f.noted()); diff != "" {
		t.Errorf("the node got other requests (-want +got):\n%s", diff)
	}
}

// The code of a failed switchover becomes the same sentinel at the client, with the
// node's message. The cause inside is not the answer.
func TestClientTellsHowASwitchoverFailed(t *testing.T) {
	f := newFake("me-1")
	c := dial(t, ClientOptions{}, serve(t, f, "").URL)
	for _, want := range []error{failover.ErrPrecheck, failover.ErrRolledBack, failover.ErrOvertaken, failover.ErrUnknownOutcome} {
		fail := fmt.Errorf("%w: %w and %w", want, cluster.ErrNoQuorum, context.DeadlineExceeded)
		f.refuse(fail)
		_, err := c.Failover(t.Context(), FailoverRequest{To: "shanghai-b"}, "")
		if !errors.Is(err, want) || errors.Is(err, cluster.ErrNoQuorum) || err.Error() != fail.Error() {
			t.Errorf("got %v, want %v", err, fail)
		}
	}
}

// TestClientFindsTheNodeThatRunsADrill: a node of another site runs it and is asked first
// from then on. An abort goes to all nodes.
func TestClientFindsTheNodeThatRunsADrill(t *testing.T) {
	victim, runner := newFake("a-1"), newFake("b-1")
	runner.status.Observer.Site = "shanghai-b"
	victim.drills = []Drill{{ID: "drill-1", Site: "shanghai-a"}}
	c := dial(t, ClientOptions{}, serve(t, victim, "").URL, serve(t, runner, "").URL)
	d, err := c.StartDrill(t.Context(), DrillRequest{Kind: "isolation", Site: "shanghai-a"}, "")
	if err != nil {
		t.Fatal(err)
	}
	if got, err := c.Drill(t.Context(), d.ID); err != nil || got.Kind != "isolation" {
		t.Errorf("the answer is from the wrong node: %+v, %v", got, err)
	}
	if err := c.AbortDrill(t.Context(), d.ID, "ann"); err != nil || len(victim.noted()) != 1 || len(runner.noted()) != 2 {
		t.Errorf("%v; the nodes got %q, %q", err, victim.noted(), runner.noted())
	}
	if err := c.AbortDrill(t.Context(), "nothing", ""); !errors.Is(err, drill.ErrUnknown) {
		t.Errorf("abort of an unknown drill: %v", err)
	}
}

func TestClientTriesTheNextURL(t *testing.T) {
	f := newFake("me-1")
	good := serve(t, f, "").URL
	silent, _ := silentURL(t)
	outsider := serve(t, &fakeCluster{name: "new-1", fail: cluster.ErrNotMember}, "").URL
	for name, first := range map[string]string{"closed": closedURL(t), "silent": silent, "no member": outsider} {
		t.Run(name, func(t *testing.T) {
			c := dial(t, ClientOptions{Timeout: 2 * time.Second}, first, good)
			if s, err := c.Status(t.Context()); err != nil || s.Cluster != "dev" {
				t.Errorf("status %q, %v", s.Cluster, err)
			}
		})
	}
	t.Run("a change, when the first can't have got it", func(t *testing.T) {
		c := dial(t, ClientOptions{}, closedURL(t), good)
		if _, err := c.ApplyConfig(t.Context(), []byte(goodConfig), nil, ""); err != nil {
			t.Error(err)
		}
	})
	t.Run("drain finds the node", func(t *testing.T) {
		c := dial(t, ClientOptions{}, serve(t, newFake("other-1"), "").URL, good)
		if err := c.DrainNode(t.Context(), "me-1"); err != nil || !f.draining {
			t.Errorf("%v, draining %t", err, f.draining)
		}
	})
	t.Run("drain of an unknown node", func(t *testing.T) {
		c := dial(t, ClientOptions{}, good, closedURL(t))
		if err := c.DrainNode(t.Context(), "third-1"); !errors.Is(err, ErrWrongNode) {
			t.Errorf("got %v, want ErrWrongNode", err)
		}
	})
}

// TestChangeIsNotSentTwice: a node that may have received a change and did not answer
// may have made it.
func TestChangeIsNotSentTwice(t *testing.T) {
	silent, asked := silentURL(t)
	f := newFake("me-1")
	c := dial(t, ClientOptions{Timeout: time.Second}, silent, serve(t, f, "").URL)
	_, err := c.ApplyConfig(t.Context(), []byte(goodConfig), nil, "")
	if !errors.Is(err, ErrUnanswered) {
		t.Errorf("got %v, want ErrUnanswered", err)
	}
	if asked.Load() != 1 || len(f.versions) != 1 {
		t.Errorf("asked %d times, %d versions", asked.Load(), len(f.versions))
	}
}

func TestRefusalIsFinal(t *testing.T) {
	lost := newFake("lost-1")
	lost.refuse(cluster.ErrNoQuorum)
	f := newFake("me-1")
	c := dial(t, ClientOptions{}, serve(t, lost, "").URL, serve(t, f, "").URL)
	if _, err := c.ApplyConfig(t.Context(), []byte(goodConfig), nil, ""); !errors.Is(err, cluster.ErrNoQuorum) || len(f.versions) != 1 {
		t.Errorf("got %v and %d versions", err, len(f.versions))
	}
}

func TestUnreachableNamesEveryURL(t *testing.T) {
	a, b := closedURL(t), closedURL(t)
	_, err := dial(t, ClientOptions{}, a, b).Status(t.Context())
	if !errors.Is(err, ErrUnreachable) || !strings.Contains(err.Error(), a) || !strings.Contains(err.Error(), b) || !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("got %v", err)
	}
}

func TestNotAnAdminPort(t *testing.T) {
	var redirected atomic.Bool
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/elsewhere" {
			redirected.Store(true)
		}
		w.Header().Set("Location", "/elsewhere")
		w.WriteHeader(http.StatusFound)
	}))
	t.Cleanup(s.Close)
	_, err := dial(t, ClientOptions{Token: "t"}, s.URL).Status(t.Context())
	if !errors.Is(err, ErrNotAdmin) || redirected.Load() {
		t.Errorf("got %v, redirected %t", err, redirected.Load())
	}
}

func TestClientToken(t *testing.T) {
	s := serve(t, newFake("me-1"), "s3cret")
	if _, err := dial(t, ClientOptions{Token: "s3cret"}, s.URL).Status(t.Context()); err != nil {
		t.Errorf("with the token: %v", err)
	}
	if _, err := dial(t, ClientOptions{Token: "other"}, s.URL).Status(t.Context()); !errors.Is(err, ErrUnauthorized) {
		t.Errorf("with another token: %v", err)
	}
}

func TestClientTrustsItsCA(t *testing.T) {
	s := httptest.NewTLSServer(New(Options{Cluster: newFake("me-1"), Health: http.NotFoundHandler(), Token: "t", Gatherer: prometheus.NewRegistry()}))
	t.Cleanup(s.Close)
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pemOf(s), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := dial(t, ClientOptions{Token: "t", CAFile: ca}, s.URL).Status(t.Context()); err != nil {
		t.Errorf("with the CA: %v", err)
	}
	if _, err := dial(t, ClientOptions{Token: "t"}, s.URL).Status(t.Context()); !errors.Is(err, ErrUnreachable) || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("without the CA: %v", err)
	}
}

func TestNewClientRefuses(t *testing.T) {
	noCA := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(noCA, []byte("nothing"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		urls []string
		o    ClientOptions
		want string
	}{
		"no URL":         {nil, ClientOptions{}, "no admin URL"},
		"no scheme":      {[]string{"127.0.0.1:8081"}, ClientOptions{}, "write http://127.0.0.1:8081"},
		"other scheme":   {[]string{"ftp://x"}, ClientOptions{}, "must begin with http"},
		"a path":         {[]string{"http://x/admin"}, ClientOptions{}, "must only have a scheme, a host and a port"},
		"a password":     {[]string{"http://u:p@x"}, ClientOptions{}, "must only have a scheme, a host and a port"},
		"a broken port":  {[]string{"http://u:p@x:port"}, ClientOptions{}, "invalid port"},
		"token in clear": {[]string{"http://10.0.0.1:8081"}, ClientOptions{Token: "t"}, "write https://"},
		"no CA file":     {[]string{"https://x"}, ClientOptions{CAFile: noCA + "x"}, "no such file"},
		"no PEM":         {[]string{"https://x"}, ClientOptions{CAFile: noCA}, "no certificate"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := NewClient(tt.urls, tt.o)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
			if err != nil && strings.Contains(err.Error(), "u:p") {
				t.Errorf("the error contains the password: %q", err)
			}
		})
	}
}

func pemOf(s *httptest.Server) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
}
