package serving

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/node/upstream"
)

// peerSink is the sink of a peer's gateway.
type peerSink struct {
	http.ResponseWriter
}

func (d peerSink) Head(h Head) error {
	for k, v := range h.Header {
		d.ResponseWriter.Header()[k] = v
	}
	d.ResponseWriter.Header().Set("X-Dsnode-Upstream", h.Upstream)
	d.ResponseWriter.Header().Set("X-Dsnode-Site", h.Site)
	d.ResponseWriter.Header().Set(HeaderModel, url.QueryEscape(h.Model))
	d.ResponseWriter.Header().Set("X-Dsnode-Attempts", strconv.Itoa(h.Attempts))
	d.WriteHeader(h.Status)
	return nil
}

func (d peerSink) Data(b []byte) error {
	_, err := d.Write(b)
	flush(d.ResponseWriter)
	return err
}

// peerSite is another site: its own pipeline behind an HTTP handler.
type peerSite struct {
	*httptest.Server
	hits atomic.Int64
	head atomic.Pointer[http.Header]
}

func newPeerSite(t *testing.T, site string, conf *config.Config) *peerSite {
	t.Helper()
	fleet := upstream.New(upstream.Options{Site: site, Pick: func(int) int { return 0 }})
	if err := fleet.Configure(conf); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(fleet.Close)
	p := New(Options{Fleet: fleet})
	s := &peerSite{}
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.hits.Add(1)
		head := r.Header.Clone()
		s.head.Store(&head)
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		req := request(r.URL.Path, string(body), strings.Contains(string(body), `"stream":true`))
		req.Header = r.Header
		req.Hops, _ = strconv.Atoi(r.Header.Get(HeaderHops))
		if err := json.Unmarshal([]byte(r.Header.Get(HeaderPrincipal)), &req.Principal); err != nil {
			t.Errorf("principal: %v", err)
		}
		var busy *BusyError
		var refusal *StatusError
		switch err := p.Serve(r.Context(), req, peerSink{w}); {
		case err == nil:
		case errors.As(err, &refusal):
			w.Header().Set("X-Dsnode-Upstream", refusal.Upstream)
			w.Header().Set("X-Dsnode-Attempts", strconv.Itoa(refusal.Attempts))
			plain(refusal.Status, string(refusal.Body))(w, r)
		case errors.As(err, &busy):
			w.Header().Set("Retry-After", "3")
			w.Header().Set("X-Dsnode-Error", "no_upstream")
			plain(503, `{"error":{"code":"no_upstream"}}`)(w, r)
		case errors.Is(err, ErrUnknownModel):
			plain(404, `{"error":{"code":"model_not_found"}}`)(w, r)
		default:
			plain(502, `{"error":{"code":"upstream_failed"}}`)(w, r)
		}
	}))
	t.Cleanup(func() {
		s.CloseClientConnections()
		s.Close()
	})
	return s
}

// via is a Peer.Client: it ignores the URL's host.
func (s *peerSite) via() http.RoundTripper { return via{s.Listener.Addr().String()} }

type via struct{ addr string }

func (v via) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.URL = &url.URL{Scheme: "http", Host: v.addr, Path: r.URL.Path}
	return http.DefaultTransport.RoundTrip(r)
}

