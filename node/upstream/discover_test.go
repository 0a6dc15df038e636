package upstream

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/dsnode/dsnode/cluster/config"
)

// book is a name server.
type book struct {
	mu      sync.Mutex // guards all below
	hosts   map[string][]string
	records map[string][]*net.SRV // by whole name
	fail    error
	asked   int
}

func (b *book) set(host string, addresses ...string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.hosts == nil {
		b.hosts = map[string][]string{}
	}
	b.hosts[host] = addresses
}

func (b *book) breakDown(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.fail = err
}

func (b *book) LookupNetIP(_ context.Context, network, host string) ([]netip.Addr, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.asked++
	if b.fail != nil || network != "ip" {
		return nil, b.fail
	}
	var list []netip.Addr
	for _, a := range b.hosts[host] {
		list = append(list, netip.MustParseAddr(a))
	}
	return list, nil
}

func (b *book) LookupSRV(_ context.Context, service, proto, name string) (string, []*net.SRV, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if service != "" || proto != "" {
		name = "_" + service + "._" + proto + "." + name
	}
	return name, b.records[name], b.fail
}

// onOnePort starts servers at 127.0.0.1, 127.0.0.2 … on one port.
func onOnePort(t *testing.T, n int, answer http.HandlerFunc) (servers []*server, port string) {
	t.Helper()
	for range 20 {
		var listeners []net.Listener
		port := "0"
		for i := range n {
			l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", fmt.Sprintf("127.0.0.%d:%s", i+1, port))
			if err != nil {
				break // taken there: another port
			}
			listeners = append(listeners, l)
			_, port, _ = net.SplitHostPort(l.Addr().String())
		}
		if len(listeners) < n {
			for _, l := range listeners {
				_ = l.Close()
			}
			continue
		}
		for i, l := range listeners {
			s := newServer(t, fmt.Sprintf("127.0.0.%d:%s", i+1, port), answer)
			extra := &http.Server{Handler: s.Config.Handler} //nolint:gosec // a test's
			go func() { _ = extra.Serve(l) }()
			t.Cleanup(func() { _ = extra.Close() })
			servers = append(servers, s)
		}
		return servers, port
	}
	t.Fatal("no port is free at all addresses")
	return nil, ""
}

// discovering makes the model's only upstream "up" one with discovery.
func discovering(b *book, url string, mode config.DiscoverMode) rigOption {
	return func(r *rig, o *Options) {
		o.Resolver = b
		r.conf.Upstreams["up"] = config.Upstream{Site: "east", Kind: config.KindVLLM, URL: url, Discover: mode, MaxConcurrency: 1}
		r.conf.Models["m"] = config.Model{Serve: []config.Serve{{Upstream: "up"}}}
	}
}

func hits(servers []*server) (all []int64) {
	for _, s := range servers {
		all = append(all, s.hits.Load())
	}
	return all
}

