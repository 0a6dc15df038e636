package admin

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/cluster/config"
)

// send sends a request over a real connection and returns the status and the body.
func send(t *testing.T, s *httptest.Server, method, path, body string, change ...func(*http.Request)) (*http.Response, string) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, s.URL+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range change {
		c(r)
	}
	resp, err := s.Client().Do(r)
	if err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(resp.Body)
	if err := errors.Join(err, resp.Body.Close()); err != nil {
		t.Fatal(err)
	}
	return resp, string(text)
}

func header(name, value string) func(*http.Request) {
	return func(r *http.Request) { r.Header.Set(name, value) }
}

func host(name string) func(*http.Request) { return func(r *http.Request) { r.Host = name } }

func TestRoutes(t *testing.T) {
	tests := []struct {
		method, path, body string
		status             int
		want               string // part of the body
	}{
		{"GET", "/admin/v1/status", "", 200, `"cluster":"dev"`},
		{"GET", "/admin/v1/status?verbose=1", "", 400, `unknown parameter \"verbose\"`},
		{"GET", "/admin/v1/upstreams", "", 200, `"data":[{"name":"a-vllm"`},
		{"POST", "/admin/v1/bootstrap", goodConfig, 200, `"version":1`},
		{"POST", "/admin/v1/bootstrap", "version: 1\n", 409, `"code":"already_bootstrapped"`},
		{"GET", "/admin/v1/config", "", 200, `"author":"founder"`},
		{"GET", "/admin/v1/jobs/streams", "", 200, `"owner":"b-1","token":{"generation":1,"index":9}`},
		{"POST", "/admin/v1/jobs/check", "", 200, `"agree":true`},
		{"PUT", "/admin/v1/config?expect_version=1&author=ann", goodConfig + "# more\n", 200, `"author":"ann"`},
		{"PUT", "/admin/v1/config?expect_version=9", goodConfig, 409, `"code":"version_conflict"`},
		{"PUT", "/admin/v1/config?expect_version=x", goodConfig, 400, `expect_version must be a whole number, not \"x\"`},
		{"PUT", "/admin/v1/config?expected_version=1", goodConfig, 400, `unknown parameter \"expected_version\"`},
		{"PUT", "/admin/v1/config?expect_version=1&expect_version=2", goodConfig, 400, `is given twice`},
		{"PUT", "/admin/v1/config?author=a%0Ab", goodConfig, 400, `author must be one line`},
		{"PUT", "/admin/v1/config", "version: 1\nsite: {}\n", 422, `"problems":[{"file":"cluster.yaml","line":`},
		{"PUT", "/admin/v1/config", strings.Repeat("#", maxBody+1), 413, `"code":"too_large"`},
		{"GET", "/admin/v1/config/history", "", 200, `"data":[`},
		{"POST", "/admin/v1/config/rollback?to=1", "", 200, `"version":2`},
		{"POST", "/admin/v1/config/rollback", "", 400, `give the version to roll back to`},
		{"POST", "/admin/v1/config/rollback?to=77", "", 404, `"code":"unknown_version"`},
		{"GET", "/admin/v1/apikeys", "", 200, `{"data":[]}`},
		{"POST", "/admin/v1/apikeys", `{"tenant":"acme"}`, 200, `"secret":"dsk-`},
		{"POST", "/admin/v1/apikeys", `{}`, 400, `a key needs a tenant`},
		{"POST", "/admin/v1/apikeys", `{"tenant":"acme","admin":true}`, 400, `unknown field \"admin\"`},
		{"POST", "/admin/v1/apikeys", `{"tenant":"acme"} {}`, 400, `the body has more`},
		{"DELETE", "/admin/v1/apikeys/nobody", "", 404, `"code":"unknown_key"`},
		{"GET", "/admin/v1/keyring", "", 200, `"operator_key":null`},
		{"GET", "/admin/v1/keyring?verbose=1", "", 400, `unknown parameter`},
		{"POST", "/admin/v1/keyring/rotate?author=ann", "", 200, `"created_by":"ann"`},
		{"POST", "/admin/v1/keyring/rewrap", "", 409, `"code":"operator_key_missing"`},
		{"DELETE", "/admin/v1/nodes/gone-1", "", 204, ``},
		{"DELETE", "/admin/v1/nodes/never", "", 404, `"code":"unknown_node"`},
		{"DELETE", "/admin/v1/nodes/me-1", "", 409, `"code":"node_alive"`},
		{"DELETE", "/admin/v1/nodes/alone-1", "", 409, `"code":"records_at_risk"`},
		{"DELETE", "/admin/v1/nodes/alone-1?accept_loss=true&force=true&author=ann", "", 204, ``},
		{"DELETE", "/admin/v1/nodes/alone-1?accept_loss=perhaps", "", 400, `accept_loss must be true or false`},
		{"GET", "/admin/v1/nodes/alone-1/removal", "", 200, `"records_only_there":10,"reported_seconds_ago":null`},
		{"POST", "/admin/v1/nodes/gone-1/admit?author=ann", "", 204, ``},
		{"POST", "/admin/v1/nodes/never/admit", "", 404, `"code":"not_removed"`},
		{"POST", "/admin/v1/nodes/me-1/drain", "", 204, ``},
		{"POST", "/admin/v1/nodes/me-1/resume", "", 204, ``},
		{"POST", "/admin/v1/nodes/other-1/drain", "", 421, `"code":"wrong_node"`},
		{"POST", "/admin/v1/upstreams/a-vllm/drain?author=ann", "", 204, ``},
		{"POST", "/admin/v1/upstreams/a-vllm/resume", "", 204, ``},
		{"POST", "/admin/v1/upstreams/nobody/drain", "", 404, `"code":"unknown_upstream"`},
		{"GET", "/admin/v1/failover/plan?to=shanghai-b&waive=a,b", "", 200, `"ok":true`},
		{"GET", "/admin/v1/failover/plan", "", 400, `give the new primary`},
		{"GET", "/admin/v1/failover/plan?to=x&accept_loss=perhaps", "", 400, `accept_loss must be true or false, not \"perhaps\"`},
		{"POST", "/admin/v1/failover?author=ann", `{"to":"shanghai-b"}`, 200, `"epoch":2`},
		{"POST", "/admin/v1/failover", `{}`, 400, `give the site`},
		{"POST", "/admin/v1/failover", `{"to":"b","force":true}`, 400, `unknown field \"force\"`},
		{"POST", "/admin/v1/failover/ack", "", 204, ``},
		{"POST", "/admin/v1/failover/hold?reason=new+switches", "", 204, ``},
		{"POST", "/admin/v1/failover/hold?reason=a%0Ab", "", 400, `the reason must be one line`},
		{"POST", "/admin/v1/failover/resume", "", 204, ``},
		{"POST", "/admin/v1/recover/release", "", 204, ``},
		{"GET", "/admin/v1/drills", "", 200, `{"data":[]}`},
		{"GET", "/admin/v1/drills/plan?kind=isolation&site=b&for_seconds=30&return=true", "", 200, `"kind":"isolation"`},
		{"GET", "/admin/v1/drills/plan?kind=isolation&site=b&for_seconds=x", "", 400, `for_seconds must be a number`},
		{"POST", "/admin/v1/drills", `{"kind":"isolation","site":"shanghai-b","for_seconds":30}`, 200, `"id":"drill-1"`},
		{"POST", "/admin/v1/drills", `{"kind":"isolation","site":"shanghai-a"}`, 421, `"code":"wrong_node"`},
		{"GET", "/admin/v1/drills/none", "", 404, `"code":"unknown_drill"`},
		{"POST", "/admin/v1/drills/none/abort", "", 404, `"code":"unknown_drill"`},
		{"GET", "/metrics", "", 200, "dsnode_epoch 7"},
		{"GET", "/healthz/live", "", 200, ""},
		{"OPTIONS", "/healthz/ready", "", 503, ""},
		{"GET", "/debug/pprof/", "", 200, "goroutine"},
		{"GET", "/", "", 200, "<title>dsnode</title>"},
		{"GET", "/console.js", "", 200, "textContent"},
		{"GET", "/console.css", "", 200, "color-scheme"},
		{"GET", "/admin/v1/jobs", "", 404, `"code":"not_found"`},
		{"DELETE", "/admin/v1/config", "", 405, `"code":"method_not_allowed"`},
	}
	for _, tt := range tests {
		t.Run(tt.method+" "+tt.path, func(t *testing.T) {
			s := serve(t, newFake("me-1"), "")
			resp, text := send(t, s, tt.method, tt.path, tt.body)
			if resp.StatusCode != tt.status {
				t.Errorf("status %d, want %d: %s", resp.StatusCode, tt.status, text)
			}
			if !strings.Contains(text, tt.want) {
				t.Errorf("body %q lacks %q", text, tt.want)
			}
			if tt.status >= 400 && strings.HasPrefix(tt.path, "/admin/") {
				var body errorBody
				if err := json.Unmarshal([]byte(text), &body); err != nil || body.Error.Message == "" {
					t.Errorf("a refusal must be JSON with a message, got %q (%v)", text, err)
				}
			}
		})
	}
}

