package gateway

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/node/ports"
	"github.com/dsnode/dsnode/node/serving"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// serverFunc is a pipeline for tests.
type serverFunc func(ctx context.Context, r serving.Request, s serving.Sink) error

func (f serverFunc) Serve(ctx context.Context, r serving.Request, s serving.Sink) error {
	return f(ctx, r, s)
}

// keys knows a few secrets, and lets local clients in without one.
type keys struct{ strict bool }

func (k keys) Authenticate(token string, local bool) (serving.Principal, error) {
	switch token {
	case "":
		if local && !k.strict {
			return serving.Principal{}, nil
		}
		return serving.Principal{}, agreed.ErrKeyMissing
	case "all":
		return serving.Principal{KeyID: "k1", Tenant: "t"}, nil
	case "one":
		return serving.Principal{KeyID: "k2", Tenant: "t", Models: []string{"other"}}, nil
	case "expired":
		return serving.Principal{}, fmt.Errorf("%w at 2026-01-01T00:00:00Z", agreed.ErrKeyExpired)
	case "revoked":
		return serving.Principal{}, fmt.Errorf("%w at 2026-01-01T00:00:00Z", agreed.ErrKeyRevoked)
	case "unknowable":
		return serving.Principal{}, fmt.Errorf("look up: %w", ErrKeyUnknowable)
	case "stale":
		return serving.Principal{}, fmt.Errorf("look up: %w", ErrKeysStale)
	case "odd":
		return serving.Principal{}, errors.New("disk on fire")
	}
	return serving.Principal{}, agreed.ErrKeyUnknown
}

type healthFunc func() Report

func (f healthFunc) Health() Report { return f() }

// bench is a gateway behind a real listener.
type bench struct {
	*Gateway
	url string
	reg *prometheus.Registry
}

func testConfig() *config.Config {
	return &config.Config{
		Models: map[string]config.Model{"m": {}, "other": {}, "org/deep": {}},
		Limits: config.DefaultLimits(),
	}
}

// open starts a gateway; change may alter its options.
func open(t *testing.T, server serving.Server, change func(*Options)) *bench {
	t.Helper()
	cfg := testConfig()
	b := &bench{reg: prometheus.NewRegistry()}
	o := Options{
		Server: server, Config: func() *config.Config { return cfg }, Auth: keys{},
		Health: healthFunc(func() Report { return Report{Role: "primary", Epoch: 3, Ready: true, Quorum: true, Acting: true} }),
		Site:   "here", Node: "here-1", Registerer: b.reg,
	}
	if change != nil {
		change(&o)
	}
	b.Gateway = New(o)
	b.url = listen(t, b.Gateway, b.Gateway)
	return b
}

// listen serves h on a free port until the test ends.
func listen(t *testing.T, g *Gateway, h http.Handler) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := ports.New(ports.Options{Name: "client", Limit: g.Connections, Refusal: g.RefuseConnection})
	srv := p.Server(h, g.config().Limits.HeaderBytes, slog.New(slog.DiscardHandler))
	var done sync.WaitGroup
	done.Go(func() { _ = srv.Serve(p.Listen(ln, false)) })
	t.Cleanup(func() {
		http.DefaultClient.CloseIdleConnections()
		_ = srv.Close()
		done.Wait()
		await(t, "all requests end", func() bool { return g.inFlight.Load() == 0 })
		if n := g.held.Load(); n != 0 {
			t.Errorf("%d bytes of bodies are still held", n)
		}
	})
	return "http://" + ln.Addr().String()
}

func await(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	limit := time.After(20 * time.Second)
	for !ok() {
		select {
		case <-tick.C:
		case <-limit:
			t.Errorf("not in 20 s: %s", what)
			return
		}
	}
}

// got is an answer as a client sees it.
type got struct {
	status int
	header http.Header
	body   string
	err    error // of reading the body
}

func do(t *testing.T, method, url, body string, header ...string) got {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	return got{resp.StatusCode, resp.Header, string(b), err}
}

