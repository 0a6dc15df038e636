package serving

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/node/cache"
	"github.com/dsnode/dsnode/node/openai"
	"github.com/dsnode/dsnode/node/upstream"
)

// server is a small model server whose answer is a function.
type server struct {
	*httptest.Server
	name   string
	hits   atomic.Int64
	active atomic.Int64
	answer atomic.Pointer[func(w http.ResponseWriter, r *http.Request)]
	sick   atomic.Bool // its probes fail
	onHit  func()      // before the first answer

	mu     sync.Mutex // guards bodies and heads
	bodies [][]byte
	heads  []http.Header
}

type answering func(w http.ResponseWriter, r *http.Request)

func newServer(t *testing.T, name string, answer answering) *server {
	t.Helper()
	s := &server{name: name}
	s.set(answer)
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet {
			if s.sick.Load() {
				w.WriteHeader(http.StatusServiceUnavailable)
			}
			return
		}
		s.active.Add(1)
		defer s.active.Add(-1)
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		s.mu.Lock()
		s.bodies = append(s.bodies, body)
		s.heads = append(s.heads, r.Header.Clone())
		s.mu.Unlock()
		if s.hits.Add(1) == 1 && s.onHit != nil {
			s.onHit()
		}
		(*s.answer.Load())(w, r)
	}))
	t.Cleanup(func() {
		s.CloseClientConnections()
		s.Close()
	})
	return s
}

func (s *server) set(a answering) {
	f := func(w http.ResponseWriter, r *http.Request) { a(w, r) }
	s.answer.Store(&f)
}

func (s *server) lastBody(t *testing.T) string {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.bodies) == 0 {
		t.Fatalf("server %s was never asked", s.name)
	}
	return string(s.bodies[len(s.bodies)-1])
}

func (s *server) lastHead() http.Header {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.heads[len(s.heads)-1]
}

// Pieces that answers are made of.

const plainBody = `{"id":"c-1","object":"chat.completion","created":7,"model":"m","choices":[{"index":0,"message":{"role":"assistant","content":"hello"},"finish_reason":"stop"}],"usage":{"prompt_tokens":3,"completion_tokens":5}}`

func delta(text string) string {
	q, _ := json.Marshal(text)
	return `data: {"id":"c-1","created":7,"model":"m","choices":[{"index":0,"delta":{"content":` + string(q) + `},"finish_reason":null}]}` + "\n\n"
}

const (
	roleChunk   = `data: {"id":"c-1","created":7,"model":"m","choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}` + "\n\n"
	finishChunk = `data: {"id":"c-1","created":7,"model":"m","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}` + "\n\n"
	usageChunk  = `data: {"id":"c-1","created":7,"model":"m","choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}` + "\n\n"
	doneChunk   = "data: [DONE]\n\n"
)

var wellStream = roleChunk + delta("Hel") + delta("lo") + finishChunk + doneChunk

// well answers as a healthy server does, plain or streamed as requested.
func well(w http.ResponseWriter, r *http.Request) {
	if r.Header.Get("Accept") == "text/event-stream" {
		events(wellStream)(w, r)
		return
	}
	plain(200, plainBody)(w, r)
}

func plain(status int, body string) answering {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	}
}

func events(text string) answering {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		for _, e := range strings.SplitAfter(text, "\n\n") {
			_, _ = io.WriteString(w, e)
			flush(w)
		}
	}
}

func flush(w http.ResponseWriter) { _ = http.NewResponseController(w).Flush() }

// then runs answers one after the other on one response.
func then(steps ...answering) answering {
	return func(w http.ResponseWriter, r *http.Request) {
		for _, s := range steps {
			s(w, r)
		}
	}
}

// reset breaks the connection with a RST.
func reset(w http.ResponseWriter, _ *http.Request) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
	_ = conn.Close()
}

// abort cuts a response that has begun.
func abort(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }

// stall does nothing until the client leaves.
func stall(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }

// chatter sends the same text again and again until the client leaves.
func chatter(text string) answering {
	return func(w http.ResponseWriter, r *http.Request) {
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-r.Context().Done():
				return
			case <-tick.C:
				if _, err := io.WriteString(w, text); err != nil {
					return
				}
				flush(w)
			}
		}
	}
}

// recorder is a sink that keeps what it got.
type recorder struct {
	mu     sync.Mutex // guards all below
	heads  []Head
	events []string
	onData func(n int) error // n events so far, this one included
}

func (s *recorder) Head(h Head) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.heads = append(s.heads, h)
	return nil
}

func (s *recorder) Data(b []byte) error {
	s.mu.Lock()
	s.events = append(s.events, string(b))
	n := len(s.events)
	s.mu.Unlock()
	if s.onData != nil {
		return s.onData(n)
	}
	return nil
}

func (s *recorder) text() string { return strings.Join(s.events, "") }

