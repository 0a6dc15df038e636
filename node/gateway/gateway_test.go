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
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/config"
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
	srv := NewHTTPServer(h, g.config().Limits.HeaderBytes, slog.New(slog.DiscardHandler))
	var done sync.WaitGroup
	done.Go(func() { _ = srv.Serve(g.Listen(ln, false)) })
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
	_, _ = fmt.Fprintf(c, "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s", len(chat), chat)
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

func TestBodyMemoryLimit(t *testing.T) {
	b := open(t, echo, func(o *Options) { o.BodyMemory = 64 << 10 })
	do(t, "POST", b.url+"/v1/completions", strings.Replace(chat, "hi", strings.Repeat("x", 100<<10), 1)).wantError(t, 503, "overloaded", "")
	if g := do(t, "POST", b.url+"/v1/completions", chat); g.status != 200 {
		t.Error(g)
	}
}

func TestConnectionLimit(t *testing.T) {
	b := open(t, echo, func(o *Options) {
		cfg := testConfig()
		cfg.Limits.Connections = 1
		o.Config = func() *config.Config { return cfg }
	})
	first, err := net.Dial("tcp", strings.TrimPrefix(b.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	second, err := net.Dial("tcp", strings.TrimPrefix(b.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	answer, _ := io.ReadAll(second)
	_ = second.Close()
	if !strings.HasPrefix(string(answer), "HTTP/1.1 503") || !strings.Contains(string(answer), "Retry-After: 1") || !strings.Contains(string(answer), `"code":"overloaded"`) {
		t.Errorf("%s", answer)
	}
	_ = first.Close()
	await(t, "the place is free again", func() bool {
		resp, err := http.Get(b.url + "/livez")
		if err != nil {
			return false
		}
		_ = resp.Body.Close()
		return resp.StatusCode == 200
	})
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