// wantError checks OpenAI's shape.
func (g got) wantError(t *testing.T, status int, code, words string) {
	t.Helper()
	var shape struct {
		Error *struct {
			Message, Type string
			Param         *string
			Code          string
		}
	}
	d := json.NewDecoder(strings.NewReader(g.body))
	d.DisallowUnknownFields()
	if err := d.Decode(&shape); err != nil || shape.Error == nil {
		t.Errorf("not OpenAI's shape (%v): %s", err, g.body)
		return
	}
	if g.status != status || shape.Error.Code != code || shape.Error.Type == "" || !strings.Contains(shape.Error.Message, words) {
		t.Errorf("%d %+v, want %d %s %q", g.status, *shape.Error, status, code, words)
	}
	if ct := g.header.Get("Content-Type"); ct != "application/json" {
		t.Errorf("Content-Type %q", ct)
	}
	if g.header.Get("X-Request-Id") == "" || g.header.Get("X-Dsnode-Site") == "" {
		t.Errorf("header lacks names: %v", g.header)
	}
	if retry := g.header.Get("X-Should-Retry") != "false"; retry == (status < 500 && status != 408 && status != 429) {
		t.Errorf("%d: x-should-retry %q", status, g.header.Get("X-Should-Retry"))
	}
	if wait := g.header.Get("Retry-After"); (status == 503 || code == "tenant_share") != (wait != "") {
		t.Errorf("%d: Retry-After %q", status, wait)
	}
}

// echo answers with the request that it got. Like the pipeline it judges the key.
var echo = serverFunc(func(_ context.Context, r serving.Request, s serving.Sink) error {
	if !r.Principal.Allows(r.Model) {
		return serving.ErrUnknownModel
	}
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return errors.Join(
		s.Head(serving.Head{Status: 200, Header: http.Header{"Content-Type": {"application/json"}, "Openai-Model": {"x"}}, Length: int64(len(b)), Upstream: "up", Site: "there", Node: "there-1", Attempts: 2}),
		s.Data(b[:10]), s.Data(b[10:]))
})

const chat = `{"model":"m","messages":[{"role":"user","content":"hi"}],"odd":{"kept":1}}`

func TestPlain(t *testing.T) {
	b := open(t, echo, nil)
	for path, endpoint := range map[string]string{
		"/v1/chat/completions": "/v1/chat/completions", "/chat/completions": "/v1/chat/completions",
		"/v1/completions": "/v1/completions", "/embeddings": "/v1/embeddings", "/v1/responses": "/v1/responses",
		"/v1/messages": "/v1/messages", "/rerank": "/v1/rerank", "/tokenize": "/tokenize", "/v1/tokenize": "/tokenize",
	} {
		g := do(t, "POST", b.url+path, chat, "X-Request-Id", "mine", "X-Stainless-Retry-Count", "2",
			"Authorization", "Bearer all", "User-Agent", "tester", "X-Secret", "no")
		var r serving.Request
		if err := json.Unmarshal([]byte(g.body), &r); err != nil || g.status != 200 {
			t.Fatal(err, g)
		}
		if r.Endpoint.Path != endpoint || r.ID != "mine" || r.Model != "m" || string(r.Body) != chat || r.RetryCount != 2 ||
			r.Principal.KeyID != "k1" || r.Header.Get("User-Agent") != "tester" || r.Header["X-Secret"] != nil || r.Header["Authorization"] != nil ||
			chat[r.ModelAt.From:r.ModelAt.To] != `"m"` || r.Choices != 1 || r.Hops != 0 || r.Stream {
			t.Errorf("%s: asked %+v", path, r)
		}
		for k, want := range map[string]string{
			"X-Request-Id": "mine", "X-Dsnode-Site": "there", "X-Dsnode-Node": "there-1", "X-Dsnode-Upstream": "up", "X-Dsnode-Attempts": "2",
			"Content-Type": "application/json", "Openai-Model": "x", "X-Dsnode-Cache": "", "X-Dsnode-Error": "", "Content-Length": fmt.Sprint(len(g.body)),
		} {
			if g.header.Get(k) != want {
				t.Errorf("%s: %s is %q, want %q", path, k, g.header.Get(k), want)
			}
		}
	}
	for _, bad := range []string{"has space", `has"quote`, strings.Repeat("x", 200)} {
		if g := do(t, "POST", b.url+"/v1/completions", chat, "X-Request-Id", bad); len(g.header.Get("X-Request-Id")) != 36 {
			t.Errorf("id %q became %q", bad, g.header.Get("X-Request-Id"))
		}
	}
}

