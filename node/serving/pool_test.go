package serving

import (
	"errors"
	"log/slog"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/node/upstream"
)

// breakUpstream opens an upstream's breaker the way traffic does.
func (r *rig) breakUpstream(t *testing.T, s *server) {
	t.Helper()
	s.set(status(500))
	for range 5 {
		_, _ = r.serve(t, chat(false))
	}
	if st := r.status(t, s.name); st.Breaker != "open" {
		t.Fatalf("not open: %+v", st)
	}
}

func (r *rig) status(t *testing.T, name string) upstream.Status {
	t.Helper()
	for _, s := range r.fleet.Status() {
		if s.Name == name {
			return s
		}
	}
	t.Fatalf("no upstream %s", name)
	return upstream.Status{}
}

// TestOpenBreakerIsNotAsked while another upstream answers: one attempt is enough.
func TestOpenBreakerIsNotAsked(t *testing.T) {
	a, b := newServer(t, "a", well), newServer(t, "b", well)
	r := newRig(t, []*server{a, b})
	r.breakUpstream(t, a)
	before := a.hits.Load()
	saw, err := r.serve(t, chat(true))
	if err != nil || saw.heads[0].Upstream != "b" || saw.heads[0].Attempts != 1 || a.hits.Load() != before {
		t.Errorf("%v, %+v", err, saw.heads)
	}
	if r.metric("dsnode_breaker_state", "upstream", "a", "state", "open") != 1 || r.metric("dsnode_breaker_state", "upstream", "a", "state", "closed") != 0 {
		t.Error("the metric doesn't show it")
	}
	if st := r.status(t, "a"); st.Healthy || st.LastErr == "" || st.Since.IsZero() {
		t.Errorf("%+v", st)
	}
}

// TestProbesAndTraffic: only a failing probe and an open breaker together keep an
// upstream from being asked at all.
func TestProbesAndTraffic(t *testing.T) {
	up := newServer(t, "up", well)
	var probeWell atomic.Bool
	probeWell.Store(true)
	up.Config.Handler = withProbe(up.Config.Handler, &probeWell)
	now := time.Now()
	r := newRig(t, []*server{up}, func(r *rig, _ *upstream.Options) { r.now = func() time.Time { return now } })
	r.fleet.Probe(t.Context())
	if st := r.status(t, "up"); !st.Known || !st.Healthy {
		t.Fatalf("%+v", st)
	}

	probeWell.Store(false)
	now = now.Add(time.Minute)
	r.fleet.Probe(t.Context())
	if st := r.status(t, "up"); st.Healthy {
		t.Errorf("a failing probe isn't shown: %+v", st)
	}
	if _, err := r.serve(t, chat(false)); err != nil {
		t.Fatalf("a failing probe alone empties the pool: %v", err)
	}

	r.breakUpstream(t, up)
	now = now.Add(time.Millisecond)
	r.fleet.Probe(t.Context())
	before := up.hits.Load()
	_, err := r.serve(t, chat(false))
	var busy *BusyError
	if !errors.As(err, &busy) || !errors.Is(err, ErrNoUpstream) || busy.RetryAfter <= 0 || up.hits.Load() != before {
		t.Errorf("breaker and probe agree, and it was asked: %v", err)
	}

	probeWell.Store(true)
	up.set(well)
	r.fleet.Probe(t.Context())
	if st := r.status(t, "up"); st.Breaker != "half-open" {
		t.Errorf("the probe answers again: %+v", st)
	}
	if _, err := r.serve(t, chat(true)); err != nil {
		t.Fatal(err)
	}
	if st := r.status(t, "up"); st.Breaker != "closed" || !st.Healthy {
		t.Errorf("%+v", st)
	}

	r.breakUpstream(t, up)
	up.set(well) // the breaker is wrong, and the probe says so
	r.fleet.Probe(t.Context())
	if _, err := r.serve(t, chat(false)); err != nil {
		t.Errorf("the last resort isn't tried: %v", err)
	}
}