// threeSites: m is served by own ("east"), near (same city) and far, each with
// one upstream; only far serves "other".
func threeSites(t *testing.T, own, near, far answering, options ...rigOption) (r *rig, up map[string]*server, sites map[string]*peerSite) {
	t.Helper()
	up = map[string]*server{"own": newServer(t, "own", own), "near": newServer(t, "near", near), "far": newServer(t, "far", far)}
	site := map[string]string{"own": "east", "near": "east2", "far": "west"}
	r = newRig(t, []*server{up["own"]}, options...)
	conf := *r.conf
	conf.Upstreams = map[string]config.Upstream{}
	m := config.Model{}
	for _, name := range []string{"far", "near", "own"} {
		conf.Upstreams[name] = config.Upstream{Site: site[name], Kind: config.KindVLLM, URL: up[name].URL}
		m.Serve = append(m.Serve, config.Serve{Upstream: name})
	}
	conf.Models = map[string]config.Model{
		"m":     m,
		"other": {Serve: []config.Serve{{Upstream: "far", Model: "private/other"}}},
		"first": {Serve: []config.Serve{{Upstream: "own"}}, Fallbacks: []string{"other"}},
	}
	sites = map[string]*peerSite{"east2": newPeerSite(t, "east2", &conf), "west": newPeerSite(t, "west", &conf)}
	r.peers = func() []upstream.Peer {
		return []upstream.Peer{
			{Node: "west-1", Site: "west", Client: sites["west"].via()},
			{Node: "east2-1", Site: "east2", Client: sites["east2"].via()},
		}
	}
	for name, m := range conf.Models { // of use to those with a cache
		m.Cache = config.ModelCache{Enabled: true, Store: config.StoreAll, LocalTTL: seconds(600), SharedTTL: seconds(600)}
		conf.Models[name] = m
	}
	r.configure(t, &conf)
	return r, up, sites
}

// TestNearestSiteAnswers: own site, then the same city, then the remote one.
func TestNearestSiteAnswers(t *testing.T) {
	for _, c := range []struct {
		name            string
		own, near, far  answering
		upstream, site  string
		node            string
		attempts        int
		nearHit, farHit int64
	}{
		{"all well", well, well, well, "own", "east", "", 1, 0, 0},
		{"own broken", status(500), well, well, "near", "east2", "east2-1", 2, 1, 0},
		{"city broken", status(500), status(500), well, "far", "west", "west-1", 3, 1, 1},
	} {
		for _, stream := range []bool{false, true} {
			t.Run(c.name, func(t *testing.T) {
				r, _, sites := threeSites(t, c.own, c.near, c.far)
				req := chat(stream)
				req.Principal = Principal{KeyID: "k1", Tenant: "acme", Models: []string{"m"}}
				saw, err := r.serve(t, req)
				if err != nil {
					t.Fatalf("%v\n%s", err, r.logs)
				}
				h := saw.heads[0]
				if h.Upstream != c.upstream || h.Site != c.site || h.Node != c.node || h.Attempts != c.attempts {
					t.Errorf("head %+v", h)
				}
				want := plainBody
				if stream {
					want = wellStream
				}
				if saw.text() != want {
					t.Errorf("saw %q", saw.text())
				}
				if sites["east2"].hits.Load() != c.nearHit || sites["west"].hits.Load() != c.farHit {
					t.Errorf("hits: near %d, far %d", sites["east2"].hits.Load(), sites["west"].hits.Load())
				}
				if c.node == "" {
					return
				}
				head := *sites[c.site].head.Load()
				if head.Get(HeaderHops) != "1" || head.Get("X-Request-Id") != "req-1" {
					t.Errorf("forwarded header %v", head)
				}
			})
		}
	}
}

// TestForwardedRequestStays: a request with a hop is answered by the site's
// own upstreams or not at all.
func TestForwardedRequestStays(t *testing.T) {
	r, _, sites := threeSites(t, status(500), well, well)
	req := chat(false)
	req.Hops = 1
	_, err := r.serve(t, req)
	if !errors.Is(err, ErrUpstreamFailed) {
		t.Errorf("error %v", err)
	}
	if sites["east2"].hits.Load()+sites["west"].hits.Load() != 0 {
		t.Error("it was passed on")
	}
	req.Hops = 2
	if _, err = r.serve(t, req); !errors.Is(err, ErrHopLimit) {
		t.Errorf("two hops: %v", err)
	}
}