func TestBadInput(t *testing.T) {
	b := open(t, echo, func(o *Options) { o.BodyRate = 1 << 30 })
	const url = "/v1/chat/completions"
	for name, tc := range map[string]struct {
		method, path, body string
		header             []string
		status             int
		code, words        string
	}{
		"malformed":       {"POST", url, `{"model":"m",`, nil, 400, "invalid_body", "want a member's name"},
		"empty":           {"POST", url, ``, nil, 400, "invalid_body", "empty"},
		"duplicate":       {"POST", url, `{"model":"m","model":"n"}`, nil, 400, "invalid_body", "twice (at byte 13)"},
		"other case":      {"POST", url, `{"model":"m","Model":"n"}`, nil, 400, "invalid_body", "must be written"},
		"deep":            {"POST", url, `{"model":"m","x":` + strings.Repeat("[", 1<<20), nil, 400, "invalid_body", "deeper than 128"},
		"not UTF-8":       {"POST", url, "{\"model\":\"m\",\"x\":\"\xc3\x28\"}", nil, 400, "invalid_body", "UTF-8 (at byte 18)"},
		"bad key name":    {"POST", url, "{\"model\":\"m\",\"\x01\":1}", nil, 400, "invalid_body", "control"},
		"no model":        {"POST", url, `{}`, nil, 400, "invalid_body", "must provide a model"},
		"n":               {"POST", url, `{"model":"m","n":"2"}`, nil, 400, "invalid_body", "whole number"},
		"40 MiB":          {"POST", url, `{"model":"` + strings.Repeat("m", 40<<20), nil, 413, "request_too_large", "33554432"},
		"gzip":            {"POST", url, "\x1f\x8b", []string{"Content-Encoding", "gzip"}, 415, "unsupported_content_encoding", "uncompressed"},
		"route":           {"POST", "/v1/nothing", chat, nil, 404, "unknown_url", "POST /v1/nothing"},
		"jobs":            {"POST", "/v1/jobs", chat, nil, 404, "unknown_url", ""},
		"root":            {"GET", "/", "", nil, 404, "unknown_url", ""},
		"slash":           {"POST", url + "/", chat, nil, 404, "unknown_url", ""},
		"method":          {"GET", url, "", nil, 405, "method_not_allowed", "takes POST"},
		"delete":          {"DELETE", "/v1/models", "", nil, 405, "method_not_allowed", "takes GET, HEAD"},
		"health posted":   {"POST", "/healthz/ready", "", nil, 405, "method_not_allowed", "OPTIONS"},
		"key":             {"POST", url, chat, []string{"Authorization", "Bearer wrong"}, 401, "invalid_api_key", "Incorrect"},
		"expired":         {"POST", url, chat, []string{"X-Api-Key", "expired"}, 401, "invalid_api_key", "has expired at 2026"},
		"revoked":         {"GET", "/v1/models", "", []string{"Authorization", "bearer revoked"}, 401, "invalid_api_key", "was revoked"},
		"unknowable":      {"POST", url, chat, []string{"Authorization", "Bearer unknowable"}, 503, "auth_unavailable", ""},
		"stale":           {"POST", url, chat, []string{"Authorization", "Bearer stale"}, 503, "auth_stale", ""},
		"odd":             {"POST", url, chat, []string{"Authorization", "Bearer odd"}, 503, "auth_unavailable", ""},
		"proxied":         {"POST", url, chat, []string{"X-Forwarded-For", "203.0.113.9"}, 401, "invalid_api_key", "didn't provide"},
		"web page":        {"POST", url, chat, []string{"Origin", "http://evil.example"}, 401, "invalid_api_key", "didn't provide"},
		"not for the key": {"POST", url, chat, []string{"Authorization", "Bearer one"}, 404, "model_not_found", "`m` does not exist or"},
		"model":           {"GET", "/v1/models/none", "", nil, 404, "model_not_found", "`none`"},
	} {
		t.Run(name, func(t *testing.T) {
			g := do(t, tc.method, b.url+tc.path, tc.body, tc.header...)
			g.wantError(t, tc.status, tc.code, tc.words)
			if allow := g.header.Get("Allow"); (tc.status == 405) != (allow != "") {
				t.Errorf("Allow: %q", allow)
			}
		})
	}
	// Without a Content-Length.
	req, _ := http.NewRequestWithContext(t.Context(), "POST", b.url+url, io.MultiReader(strings.NewReader(`{"x":"`), io.LimitReader(endless{}, 40<<20)))
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	if resp.StatusCode != 413 {
		t.Errorf("40 MiB in chunks: %d", resp.StatusCode)
	}
	// The next requests are served, also with 100 Continue.
	big := strings.Replace(chat, "hi", strings.Repeat("hi", 2<<20), 1)
	if g := do(t, "POST", b.url+url, big, "Expect", "100-continue"); g.status != 200 {
		t.Errorf("4 MiB: %d", g.status)
	}
}

type endless struct{}

func (endless) Read(p []byte) (int, error) { return copy(p, bytes.Repeat([]byte("x"), len(p))), nil }