func withProbe(next http.Handler, well *atomic.Bool) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet && !well.Load() {
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// TestBulkhead: a full upstream is passed over; all full is overload.
func TestBulkhead(t *testing.T) {
	a, b := newServer(t, "a", stall), newServer(t, "b", well)
	r := newRig(t, []*server{a, b})
	conf := *r.conf
	conf.Upstreams = map[string]config.Upstream{}
	for name, u := range r.conf.Upstreams {
		u.MaxConcurrency = 1
		conf.Upstreams[name] = u
	}
	r.configure(t, &conf)
	done := make(chan error, 2)
	ctx := t.Context()
	go func() { done <- r.Serve(ctx, chat(false), &recorder{}) }()
	eventually(t, "a is busy", func() bool { return a.active.Load() == 1 })
	saw, err := r.serve(t, chat(false))
	if err != nil || saw.heads[0].Upstream != "b" || saw.heads[0].Attempts != 1 {
		t.Fatalf("%v %+v", err, saw.heads)
	}
	release := make(chan struct{})
	b.set(func(w http.ResponseWriter, r *http.Request) { <-release; well(w, r) })
	a.set(well)
	go func() { done <- r.Serve(ctx, chat(false), &recorder{}) }()
	eventually(t, "b is busy", func() bool { return b.hits.Load() == 2 })
	_, err = r.serve(t, chat(false))
	var busy *BusyError
	if !errors.As(err, &busy) || !errors.Is(err, ErrOverloaded) {
		t.Errorf("all full: %v", err)
	}
	close(release)
	if err := <-done; err != nil {
		t.Error(err)
	}
	a.CloseClientConnections()
	if err := <-done; err != nil { // b answers for a
		t.Error(err)
	}
}

func TestDrain(t *testing.T) {
	a, b := newServer(t, "a", well), newServer(t, "b", well)
	r := newRig(t, []*server{a, b})
	r.fleet.SetDrained([]string{"a", "nobody"})
	saw, err := r.serve(t, chat(false))
	if err != nil || saw.heads[0].Upstream != "b" || !r.status(t, "a").Drained {
		t.Errorf("%v %+v", err, saw.heads)
	}
	r.configure(t, r.conf)
	r.fleet.SetDrained([]string{"a", "b"})
	if _, err = r.serve(t, chat(false)); !errors.Is(err, ErrNoUpstream) {
		t.Errorf("all drained: %v", err)
	}
	r.fleet.SetDrained(nil)
	if saw, err = r.serve(t, chat(false)); err != nil || saw.heads[0].Upstream != "a" {
		t.Errorf("resumed: %v", err)
	}
}

// TestDrainLetsRequestsFinish; an upstream of another site that is drained is not asked
// for there either.
func TestDrainLetsRequestsFinish(t *testing.T) {
	release := make(chan struct{})
	letGo := sync.OnceFunc(func() { close(release) })
	defer letGo()
	hold := func(w http.ResponseWriter, r *http.Request) { <-release; well(w, r) }
	r, up, sites := threeSites(t, hold, well, well)
	done := make(chan error, 1)
	go func() { done <- r.Serve(t.Context(), chat(true), &recorder{}) }()
	eventually(t, "it runs", func() bool { return up["own"].active.Load() == 1 })
	r.fleet.SetDrained([]string{"own", "near"})
	saw, err := r.serve(t, chat(false))
	if err != nil || saw.heads[0].Site != "west" || saw.heads[0].Attempts != 1 || sites["east2"].hits.Load() != 0 {
		t.Errorf("%v %+v", err, saw.heads)
	}
	if st := r.status(t, "own"); !st.Drained || st.InFlight != 1 || len(st.Models) == 0 {
		t.Errorf("%+v", st)
	}
	letGo()
	if err := <-done; err != nil {
		t.Errorf("the running one: %v", err)
	}
}

// TestRetryBudget: when it is used up, no other upstream is asked.
func TestRetryBudget(t *testing.T) {
	a, b := newServer(t, "a", status(500)), newServer(t, "b", well)
	r := newRig(t, []*server{a, b})
	spent := &budget{}
	r.reg = prometheus.NewRegistry()
	r.Server = &resolve{fleet: r.fleet, next: &pool{
		fleet: r.fleet, budget: spent, now: time.Now, metrics: newMetrics(r.reg), log: slog.New(slog.DiscardHandler),
	}}
	if _, err := r.serve(t, chat(false)); err != nil {
		t.Fatal(err)
	}
	for spent.withdraw(time.Now()) {
	}
	if _, err := r.serve(t, chat(false)); !errors.Is(err, ErrUpstreamFailed) {
		t.Errorf("without budget: %v", err)
	}
	if r.metric("dsnode_upstream_retries_total", "kind", "refused") != 1 || r.status(t, "b").InFlight != 0 {
		t.Error("the refused retry isn't counted, or kept its permit")
	}
	for range 5 {
		_, _ = r.serve(t, chat(false))
	}
	if _, err := r.serve(t, chat(false)); err != nil {
		t.Errorf("an open breaker needs no budget: %v", err)
	}
}

// TestAccess: a key that doesn't allow a model sees it as unknown.
func TestAccess(t *testing.T) {
	up := newServer(t, "up", well)
	r := newRig(t, []*server{up})
	for _, who := range []Principal{{}, {Models: []string{"m"}}, {Models: []string{"x"}}} {
		for hops := range 2 {
			req := chat(false)
			req.Principal, req.Hops = who, hops
			_, err := r.serve(t, req)
			if want := len(who.Models) == 0 || who.Models[0] == "m"; want != (err == nil) || !want && !errors.Is(err, ErrUnknownModel) {
				t.Errorf("%v, %d hops: %v", who, hops, err)
			}
		}
	}
	if _, err := r.serve(t, request("/v1/chat/completions", `{"model":"M"}`, false)); !errors.Is(err, ErrUnknownModel) {
		t.Errorf("another case: %v", err)
	}
	if err := New(Options{Fleet: upstream.New(upstream.Options{Site: "east"})}).Serve(t.Context(), chat(false), &recorder{}); !errors.Is(err, ErrUnknownModel) {
		t.Errorf("unconfigured: %v", err)
	}
}

// TestSamePromptSameServer: and another server when that one fails.
func TestSamePromptSameServer(t *testing.T) {
	var all []*server
	for _, name := range []string{"a", "b", "c"} {
		all = append(all, newServer(t, name, well))
	}
	r := newRig(t, all, choosing)
	first := ""
	for i := range 20 {
		saw, err := r.serve(t, chat(i%2 == 0))
		if err != nil {
			t.Fatal(err)
		}
		if first == "" {
			first = saw.heads[0].Upstream
		}
		if saw.heads[0].Upstream != first {
			t.Fatalf("went to %s, then to %s", first, saw.heads[0].Upstream)
		}
	}
	for _, s := range all {
		if s.name == first {
			s.set(status(500))
		}
	}
	for range 20 {
		if _, err := r.serve(t, chat(false)); err != nil {
			t.Fatal(err)
		}
	}
}