// TestFallbackInAnotherSite: the fallback's name is in the forwarded body, the
// key need not allow it, and the client sees the fallback's public name.
func TestFallbackInAnotherSite(t *testing.T) {
	r, up, sites := threeSites(t, status(500), well, plain(200, strings.Replace(plainBody, `"model":"m"`, `"model":"private/other"`, 1)))
	req := request("/v1/chat/completions", `{"messages":[],"model":"first"}`, false)
	req.Principal = Principal{KeyID: "k1", Models: []string{"first"}}
	saw, err := r.serve(t, req)
	if err != nil {
		t.Fatalf("%v\n%s", err, r.logs)
	}
	if want := strings.Replace(plainBody, `"model":"m"`, `"model":"other"`, 1); saw.text() != want {
		t.Errorf("saw %q", saw.text())
	}
	if got := up["far"].lastBody(t); got != `{"messages":[],"model":"private/other"}` {
		t.Errorf("the upstream got %s", got)
	}
	if sites["east2"].hits.Load() != 0 {
		t.Error("a site that serves neither was asked")
	}
}

// TestPeerNodes: another node of a site is asked only when the first one can't be
// reached; draining ones come last; a peer is not asked for upstreams that it reports as
// dead.
func TestPeerNodes(t *testing.T) {
	r, _, sites := threeSites(t, status(500), well, well)
	near := sites["east2"].via()
	refused := failing{&net.OpError{Op: "dial", Err: errors.New("connection refused")}}
	for _, c := range []struct {
		name  string
		peers []upstream.Peer
		node  string
	}{
		{"unreachable first", []upstream.Peer{{Node: "n1", Site: "east2", Client: refused}, {Node: "n2", Site: "east2", Client: near}}, "n2"},
		{"draining last", []upstream.Peer{{Node: "n3", Site: "east2", Client: near, Draining: true}, {Node: "n4", Site: "east2", Client: near}}, "n4"},
		{"only draining", []upstream.Peer{{Node: "n5", Site: "east2", Client: near, Draining: true}}, "n5"},
		{"dead there", []upstream.Peer{{Node: "n6", Site: "east2", Client: near, Dead: map[string]bool{"near": true}}, {Node: "w1", Site: "west", Client: sites["west"].via()}}, "w1"},
		{"dead there, but nothing else", []upstream.Peer{{Node: "n7", Site: "east2", Client: near, Dead: map[string]bool{"near": true}}}, "n7"},
	} {
		r.peers = func() []upstream.Peer { return c.peers }
		saw, err := r.serve(t, chat(false))
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		if saw.heads[0].Node != c.node {
			t.Errorf("%s: %s answered", c.name, saw.heads[0].Node)
		}
	}
	broken := failing{errors.New("connection reset")}
	r.peers = func() []upstream.Peer {
		return []upstream.Peer{{Node: "b1", Site: "east2", Client: broken}, {Node: "b2", Site: "east2", Client: near}}
	}
	if _, err := r.serve(t, chat(false)); err == nil {
		t.Error("a second node was asked although the first had the request")
	}
}

// TestLostPeer: a request that waits for a peer that is lost goes to another one.
func TestLostPeer(t *testing.T) {
	r, up, _ := threeSites(t, status(500), stall, well)
	var gone atomic.Bool
	all := r.peers()
	r.peers = func() []upstream.Peer {
		if gone.Load() {
			return all[:1]
		}
		return all
	}
	type answer struct {
		saw *recorder
		err error
	}
	got := make(chan answer, 1)
	go func() {
		s := &recorder{}
		err := r.Serve(t.Context(), chat(false), s)
		got <- answer{s, err}
	}()
	eventually(t, "the peer is asked", func() bool { return up["near"].hits.Load() == 1 })
	gone.Store(true)
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- r.fleet.Run(ctx) }()
	a := <-got
	if a.err != nil || a.saw.heads[0].Node != "west-1" {
		t.Errorf("%v\n%s", a.err, r.logs)
	}
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