func TestPipelineErrors(t *testing.T) {
	var fail error
	b := open(t, serverFunc(func(context.Context, serving.Request, serving.Sink) error { return fail }), nil)
	for name, tc := range map[string]struct {
		err         error
		status      int
		code, retry string
	}{
		"model":     {serving.ErrUnknownModel, 404, "model_not_found", ""},
		"nobody":    {serving.ErrNoUpstream, 503, "no_upstream", "1"},
		"busy":      {&serving.BusyError{Err: serving.ErrOverloaded, RetryAfter: 2500 * time.Millisecond}, 503, "overloaded", "3"},
		"paused":    {&serving.BusyError{Err: serving.ErrNoUpstream, RetryAfter: 7 * time.Second}, 503, "no_upstream", "7"},
		"timeout":   {fmt.Errorf("first token: %w", serving.ErrTimeout), 504, "upstream_timeout", ""},
		"hops":      {serving.ErrHopLimit, 508, "hop_limit", ""},
		"truncated": {serving.ErrTruncated, 502, "upstream_truncated", ""},
		"failed":    {serving.ErrUpstreamFailed, 502, "upstream_failed", ""},
		"unknown":   {errors.New("boom: secret detail"), 500, "internal_error", ""},
		"nothing":   {nil, 500, "internal_error", ""},
	} {
		for _, stream := range []string{"", `,"stream":true`} {
			fail = tc.err
			g := do(t, "POST", b.url+"/v1/chat/completions", `{"model":"m"`+stream+`}`)
			if g.status != tc.status || !strings.Contains(g.body, `"code":"`+tc.code+`"`) || g.header.Get("Retry-After") != tc.retry || strings.Contains(g.body, "secret") {
				t.Errorf("%s: %+v", name, g)
			}
			if final := tc.status == 404 || tc.status == 502 || tc.status == 504 || tc.status == 508; final != (g.header.Get("X-Should-Retry") == "false") {
				t.Errorf("%s: x-should-retry %q", name, g.header.Get("X-Should-Retry"))
			}
		}
	}
	fail = &serving.StatusError{
		Status: 422, Header: map[string][]string{"X-Ratelimit-Limit": {"9"}}, Body: []byte(`{"error":{"message":"no such tool","type":"t","param":"tools","code":"c"}}`),
		Upstream: "up", Site: "there", Attempts: 2,
	}
	g := do(t, "POST", b.url+"/v1/chat/completions", chat)
	if g.status != 422 || g.body != `{"error":{"message":"no such tool","type":"t","param":"tools","code":"c"}}` || g.header.Get("X-Ratelimit-Limit") != "9" ||
		g.header.Get("X-Dsnode-Upstream") != "up" || g.header.Get("X-Dsnode-Attempts") != "2" || g.header.Get("X-Should-Retry") != "false" {
		t.Errorf("an upstream's own error: %+v", g)
	}
	fail = &serving.StatusError{Status: 400, Body: []byte("plain words")}
	do(t, "POST", b.url+"/v1/chat/completions", chat).wantError(t, 400, "upstream_refused", "plain words")
	fail = &serving.StatusError{Status: 400, Body: []byte(`{"detail":"fastapi"}`)}
	do(t, "POST", b.url+"/v1/chat/completions", chat).wantError(t, 400, "upstream_refused", "fastapi")
}

func TestModels(t *testing.T) {
	b := open(t, echo, nil)
	ids := func(g got) (out []string) {
		var list struct {
			Object string
			Data   []model
		}
		if err := json.Unmarshal([]byte(g.body), &list); err != nil || list.Object != "list" {
			t.Fatal(g.body)
		}
		for _, m := range list.Data {
			out = append(out, m.ID)
		}
		return out
	}
	if all := ids(do(t, "GET", b.url+"/v1/models", "")); strings.Join(all, " ") != "m org/deep other" {
		t.Error(all)
	}
	if one := ids(do(t, "GET", b.url+"/models", "", "Authorization", "Bearer one")); strings.Join(one, " ") != "other" {
		t.Error(one)
	}
	for _, path := range []string{"/v1/models/org/deep", "/models/org%2Fdeep"} {
		if g := do(t, "GET", b.url+path, ""); g.status != 200 || !strings.Contains(g.body, `"id":"org/deep"`) {
			t.Error(path, g)
		}
	}
	if g := do(t, "HEAD", b.url+"/v1/models/m", ""); g.status != 200 || g.body != "" {
		t.Error(g)
	}
	do(t, "GET", b.url+"/v1/models/m", "", "Authorization", "Bearer one").wantError(t, 404, "model_not_found", "")
}