// TestDiscoveredInstances: each address has its own health and capacity, all have one
// name; another instance takes over, none is asked twice.
func TestDiscoveredInstances(t *testing.T) {
	servers, port := onOnePort(t, 3, well)
	b := &book{}
	b.set("models.test", "127.0.0.3", "127.0.0.1", "::ffff:127.0.0.2", "127.0.0.1")
	r := newRig(t, nil, discovering(b, "http://models.test:"+port+"/v1", config.DiscoverDNS))
	ask := func() asked { return r.ask(t.Context(), r.query()) }

	if a := ask(); a.err != nil || !slices.Equal(a.upstreams, []string{"up"}) {
		t.Fatalf("%+v", a)
	}
	if got := hits(servers); !slices.Equal(got, []int64{1, 0, 0}) {
		t.Fatalf("hits %v", got)
	}
	var host string
	servers[0].set(func(w http.ResponseWriter, r *http.Request) { host = r.Host; status(500)(w, r) })
	if a := ask(); a.err != nil || !slices.Equal(a.upstreams, []string{"up", "up"}) {
		t.Fatalf("another instance doesn't take over: %+v", a)
	}
	if host != "models.test:"+port {
		t.Errorf("Host header %q", host)
	}
	servers[1].set(status(500))
	servers[2].set(status(500))
	if a := ask(); a.err == nil {
		t.Errorf("all fail: %+v", a)
	}
	if got := hits(servers); !slices.Equal(got, []int64{3, 2, 1}) {
		t.Errorf("hits %v: an instance was asked twice in one request, or not at all", got)
	}

	// Breakers are the instances' own; the upstream is as good as the best.
	servers[1].set(well)
	servers[2].set(well)
	for range breakerInRow {
		ask()
	}
	st := r.status(t, "up")
	if len(st.Instances) != 3 || st.Instances[0].Address != "127.0.0.1:"+port || st.Instances[0].Breaker != "open" ||
		st.Instances[1].Breaker != "closed" || st.Breaker != "closed" || !st.Known {
		t.Errorf("%+v", st)
	}
	if r.metric("dsnode_breaker_state", "upstream", "up", "state", "closed") != 1 || r.metric("dsnode_breaker_state", "upstream", "up", "state", "open") != 0 {
		t.Error("breaker_state isn't the best instance's")
	}
	if r.metric("dsnode_breaker_state") != 1 {
		t.Error("instances have series of their own")
	}
	if !strings.Contains(r.logs.String(), "instance=127.0.0.1:"+port) {
		t.Error("the log doesn't name the instance")
	}

	// max_concurrency is 1 for each of the two that are well.
	release := make(chan struct{})
	hold := func(w http.ResponseWriter, r *http.Request) { <-release; well(w, r) }
	servers[1].set(hold)
	servers[2].set(hold)
	done := make(chan error, 2)
	for range 2 {
		go func() { done <- r.ask(context.WithoutCancel(t.Context()), r.query()).err }()
	}
	eventually(t, "both work", func() bool { return servers[1].active.Load() == 1 && servers[2].active.Load() == 1 })
	if n := r.metric("dsnode_upstream_in_flight", "upstream", "up"); n != 2 || r.status(t, "up").InFlight != 2 {
		t.Errorf("in flight: %v", n)
	}
	close(release)
	for range 2 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// TestAddressesChange: a new address is asked, one that has left is not, and a name
// server that fails changes nothing.
func TestAddressesChange(t *testing.T) {
	servers, port := onOnePort(t, 3, well)
	b := &book{}
	b.set("models.test", "127.0.0.1", "127.0.0.2")
	r := newRig(t, nil, discovering(b, "http://models.test:"+port, config.DiscoverDNS))
	kept := r.Table().upstreams["up"].instances[1]

	b.set("models.test", "127.0.0.2", "127.0.0.3")
	r.discover(t.Context())
	got := r.Table().upstreams["up"].instances
	if len(got) != 2 || got[0] != kept || got[1].address != "127.0.0.3:"+port {
		t.Fatalf("%v", got)
	}
	if a := r.ask(t.Context(), r.query()); a.err != nil || servers[0].hits.Load() != 0 {
		t.Errorf("%v, hits %v", a.err, hits(servers))
	}

	same := func(why string) {
		t.Helper()
		before := r.logs.Len()
		r.discover(t.Context())
		first := r.logs.Len()
		r.discover(t.Context())
		if !slices.Equal(r.Table().upstreams["up"].instances, got) {
			t.Errorf("%s: the instances have changed", why)
		}
		if first == before || r.logs.Len() != first {
			t.Errorf("%s: logged not once:\n%s", why, r.logs.String()[before:])
		}
	}
	b.breakDown(errors.New("no name server"))
	same("a failing lookup")
	b.breakDown(nil)
	same("a lookup that works again")
	b.set("models.test")
	same("an empty answer")
	if st := r.status(t, "up"); len(st.Instances) != 2 {
		t.Errorf("%+v", st)
	}

	// A changed definition makes new instances at the same addresses.
	conf := *r.conf
	def := r.conf.Upstreams["up"]
	def.MaxConcurrency = 7
	conf.Upstreams = map[string]config.Upstream{"up": def}
	if err := r.Configure(&conf); err != nil {
		t.Fatal(err)
	}
	if now := r.Table().upstreams["up"].instances; len(now) != 2 || now[0] == kept || now[0].max != 7 {
		t.Errorf("%v", now)
	}
	if r.metric("dsnode_breaker_state") != 1 {
		t.Error("instances that left are still counted")
	}
}

// TestNoAddressYet: an upstream without an address is unhealthy, and is asked once it has
// one.
func TestNoAddressYet(t *testing.T) {
	servers, port := onOnePort(t, 1, well)
	b := &book{fail: errors.New("no such host")}
	r := newRig(t, nil, discovering(b, "http://models.test:"+port, config.DiscoverDNS), func(_ *rig, o *Options) {
		o.LookUpEvery = 1e6 // a millisecond
	})
	if a := r.ask(t.Context(), r.query()); !errors.Is(a.err, errNobody) {
		t.Errorf("%v", a.err)
	}
	if st := r.status(t, "up"); st.Healthy || !st.Known || !strings.Contains(st.LastErr, "no such host") {
		t.Errorf("%+v", st)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- r.Run(ctx) }()
	b.breakDown(nil)
	b.set("models.test", "127.0.0.1")
	eventually(t, "the address is found and probed", func() bool { return r.status(t, "up").Healthy })
	if a := r.ask(t.Context(), r.query()); a.err != nil || servers[0].hits.Load() != 1 {
		t.Errorf("%v", a.err)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func TestDiscoverSRV(t *testing.T) {
	a, b := newServer(t, "a", status(500)), newServer(t, "b", well)
	port := func(s *server) uint16 {
		_, p, _ := net.SplitHostPort(s.Listener.Addr().String())
		n, err := strconv.ParseUint(p, 10, 16)
		if err != nil {
			t.Fatal(err)
		}
		return uint16(n)
	}
	records := []*net.SRV{
		{Target: "one.test.", Port: port(a), Priority: 1},
		{Target: "two.test.", Port: port(b), Priority: 2},
		{Target: "gone.test.", Port: 1},
		{Target: "."},
	}
	for _, c := range []struct{ name, url string }{
		{"_http._tcp.models.test", "http://models.test/v1"},
		{"_vllm._tcp.models.test", "http://_vllm._tcp.models.test/v1"},
	} {
		names := &book{records: map[string][]*net.SRV{c.name: records}}
		names.set("one.test", "127.0.0.1")
		names.set("two.test", "127.0.0.1")
		r := newRig(t, nil, discovering(names, c.url, config.DiscoverSRV))
		var host string
		b.set(func(w http.ResponseWriter, r *http.Request) { host = r.Host; well(w, r) })
		for range 3 {
			if a := r.ask(t.Context(), r.query()); a.err != nil {
				t.Fatalf("%s: %v", c.url, a.err)
			}
		}
		if host != "models.test" || len(r.Table().upstreams["up"].instances) != 2 {
			t.Errorf("%s: Host %q, %+v", c.url, host, r.status(t, "up"))
		}
	}
}

// TestDiscoveredTLS: the certificate must be for the name in the URL, whatever the address.
func TestDiscoveredTLS(t *testing.T) {
	var name string
	up := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		name = r.TLS.ServerName
		well(w, r)
	}))
	t.Cleanup(up.Close)
	_, port, _ := net.SplitHostPort(up.Listener.Addr().String())
	for _, c := range []struct {
		host string // httptest's certificate is for example.com
		ok   bool
	}{{"example.com", true}, {"models.test", false}} {
		b := &book{}
		b.set(c.host, "127.0.0.1")
		r := newRig(t, nil, discovering(b, "https://"+c.host+":"+port, config.DiscoverDNS), func(r *rig, o *Options) {
			def := r.conf.Upstreams["up"]
			def.TLS.CAFile = "/ca.pem"
			r.conf.Upstreams["up"] = def
			o.ReadFile = func(string) ([]byte, error) {
				return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: up.Certificate().Raw}), nil
			}
		})
		if a := r.ask(t.Context(), r.query()); (a.err == nil) != c.ok {
			t.Errorf("%s: %v", c.host, a.err)
		}
		if c.ok && name != c.host {
			t.Errorf("server name %q", name)
		}
	}
}

