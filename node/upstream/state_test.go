package upstream

import (
	"encoding/pem"
	"errors"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/dsnode/dsnode/cluster/config"
)

// TestConfigureKeepsState of upstreams that didn't change, and only of those.
func TestConfigureKeepsState(t *testing.T) {
	a, b := newServer(t, "a", well), newServer(t, "b", well)
	r := newRig(t, []*server{a, b})
	r.breakUpstream(t, a)
	before := r.instance(t, "a")
	conf := *r.conf
	conf.Upstreams = map[string]config.Upstream{"a": r.conf.Upstreams["a"]}
	conf.Models = map[string]config.Model{"m": {Serve: []config.Serve{{Upstream: "a"}}}}
	if err := r.Configure(&conf); err != nil {
		t.Fatal(err)
	}
	if r.instance(t, "a") != before || r.status(t, "a").Breaker != "open" {
		t.Error("a lost its state although it didn't change")
	}
	if r.metric("dsnode_breaker_state", "upstream", "b") != 0 {
		t.Error("b has left, its series have not")
	}
	changed := conf.Upstreams["a"]
	changed.MaxConcurrency = 7
	conf.Upstreams = map[string]config.Upstream{"a": changed}
	if err := r.Configure(&conf); err != nil {
		t.Fatal(err)
	}
	if r.status(t, "a").Breaker != "closed" {
		t.Error("a changed and kept its breaker")
	}
}

// TestKeys: a key is sent as a bearer token, and read again when the file changes or the
// upstream refuses it; without a configured key no request is sent.
func TestKeys(t *testing.T) {
	up := newServer(t, "up", func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer new" {
			status(401)(w, r)
			return
		}
		well(w, r)
	})
	now := time.Now()
	key := ""
	r := newRig(t, []*server{up}, func(r *rig, o *Options) {
		u := r.conf.Upstreams["up"]
		u.APIKey = config.Secret{File: "/key"}
		r.conf.Upstreams["up"] = u
		r.tolerant = true
		o.Now = func() time.Time { return now }
		o.ReadFile = func(path string) ([]byte, error) {
			if path != "/key" || key == "" {
				return nil, fs.ErrNotExist
			}
			return []byte(key + "\n"), nil
		}
	})
	if r.configured == nil || !strings.Contains(r.configured.Error(), "up") {
		t.Errorf("Configure says %v of a missing key", r.configured)
	}
	if a := r.ask(t.Context(), r.query()); !errors.Is(a.err, errNobody) || up.hits.Load() != 0 {
		t.Errorf("without a key: %+v", a)
	}
	key = "old"
	r.Probe(t.Context())
	a := r.ask(t.Context(), r.query())
	if a.err == nil || up.hits.Load() != 1 || r.metric("dsnode_upstream_requests_total", "upstream", "up", "result", "credentials") != 1 {
		t.Errorf("refused key: %+v", a)
	}
	if strings.Contains(r.logs.String(), "old") {
		t.Error("the log has the key")
	}
	key = "new"
	r.Probe(t.Context())
	now = now.Add(credentialPause)
	if a := r.ask(t.Context(), r.query()); a.err != nil {
		t.Errorf("changed key: %v", a.err)
	}
}

// TestTLS: a CA of its own, whose file may appear later.
func TestTLS(t *testing.T) {
	up := &server{name: "up"}
	up.Server = httptest.NewTLSServer(http.HandlerFunc(well))
	t.Cleanup(up.Close)
	var ca []byte
	r := newRig(t, []*server{up}, func(r *rig, o *Options) {
		u := r.conf.Upstreams["up"]
		u.TLS = config.UpstreamTLS{CAFile: "/ca.pem"}
		r.conf.Upstreams["up"] = u
		r.tolerant = true
		o.ReadFile = func(string) ([]byte, error) {
			if ca == nil {
				return nil, fs.ErrNotExist
			}
			return ca, nil
		}
	})
	if r.configured == nil {
		t.Error("Configure says nothing of a missing CA")
	}
	if a := r.ask(t.Context(), r.query()); !errors.Is(a.err, errNobody) {
		t.Errorf("without its CA: %v", a.err)
	}
	if st := r.status(t, "up"); st.Healthy || !strings.Contains(st.LastErr, "ca_file") {
		t.Errorf("%+v", st)
	}
	ca = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: up.Certificate().Raw})
	r.Probe(t.Context())
	if a := r.ask(t.Context(), r.query()); a.err != nil {
		t.Errorf("with its CA: %v", a.err)
	}
}

// TestCapacity counts what can be asked now, and nothing else.
func TestCapacity(t *testing.T) {
	a, b, c := newServer(t, "a", well), newServer(t, "b", well), newServer(t, "c", well)
	r := newRig(t, []*server{a, b, c}, func(r *rig, _ *Options) {
		for name, max := range map[string]int{"a": 10, "b": 5} {
			u := r.conf.Upstreams[name]
			u.MaxConcurrency = max
			r.conf.Upstreams[name] = u
		}
	})
	want := func(why string, free, total int) {
		t.Helper()
		if f, all := r.Capacity(); f != free || all != total {
			t.Errorf("%s: %d of %d, want %d of %d", why, f, all, free, total)
		}
	}
	want("idle", 15+defaultConcurrency, 15+defaultConcurrency)
	p, _ := r.Search(r.query()).Next()
	want("one in flight", 14+defaultConcurrency, 15+defaultConcurrency)
	p.Withdraw()
	r.SetDrained([]string{"c"})
	want("c drained", 15, 15)
	p, _ = r.Search(r.query()).Next()
	p.Done(Outcome{Result: RateLimited, RetryAfter: time.Minute}, 0)
	want("a paused", 5, 5)
	for range breakerInRow {
		p, _ = r.Search(r.query()).Next()
		p.Done(Outcome{Result: ServerFailed}, 0)
	}
	want("b broken", 0, 0)
}

// TestPeersAreForgotten: the state of a peer that is not listed any more ends, and is
// not dropped because a single list lacks it.
func TestPeersAreForgotten(t *testing.T) {
	r := newRig(t, nil)
	first := r.peers.peer(Peer{Node: "w1", Site: "west"})
	if r.peers.peer(Peer{Node: "w1", Site: "west"}) != first {
		t.Error("a peer has two states")
	}
	for range lostAfter - 1 {
		r.peers.check(nil)
	}
	r.peers.check([]Peer{{Node: "w1", Site: "west"}})
	for range lostAfter - 1 {
		r.peers.check(nil)
	}
	if first.lost.Err() != nil {
		t.Error("lost too early")
	}
	r.peers.check(nil)
	if first.lost.Err() == nil || r.peers.peer(Peer{Node: "w1", Site: "west"}) == first {
		t.Error("never lost")
	}
	r.peers.byNode["w1"].lose()
}

// TestVerdicts: each result has a name of its own.
func TestVerdicts(t *testing.T) {
	seen := map[string]bool{}
	for r := range Results {
		if name := r.String(); name == "" || seen[name] {
			t.Errorf("result %d is named %q", r, name)
		}
		seen[r.String()] = true
	}
}