func TestHealth(t *testing.T) {
	var now Report
	b := open(t, echo, func(o *Options) { o.Health = healthFunc(func() Report { return now }); o.Auth = keys{strict: true} })
	well := Report{Role: "primary", Epoch: 3, Ready: true, Quorum: true, Acting: true}
	change := func(f func(*Report)) Report { r := well; f(&r); return r }
	for name, tc := range map[string]struct {
		report Report
		ok     string // of live ready primary same-city remote quorum
		body   string
	}{
		"primary":     {well, "live ready primary quorum", `{"status":"ok","site":"here","node":"here-1","role":"primary","epoch":3}`},
		"fenced":      {change(func(r *Report) { r.Acting = false }), "live ready quorum", ""},
		"same city":   {change(func(r *Report) { r.Role = "same-city" }), "live ready same-city quorum", ""},
		"remote":      {change(func(r *Report) { r.Role = "remote" }), "live ready remote quorum", ""},
		"no upstream": {change(func(r *Report) { r.Ready = false }), "live primary quorum", ""},
		"no quorum":   {change(func(r *Report) { r.Quorum = false }), "live ready primary", ""},
		"new":         {Report{}, "live", `{"status":"ok","site":"here","node":"here-1","role":null,"epoch":null}`},
	} {
		now = tc.report
		for _, path := range []string{"live", "ready", "primary", "same-city", "remote", "quorum"} {
			want := 503
			for _, ok := range strings.Fields(tc.ok) {
				if ok == path {
					want = 200
				}
			}
			for _, method := range []string{"GET", "HEAD", "OPTIONS"} {
				g := do(t, method, b.url+"/healthz/"+path, "")
				if g.status != want || (g.body == "") != (method == "HEAD") {
					t.Errorf("%s: %s %s: %d %q, want %d", name, method, path, g.status, g.body, want)
				}
				if path == "live" && method == "GET" && tc.body != "" && g.body != tc.body {
					t.Errorf("%s: %s", name, g.body)
				}
			}
		}
	}
	now = well
	b.Drain()
	for path, want := range map[string]int{"/healthz/ready": 503, "/readyz": 503, "/health": 503, "/livez": 200, "/healthz/live": 200} {
		if g := do(t, "GET", b.url+path, ""); g.status != want {
			t.Errorf("draining: %s %d", path, g.status)
		}
	}
	b.Resume()
	if g := do(t, "GET", b.url+"/readyz", ""); g.status != 200 {
		t.Error(g)
	}
}