// rig is a pipeline over servers.
type rig struct {
	*Pipeline
	fleet *upstream.Fleet
	peers func() []upstream.Peer // nil: none
	cache *cache.Cache           // nil: none
	now   func() time.Time
	reg   *prometheus.Registry
	logs  *bytes.Buffer
	conf  *config.Config
}

type rigOption func(*rig, *upstream.Options)

// hasty gives the upstream "bad" short timers. All others have long ones, which
// a busy machine doesn't run into.
func hasty(r *rig, _ *upstream.Options) {
	bad := r.conf.Upstreams["bad"]
	bad.Timeouts = config.Timeouts{FirstToken: seconds(0.25), BetweenTokens: seconds(0.25)}
	r.conf.Upstreams["bad"] = bad
}

// choosing leaves the choice between upstreams to the fleet.
func choosing(_ *rig, o *upstream.Options) { o.Pick = nil }

func seconds(s float64) config.Duration { return config.Duration(s * float64(time.Second)) }

// newRig makes a pipeline of site "east" whose model "m" is served by the
// servers, which are asked in this order.
func newRig(t *testing.T, servers []*server, options ...rigOption) *rig {
	t.Helper()
	conf := &config.Config{
		Version: 1,
		Sites: map[string]config.Site{
			"east": {City: "x", Priority: 1}, "east2": {City: "x", Priority: 3}, "west": {City: "y", Priority: 2},
		},
		Upstreams: map[string]config.Upstream{},
		Models:    map[string]config.Model{},
		Timeouts: config.Timeouts{
			Connect: seconds(30), FirstToken: seconds(30), BetweenTokens: seconds(30), Total: seconds(60),
		},
	}
	m := config.Model{}
	for _, s := range servers {
		conf.Upstreams[s.name] = config.Upstream{Site: "east", Kind: config.KindVLLM, URL: s.URL + "/v1"}
		m.Serve = append(m.Serve, config.Serve{Upstream: s.name})
	}
	conf.Models["m"] = m
	r := &rig{reg: prometheus.NewRegistry(), logs: &bytes.Buffer{}, conf: conf, now: time.Now}
	logger := slog.New(slog.NewTextHandler(&lockedWriter{w: r.logs}, nil))
	o := upstream.Options{
		Site: "east", Registerer: r.reg, Logger: logger, Pick: func(int) int { return 0 },
		Now: func() time.Time { return r.now() },
		Peers: func() []upstream.Peer {
			if r.peers == nil {
				return nil
			}
			return r.peers()
		},
	}
	for _, f := range options {
		f(r, &o)
	}
	r.fleet = upstream.New(o)
	r.Pipeline = New(Options{Fleet: r.fleet, Cache: r.cache, Registerer: r.reg, Logger: logger, Now: o.Now})
	r.configure(t, conf)
	t.Cleanup(func() {
		r.Close()
		r.fleet.Close()
	})
	return r
}

func (r *rig) configure(t *testing.T, conf *config.Config) {
	t.Helper()
	if err := r.fleet.Configure(conf); err != nil {
		t.Fatalf("configure: %v", err)
	}
}

type lockedWriter struct {
	mu sync.Mutex // guards w
	w  io.Writer
}

func (l *lockedWriter) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(b)
}

func (r *rig) results(upstream, result string) float64 {
	return r.metric("dsnode_upstream_requests_total", "upstream", upstream, "result", result)
}

// metric reads a series: a counter's or gauge's value, a histogram's count.
func (r *rig) metric(name string, labels ...string) float64 {
	families, err := r.reg.Gather()
	if err != nil {
		panic(err)
	}
	sum := 0.0
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			hit := 0
			for _, l := range m.GetLabel() {
				for i := 0; i+1 < len(labels); i += 2 {
					if l.GetName() == labels[i] && l.GetValue() == labels[i+1] {
						hit++
					}
				}
			}
			if hit == len(labels)/2 {
				sum += m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
			}
		}
	}
	return sum
}

// chat is a request for model m.
func chat(stream bool) Request {
	return request("/v1/chat/completions", fmt.Sprintf(`{"model":"m","stream":%t,"messages":[{"role":"user","content":"hi"}],"x_extra": {"a":1}}`, stream), stream)
}

func request(endpoint, body string, stream bool) Request {
	parsed, err := openai.Parse(openai.EndpointAt(endpoint), []byte(body))
	if err != nil {
		panic(err)
	}
	parsed.Stream = stream // also of bodies that are too short to say it
	r := Request{Request: parsed, ID: "req-1", Header: http.Header{}}
	if stream {
		r.Header.Set("Accept", "text/event-stream")
	}
	return r
}

// serve runs one request and returns what the sink saw.
func (r *rig) serve(t *testing.T, req Request) (*recorder, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	s := &recorder{}
	err := r.Serve(ctx, req, s)
	if len(s.heads) > 1 {
		t.Errorf("Head came %d times", len(s.heads))
	}
	return s, err
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(5 * time.Second)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("never happened: %s", what)
		}
		<-tick.C
	}
}