func TestMethodNotAllowedNamesTheAllowed(t *testing.T) {
	resp, _ := send(t, serve(t, newFake("me-1"), ""), http.MethodDelete, "/admin/v1/config", "")
	if got := strings.Join(resp.Header.Values("Allow"), " "); got != "GET PUT" {
		t.Errorf("Allow: %q, want GET PUT", got)
	}
}

// TestErrorsPassServerAndClient: a client returns the same error, with its message, for
// each error of a Cluster.
func TestErrorsPassServerAndClient(t *testing.T) {
	for _, r := range refusals {
		t.Run(r.code, func(t *testing.T) {
			f := newFake("me-1")
			f.refuse(fmt.Errorf("%w since 10:00", r.err))
			s := serve(t, f, "")
			_, err := dial(t, ClientOptions{}, s.URL).Config(t.Context())
			if !errors.Is(err, r.err) {
				t.Fatalf("errors.Is(%v, %v) is false", err, r.err)
			}
			var refused *Error
			if !errors.As(err, &refused) || refused.Code != r.code || refused.Hint != r.hint {
				t.Errorf("got %#v, want code %q and hint %q", refused, r.code, r.hint)
			}
			if r.code != "invalid_config" && !strings.HasSuffix(err.Error(), "since 10:00") {
				t.Errorf("the message was lost: %q", err)
			}
			if resp, _ := send(t, s, http.MethodGet, "/admin/v1/config", ""); resp.StatusCode != r.status {
				t.Errorf("status %d, want %d", resp.StatusCode, r.status)
			}
		})
	}
}