func TestDrainClosesConnections(t *testing.T) {
	b := open(t, echo, nil)
	b.Drain()
	c, err := net.Dial("tcp", strings.TrimPrefix(b.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	_, _ = fmt.Fprintf(c, "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s", len(chat), chat)
	answer, err := io.ReadAll(c) // ends because the server closes
	if err != nil || !strings.HasPrefix(string(answer), "HTTP/1.1 200") || !strings.Contains(string(answer), "Connection: close") {
		t.Errorf("%v\n%s", err, answer)
	}
}

func TestSlowBodyEnds(t *testing.T) {
	b := open(t, echo, func(o *Options) { o.BodyGrace = 50 * time.Millisecond; o.BodyRate = 1000 })
	pr, pw := io.Pipe()
	var done sync.WaitGroup
	done.Go(func() { // a byte each 10 ms: a tenth of the least rate
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for range tick.C {
			if _, err := pw.Write([]byte(" ")); err != nil {
				return
			}
		}
	})
	req, _ := http.NewRequestWithContext(t.Context(), "POST", b.url+"/v1/completions", pr)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	body, _ := io.ReadAll(resp.Body)
	_ = resp.Body.Close()
	_ = pr.Close()
	done.Wait()
	got{resp.StatusCode, resp.Header, string(body), nil}.wantError(t, 408, "request_timeout", "too slowly")
}

func TestInFlightLimit(t *testing.T) {
	enter, leave := make(chan struct{}), make(chan struct{})
	b := open(t, serverFunc(func(_ context.Context, _ serving.Request, s serving.Sink) error {
		enter <- struct{}{}
		<-leave
		return errors.Join(s.Head(serving.Head{Status: 200, Length: -1}), s.Data([]byte("{}")))
	}), func(o *Options) {
		cfg := testConfig()
		cfg.Limits.InFlight = 1
		o.Config = func() *config.Config { return cfg }
	})
	var done sync.WaitGroup
	done.Go(func() {
		if g := do(t, "POST", b.url+"/v1/completions", chat); g.status != 200 {
			t.Error(g)
		}
	})
	<-enter
	do(t, "POST", b.url+"/v1/completions", chat).wantError(t, 503, "overloaded", "")
	if g := do(t, "GET", b.url+"/livez", ""); g.status != 200 {
		t.Error("health is refused under load")
	}
	close(leave)
	done.Wait()
	if n := b.value(t, "dsnode_requests_shed_total", "reason", "in_flight"); n != 1 {
		t.Errorf("shed %v", n)
	}
}

// TestBodyMemoryLimit: large uploads that don't end fill the memory for bodies, counted with
// the copies that they will need. Small requests are served all the same, further large ones
// are refused, and one of the largest size always fits.
func TestBodyMemoryLimit(t *testing.T) {
	const size, memory = 4 << 20, 64 << 20
	b := open(t, echo, func(o *Options) {
		cfg := testConfig()
		cfg.Limits.BodyBytes = size
		o.Config, o.BodyMemory = func() *config.Config { return cfg }, memory
	})
	large := strings.Replace(chat, "hi", strings.Repeat("x", size-len(chat)+2), 1)
	refused := func() float64 { return b.value(t, "dsnode_requests_shed_total", "reason", "body_memory") }
	var conns []net.Conn
	for refused() == 0 && len(conns) < 32 {
		c, err := net.Dial("tcp", strings.TrimPrefix(b.url, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = c.Close() }()
		conns = append(conns, c)
		before := b.held.Load()
		_, _ = fmt.Fprintf(c, "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s", len(large), large[:len(large)-1])
		await(t, "it is held or refused", func() bool { return refused() == 1 || b.held.Load() == before+size+slack })
	}
	if held := b.held.Load(); held > memory*7/8 || held < memory/2 {
		t.Errorf("%d uploads hold %d bytes of %d", len(conns)-1, held, memory)
	}
	if g := do(t, "POST", b.url+"/v1/completions", chat); g.status != 200 {
		t.Errorf("a small request: %v", g)
	}
	do(t, "POST", b.url+"/v1/completions", large).wantError(t, 503, "overloaded", "")
	for _, c := range conns {
		_ = c.Close()
	}
	await(t, "the memory is free again", func() bool { return b.held.Load() == 0 })
	if g := do(t, "POST", b.url+"/v1/completions", large); g.status != 200 {
		t.Errorf("a large request alone: %v", g.status)
	}

	b = open(t, echo, func(o *Options) { o.BodyMemory = 64 << 10 })
	if g := do(t, "POST", b.url+"/v1/completions", strings.Replace(chat, "hi", strings.Repeat("x", 31<<20), 1)); g.status != 200 {
		t.Errorf("a large request alone, with little memory: %v", g.status)
	}
}

// TestLargeBodiesCountTwice: while a large body is answered, its copy for the upstream counts.
func TestLargeBodiesCountTwice(t *testing.T) {
	var b *bench
	var held int64
	b = open(t, serverFunc(func(ctx context.Context, r serving.Request, s serving.Sink) error {
		held = b.held.Load()
		return echo.Serve(ctx, r, s)
	}), nil)
	large := strings.Replace(chat, "hi", strings.Repeat("x", 3<<20), 1)
	if g := do(t, "POST", b.url+"/v1/completions", large); g.status != 200 || held < 2*int64(len(large)) || held > 2*int64(len(large))+1024 {
		t.Errorf("%d, held %d for a body of %d bytes", g.status, held, len(large))
	}
}

// TestConnectionLimit: a connection with a request gives way to nobody, a silent one does.
func TestConnectionLimit(t *testing.T) {
	enter, leave := make(chan struct{}, 1), make(chan struct{})
	b := open(t, serverFunc(func(ctx context.Context, r serving.Request, s serving.Sink) error {
		enter <- struct{}{}
		<-leave
		return echo.Serve(ctx, r, s)
	}), func(o *Options) {
		cfg := testConfig()
		cfg.Limits.Connections = 1
		o.Config = func() *config.Config { return cfg }
	})
	dial := func(text string) net.Conn {
		t.Helper()
		c, err := net.Dial("tcp", strings.TrimPrefix(b.url, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		if _, err := io.WriteString(c, text); err != nil {
			t.Fatal(err)
		}
		return c
	}
	const request = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s"
	silent := dial("")
	first := dial(fmt.Sprintf(request, len(chat), chat))
	<-enter
	if n, err := silent.Read(make([]byte, 1)); n != 0 || err == nil {
		t.Errorf("the silent connection: %d, %v", n, err)
	}
	second := dial("")
	answer, _ := io.ReadAll(second)
	if !strings.HasPrefix(string(answer), "HTTP/1.1 503") || !strings.Contains(string(answer), "Retry-After: 1") || !strings.Contains(string(answer), `"code":"overloaded"`) {
		t.Errorf("%s", answer)
	}
	if n := b.value(t, "dsnode_requests_shed_total", "reason", "connections"); n != 1 {
		t.Errorf("shed %v", n)
	}
	close(leave)
	if answer, err := io.ReadAll(first); err != nil || !strings.HasPrefix(string(answer), "HTTP/1.1 200") {
		t.Errorf("%v\n%s", err, answer)
	}
	await(t, "the place is free again", func() bool {
		resp, err := http.Get(b.url + "/livez")
		if err != nil {
			return false
		}
		_ = resp.Body.Close()
		return resp.StatusCode == 200
	})
}

// TestUnreadBodiesEnd: net/http reads what is left of a body before the next request. A
// client that sends none of it must not keep its connection for that.
func TestUnreadBodiesEnd(t *testing.T) {
	for name, head := range map[string]string{
		"refused for its key":    "POST /v1/completions HTTP/1.1\r\nAuthorization: Bearer wrong\r\n",
		"refused for its path":   "POST /v1/nothing HTTP/1.1\r\n",
		"refused for its method": "PUT /v1/completions HTTP/1.1\r\n",
		"not looked at":          "GET /v1/models HTTP/1.1\r\n",
		"of a probe":             "GET /livez HTTP/1.1\r\n",
		"too slow":               "POST /v1/completions HTTP/1.1\r\n",
		"not identity":           "POST /v1/completions HTTP/1.1\r\nContent-Encoding: gzip\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			b := open(t, echo, func(o *Options) { o.BodyGrace = 50 * time.Millisecond })
			c, err := net.Dial("tcp", strings.TrimPrefix(b.url, "http://"))
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = c.Close() }()
			if _, err := io.WriteString(c, head+"Host: localhost\r\nContent-Length: 1000\r\n\r\nabc"); err != nil {
				t.Fatal(err)
			}
			_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
			answer, err := io.ReadAll(c)
			if err != nil || !strings.HasPrefix(string(answer), "HTTP/1.1 ") {
				t.Errorf("%v\n%s", err, answer)
			}
		})
	}
}

// TestContentEncodings: every line counts, and every coding in it.
func TestContentEncodings(t *testing.T) {
	b := open(t, echo, nil)
	for text, want := range map[string]int{"identity": 200, "Identity": 200, "": 200, "gzip": 415, "identity|gzip": 415, "|br": 415, "identity, gzip": 415, "identity|identity": 200} {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, b.url+"/v1/completions", strings.NewReader(chat))
		if err != nil {
			t.Fatal(err)
		}
		r.Header["Content-Encoding"] = strings.Split(text, "|")
		resp, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("%q: %d, want %d", text, resp.StatusCode, want)
		}
	}
}