// TestInstancesAreBounded, and every node keeps the same ones.
func TestInstancesAreBounded(t *testing.T) {
	b := &book{}
	var many []string
	for i := range 200 {
		many = append(many, fmt.Sprintf("10.0.0.%d", i))
	}
	b.set("models.test", many...)
	first := newRig(t, nil, discovering(b, "http://models.test", config.DiscoverDNS))
	slices.Reverse(many)
	b.set("models.test", many...)
	second := newRig(t, nil, discovering(b, "http://models.test", config.DiscoverDNS))
	one, two := first.Table().upstreams["up"].instances, second.Table().upstreams["up"].instances
	if len(one) != maxInstances || !strings.HasSuffix(one[0].address, ":80") {
		t.Errorf("%d instances, %s", len(one), one[0].address)
	}
	for i := range one {
		if one[i].address != two[i].address {
			t.Fatalf("%s and %s", one[i].address, two[i].address)
		}
	}
}

// TestTLSWithoutHTTPS: the settings of an http upstream are unused, files too.
func TestTLSWithoutHTTPS(t *testing.T) {
	up := newServer(t, "up", well)
	r := newRig(t, []*server{up}, func(r *rig, _ *Options) {
		def := r.conf.Upstreams["up"]
		def.TLS.CAFile = "/nowhere/ca.pem"
		r.conf.Upstreams["up"] = def
	})
	if a := r.ask(t.Context(), r.query()); a.err != nil {
		t.Error(a.err)
	}
}
