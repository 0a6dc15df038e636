package upstream

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/dsnode/dsnode/cluster/config"
)

// TestReportedLoad: of two equal servers, the one that reports less load is asked; this
// node's own requests there are not counted twice.
func TestReportedLoad(t *testing.T) {
	metrics := func(s *server, kind config.UpstreamKind, running, waiting float64) {
		names := reportNames[kind]
		next := s.Config.Handler
		s.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path != "/metrics" {
				next.ServeHTTP(w, r)
				return
			}
			_, _ = fmt.Fprintf(w, "# HELP %[1]s x\n# TYPE %[1]s gauge\n%[1]s{engine=\"0\",model_name=\"a}b\\\"\"} %[2]v\n%[1]s_total 77\n%[3]s %[4]v 1700000000\n", names[0], running, names[1], waiting)
		})
	}
	a, b := newServer(t, "a", well), newServer(t, "b", well)
	metrics(a, config.KindVLLM, 30, 12)
	metrics(b, config.KindSGLang, 1, 0)
	now := time.Now()
	r := newRig(t, []*server{a, b}, func(r *rig, o *Options) {
		o.Pick = nil
		def := r.conf.Upstreams["b"]
		def.Kind = config.KindSGLang
		r.conf.Upstreams["b"] = def
		o.Now = func() time.Time { return now }
	})
	r.Probe(t.Context())
	for name, want := range map[string]int64{"a": 42, "b": 1} {
		if got := r.instance(t, name).load(now).inFlight; got != want {
			t.Errorf("%s: load %d, want %d", name, got, want)
		}
	}
	for range 10 {
		if a := r.ask(t.Context(), r.query()); a.err != nil {
			t.Fatal(a.err)
		}
	}
	if a.hits.Load() != 0 || b.hits.Load() != 10 {
		t.Errorf("hits %d, %d", a.hits.Load(), b.hits.Load())
	}
	u := r.instance(t, "a")
	u.inFlight.Add(40)
	r.readLoad(t.Context(), u)
	if got := u.load(now).inFlight; got != 42 {
		t.Errorf("with 40 of our own: load %d, want 42", got)
	}
	u.inFlight.Add(-40)
	now = now.Add(reportAge)
	if got := u.load(now).inFlight; got != 0 {
		t.Errorf("an old report counts: %d", got)
	}

	// Without a choice no server is asked for its load.
	alone := newRig(t, []*server{a})
	alone.Probe(t.Context())
	if alone.instance(t, "a").reported.Load() != nil {
		t.Error("metrics were read for nothing")
	}
	// A server without figures is not asked again for a while.
	c := newServer(t, "c", well)
	silent := newRig(t, []*server{a, c})
	silent.Probe(t.Context())
	if u := silent.instance(t, "c"); u.reports(time.Now()) || !u.reports(time.Now().Add(reportPause)) || u.load(time.Now()).inFlight != 0 {
		t.Errorf("%+v", u.reported.Load())
	}
}

func FuzzSumSeries(f *testing.F) {
	f.Add("vllm:num_requests_running{a=\"b\"} 3.0\nvllm:num_requests_waiting 1e2 5\n")
	f.Add("vllm:num_requests_running{a=\"}\\\"\"} NaN\nvllm:num_requests_waiting{ -1\n")
	f.Fuzz(func(t *testing.T, page string) {
		n, err := sumSeries(strings.NewReader(page), reportNames[config.KindVLLM])
		if n < 0 || err != nil && n != 0 {
			t.Errorf("%d, %v", n, err)
		}
	})
}