// TestLocal: without API keys only programs on this machine are served. A proxy there, or a
// page in a browser there, speaks for others.
func TestLocal(t *testing.T) {
	request := func(change ...func(*http.Request)) *http.Request {
		r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/v1/jobs", nil)
		r.RemoteAddr, r.Host = "127.0.0.1:5000", "localhost:8080"
		for _, f := range change {
			f(r)
		}
		return r
	}
	host := func(name string) func(*http.Request) { return func(r *http.Request) { r.Host = name } }
	from := func(addr string) func(*http.Request) { return func(r *http.Request) { r.RemoteAddr = addr } }
	header := func(name, value string) func(*http.Request) {
		return func(r *http.Request) { r.Header[http.CanonicalHeaderKey(name)] = []string{value} }
	}
	for _, name := range []string{
		"localhost", "LOCALHOST.", "localhost:8080", "127.0.0.1", "127.0.0.1:80", "127.9.8.7", "[::1]", "[::1]:8080", "app.localhost", "a.b.localhost.:8080", "[::ffff:127.0.0.1]",
	} {
		if !local(request(host(name))) {
			t.Errorf("Host %s is not local", name)
		}
	}
	for _, name := range []string{
		"", "evil.example", "evil.example:8080", "localhost.evil.example", "127.0.0.1.evil.example", "notlocalhost", "10.0.0.1", "0.0.0.0", "[::]", "[::2]:1", "localhost@evil.example", "2130706433",
	} {
		if local(request(host(name))) {
			t.Errorf("Host %q is local", name)
		}
	}
	for _, addr := range []string{"10.0.0.5:5000", "[fe80::1]:5000", "", "@"} {
		if local(request(from(addr))) {
			t.Errorf("a client at %q is local", addr)
		}
	}
	for _, name := range []string{
		"Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Forwarded", "X-Forwarded-Anything", "Forwarded-For", "Via", "X-Real-IP", "CF-Connecting-IP",
		"CF-Ray", "True-Client-IP", "Client-IP", "X-Client-IP", "X-Cluster-Client-IP", "Fastly-Client-IP", "Fly-Client-IP", "CDN-Loop", "X-Original-Forwarded-For", "X-Original-Host",
		"X-Envoy-External-Address", "X-Azure-ClientIP", "X-Amzn-Trace-Id", "X-ProxyUser-Ip", "X-Remote-Addr", "X-Host", "X-Rewrite-URL", "X-Arr-Log-Id", "Akamai-Origin-Hop", "Tailscale-User-Login", "Origin",
	} {
		for _, value := range []string{"127.0.0.1", "", "http://localhost:8080"} {
			if local(request(header(name, value))) {
				t.Errorf("a request with %s: %s is local", name, value)
			}
		}
	}
	for value, want := range map[string]bool{"cross-site": false, "same-site": false, "odd": false, "same-origin": true, "none": true} {
		if local(request(header("Sec-Fetch-Site", value))) != want {
			t.Errorf("Sec-Fetch-Site %s: local is %v", value, !want)
		}
	}
	twice := request(header("Sec-Fetch-Site", "none"))
	twice.Header.Add("Sec-Fetch-Site", "cross-site")
	if local(twice) {
		t.Error("a second Sec-Fetch-Site is not looked at")
	}
	// What libraries and programs send.
	if !local(request(header("X-Stainless-Lang", "python"), header("User-Agent", "curl"), header("X-Request-Id", "1"), header("X-Api-Key", "k"), header("X-Client-Name", "n"),
		header("Accept", "*/*"), header("X-Dsnode-Cache", "only"), header("Content-Type", "application/json"), header("Traceparent", "1"), header("X-Amz-Date", "1"))) {
		t.Error("a program's request is not local")
	}
}