func TestProblemsPassServerAndClient(t *testing.T) {
	f := newFake("me-1")
	want := config.Problems{{File: "cluster.yaml", Line: 3, Path: "sites.a", Message: "has no city", Hint: "write city: NAME"}}
	f.refuse(fmt.Errorf("apply: %w", want))
	_, err := dial(t, ClientOptions{}, serve(t, f, "").URL).ApplyConfig(t.Context(), []byte("x"), nil, "")
	var got config.Problems
	if !errors.As(err, &got) || got.Error() != want.Error() {
		t.Fatalf("problems %v, want %v", got, want)
	}
	if !errors.Is(err, ErrInvalidConfig) {
		t.Errorf("errors.Is(%v, ErrInvalidConfig) is false", err)
	}
}

func TestClusterChoosesMessageAndHint(t *testing.T) {
	f := newFake("me-1")
	f.refuse(fmt.Errorf("apply: %w", &Error{Code: "no_quorum", Message: "two of three sites are gone", Hint: "call them"}))
	_, err := dial(t, ClientOptions{}, serve(t, f, "").URL).Config(t.Context())
	var refused *Error
	if !errors.As(err, &refused) || refused.Message != "two of three sites are gone" || refused.Hint != "call them" {
		t.Fatalf("got %#v", refused)
	}
	if !errors.Is(err, cluster.ErrNoQuorum) {
		t.Error("the code lost its sentinel")
	}
}

