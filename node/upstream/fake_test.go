package upstream

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/dsnode/dsnode/cluster/config"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// server is a model server whose answer is a function. GETs, which are probes, get an
// empty answer.
type server struct {
	*httptest.Server
	name   string
	hits   atomic.Int64
	active atomic.Int64
	answer atomic.Pointer[http.HandlerFunc]
}

func newServer(t *testing.T, name string, answer http.HandlerFunc) *server {
	t.Helper()
	s := &server{name: name}
	s.set(answer)
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet {
			return
		}
		_, _ = io.Copy(io.Discard, r.Body)
		s.active.Add(1)
		defer s.active.Add(-1)
		s.hits.Add(1)
		(*s.answer.Load())(w, r)
	}))
	t.Cleanup(func() {
		s.CloseClientConnections()
		s.Close()
	})
	return s
}

func (s *server) set(answer http.HandlerFunc) { s.answer.Store(&answer) }

func well(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "{}") }

func status(code int) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(code) }
}

// rig is a fleet over servers.
type rig struct {
	*Fleet
	reg  *prometheus.Registry
	logs *bytes.Buffer
	conf *config.Config
	// tolerant goes on when Configure complains; configured is what it said.
	tolerant   bool
	configured error
}

type rigOption func(*rig, *Options)

// newRig makes the fleet of site "east" whose model "m" the servers serve. They are
// asked in this order.
func newRig(t *testing.T, servers []*server, options ...rigOption) *rig {
	t.Helper()
	conf := &config.Config{
		Version: 1, Sites: map[string]config.Site{"east": {City: "x", Priority: 1}, "west": {City: "y", Priority: 2}},
		Upstreams: map[string]config.Upstream{}, Models: map[string]config.Model{}, Timeouts: config.DefaultTimeouts(),
	}
	m := config.Model{}
	for _, s := range servers {
		conf.Upstreams[s.name] = config.Upstream{Site: "east", Kind: config.KindVLLM, URL: s.URL + "/v1"}
		m.Serve = append(m.Serve, config.Serve{Upstream: s.name})
	}
	conf.Models["m"] = m
	r := &rig{reg: prometheus.NewRegistry(), logs: &bytes.Buffer{}, conf: conf}
	o := Options{
		Site: "east", Registerer: r.reg, Pick: func(int) int { return 0 },
		Logger: slog.New(slog.NewTextHandler(&lockedWriter{w: r.logs}, nil)),
	}
	for _, f := range options {
		f(r, &o)
	}
	r.Fleet = New(o)
	if r.configured = r.Configure(conf); r.configured != nil && !r.tolerant {
		t.Fatalf("configure: %v", r.configured)
	}
	t.Cleanup(r.Close)
	return r
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

func (r *rig) query() Query {
	t := r.Table()
	return Query{Table: t, Model: t.Model("m")}
}

// asked is who was asked for one request, and what came of it.
type asked struct {
	upstreams []string // all, the last one answered
	err       error    // of the last one
}

var errNobody = errors.New("nobody is left to ask")

// ask sends a request to one server after another until one answers 200.
func (r *rig) ask(ctx context.Context, q Query) (a asked) {
	search := r.Search(q)
	for {
		p, ok := search.Next()
		if !ok {
			a.upstreams = append(a.upstreams, "")
			if a.err == nil {
				a.err = errNobody
			}
			return a
		}
		a.upstreams = append(a.upstreams, p.Upstream)
		var o Outcome
		if o.Result, o.Err = r.post(ctx, &p); o.Err == nil && o.Result != OK {
			o.Err = errors.New(o.Result.String())
		}
		p.Done(o, time.Millisecond)
		if a.err = o.Err; o.Result == OK {
			return a
		}
	}
}

func (*rig) post(ctx context.Context, p *Permit) (Result, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, p.URL("/v1/chat/completions").String(), strings.NewReader("{}"))
	if err != nil {
		return BadAnswer, err
	}
	if key := p.Authorization(); key != "" {
		req.Header.Set("Authorization", key)
	}
	resp, err := p.RoundTrip(req)
	if err != nil {
		return JudgeError(err), err
	}
	defer func() { _ = resp.Body.Close() }()
	_, err = io.Copy(io.Discard, resp.Body)
	return JudgeStatus(resp.StatusCode), err
}

// instance is the only one of an upstream.
func (r *rig) instance(t *testing.T, name string) *instance {
	t.Helper()
	u := r.Table().upstreams[name]
	if u == nil || len(u.instances) != 1 {
		t.Fatalf("upstream %s: %+v", name, u)
	}
	return u.instances[0]
}

func (r *rig) status(t *testing.T, name string) Status {
	t.Helper()
	for _, s := range r.Status() {
		if s.Name == name {
			return s
		}
	}
	t.Fatalf("no upstream %s", name)
	return Status{}
}

// breakUpstream opens an upstream's breaker the way traffic does.
func (r *rig) breakUpstream(t *testing.T, s *server) {
	t.Helper()
	s.set(status(500))
	for range breakerInRow {
		r.ask(t.Context(), r.query())
	}
	if st := r.status(t, s.name); st.Breaker != "open" {
		t.Fatalf("not open: %+v", st)
	}
}

// metric sums the series of a counter or gauge with these labels.
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
			values := map[string]string{}
			for _, l := range m.GetLabel() {
				values[l.GetName()] = l.GetValue()
			}
			hit := true
			for i := 0; i+1 < len(labels); i += 2 {
				hit = hit && values[labels[i]] == labels[i+1]
			}
			if hit {
				sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	return sum
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