// value reads one sample; labels are pairs that must match.
func (b *bench) value(t *testing.T, name string, labels ...string) float64 {
	t.Helper()
	families, err := b.reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	sum := 0.0
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
	metric:
		for _, m := range f.GetMetric() {
			have := map[string]string{}
			for _, l := range m.GetLabel() {
				have[l.GetName()] = l.GetValue()
			}
			for i := 0; i+1 < len(labels); i += 2 {
				if have[labels[i]] != labels[i+1] {
					continue metric
				}
			}
			sum += m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
		}
	}
	return sum
}

func TestMetrics(t *testing.T) {
	b := open(t, echo, nil)
	for _, body := range []string{chat, chat, `{"model":"made up"}`, `{`} {
		do(t, "POST", b.url+"/v1/chat/completions", body)
	}
	do(t, "GET", b.url+"/nowhere", "")
	await(t, "the last request is counted", func() bool { return b.value(t, "dsnode_requests_total") == 5 })
	for _, tc := range []struct {
		want   float64
		labels []string
	}{
		{2, []string{"endpoint", "/v1/chat/completions", "model", "m", "variant", "", "code", "200"}},
		{1, []string{"endpoint", "/v1/chat/completions", "model", "unknown", "code", "200"}},
		{1, []string{"endpoint", "/v1/chat/completions", "model", "unknown", "code", "400"}},
		{1, []string{"endpoint", "none", "model", "unknown", "code", "404"}},
		{0, []string{"model", "made up"}},
	} {
		if n := b.value(t, "dsnode_requests_total", tc.labels...); n != tc.want {
			t.Errorf("%v: %v, want %v", tc.labels, n, tc.want)
		}
	}
	if n := b.value(t, "dsnode_request_duration_seconds", "model", "m"); n != 2 {
		t.Errorf("durations of m: %v", n)
	}
	if n := b.value(t, "dsnode_requests_in_flight"); n != 0 {
		t.Errorf("in flight: %v", n)
	}
}

// A node that was removed refuses all but the health of its process, with the reason.
func TestRemovedNodeRefusesRequests(t *testing.T) {
	report := Report{Role: "primary", Epoch: 3, Ready: true, Quorum: true, Acting: true}
	b := open(t, echo, func(o *Options) { o.Health = healthFunc(func() Report { return report }) })
	b.Refuse()
	for _, path := range []string{"/v1/chat/completions", "/v1/embeddings"} {
		if g := do(t, "POST", b.url+path, chat); g.status != 503 || !strings.Contains(g.body, "node_removed") || g.header.Get("Retry-After") == "" {
			t.Errorf("%s: %d %s", path, g.status, g.body)
		}
	}
	if g := do(t, "GET", b.url+"/v1/models", ""); g.status != 503 || !strings.Contains(g.body, "node_removed") {
		t.Errorf("models: %d %s", g.status, g.body)
	}
	if g := do(t, "GET", b.url+"/healthz/live", ""); g.status != 200 {
		t.Errorf("live: %d", g.status)
	}
	report = Report{} // what such a node reports
	for _, path := range []string{"ready", "primary", "same-city", "remote", "quorum"} {
		if g := do(t, "GET", b.url+"/healthz/"+path, ""); g.status != 503 {
			t.Errorf("%s: %d, want 503", path, g.status)
		}
	}
}