func TestSlowClusterTimesOut(t *testing.T) {
	f := newFake("me-1")
	f.hold = make(chan struct{})
	s := httptest.NewServer(New(Options{Cluster: f, Gatherer: prometheus.NewRegistry(), Health: http.NotFoundHandler(), Timeout: time.Millisecond}))
	t.Cleanup(s.Close)
	resp, text := send(t, s, http.MethodGet, "/admin/v1/status", "")
	if resp.StatusCode != http.StatusGatewayTimeout || !strings.Contains(text, `"code":"timeout"`) {
		t.Errorf("%d %s, want 504 timeout", resp.StatusCode, text)
	}
}

func TestTooManyRequestsAtOnce(t *testing.T) {
	f := newFake("me-1")
	f.hold = make(chan struct{})
	alive := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusOK) })
	server := New(Options{Cluster: f, Gatherer: prometheus.NewRegistry(), Health: alive})
	s := httptest.NewServer(server)
	t.Cleanup(s.Close)
	answers := make(chan int, maxInFlight)
	for range maxInFlight {
		go func() {
			resp, err := s.Client().Get(s.URL + "/admin/v1/status")
			if err != nil {
				answers <- 0
				return
			}
			_ = resp.Body.Close() // only the status counts
			answers <- resp.StatusCode
		}()
	}
	waitFor(t, func() bool { return len(server.inFlight) == maxInFlight })
	resp, text := send(t, s, http.MethodGet, "/admin/v1/config", "")
	if resp.StatusCode != http.StatusServiceUnavailable || !strings.Contains(text, `"code":"busy"`) {
		t.Errorf("%d %s, want 503 busy", resp.StatusCode, text)
	}
	if resp, _ := send(t, s, http.MethodGet, "/healthz/live", ""); resp.StatusCode != http.StatusOK {
		t.Errorf("health answered %d while the API was busy", resp.StatusCode)
	}
	close(f.hold)
	for range maxInFlight {
		if got := <-answers; got != http.StatusOK {
			t.Errorf("a request that had begun got %d", got)
		}
	}
}

// waitFor polls until the condition holds or the time is over.
func waitFor(t *testing.T, condition func() bool) {
	t.Helper()
	patience := time.NewTimer(10 * time.Second)
	defer patience.Stop()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !condition() {
		select {
		case <-tick.C:
		case <-patience.C:
			t.Fatal("waited in vain")
		}
	}
}

// TestConsoleKeepsMarkupOut checks that the page has nothing that could turn a node's
// name into markup or run a foreign script.
func TestConsoleKeepsMarkupOut(t *testing.T) {
	s := serve(t, newFake("me-1"), "")
	for _, path := range []string{"/", "/console.js", "/console.css"} {
		resp, text := send(t, s, http.MethodGet, path, "")
		policy := resp.Header.Get("Content-Security-Policy")
		for _, want := range []string{"default-src 'none'", "script-src 'self'", "frame-ancestors 'none'"} {
			if !strings.Contains(policy, want) {
				t.Errorf("%s: the policy %q lacks %q", path, policy, want)
			}
		}
		if resp.Header.Get("X-Content-Type-Options") != "nosniff" {
			t.Errorf("%s: nosniff is missing", path)
		}
		for _, banned := range []string{"innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "unsafe-inline", "http://", "https://", "style=", "onclick"} {
			if strings.Contains(text, banned) {
				t.Errorf("%s holds %q", path, banned)
			}
		}
	}
}

func FuzzReadError(f *testing.F) {
	f.Add([]byte(`{"error":{"code":"no_quorum","message":"m","hint":"h","problems":[{"line":1,"message":"x"}]}}`))
	f.Add([]byte(`{"error":{}}`))
	f.Add([]byte(`<html>`))
	f.Fuzz(func(t *testing.T, text []byte) {
		e, ok := readError(text)
		if !ok {
			return
		}
		if e.Code == "" {
			t.Fatal("an error without a code was taken")
		}
		_, body := describe(e)
		again, err := json.Marshal(body)
		if err != nil || !bytes.Contains(again, []byte(`"code"`)) {
			t.Fatalf("%s: %v", again, err)
		}
	})
}
