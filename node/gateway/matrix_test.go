package gateway

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/node/modelsim"
	"github.com/dsnode/dsnode/node/serving"
	"github.com/dsnode/dsnode/node/upstream"
)

// sim is a simulated model server on a port.
type sim struct {
	*modelsim.Server
	url string
}

func startSim(t *testing.T, o modelsim.Options) *sim {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &sim{modelsim.New(o), "http://" + ln.Addr().String()}
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx, ln) }()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return s
}

// site is a gateway with the real pipeline and one simulated server, named
// after the site.
type site struct {
	*bench
	fleet *upstream.Fleet
	sim   *sim
	peers string // the URL of its handler for peers
}

func inSeconds(s float64) config.Duration { return config.Duration(s * float64(time.Second)) }

// startSites makes sites that are peers of each other. patience is the first token's
// timer and that between tokens, in seconds.
func startSites(t *testing.T, o modelsim.Options, patience float64, names ...string) map[string]*site {
	t.Helper()
	cfg := &config.Config{
		Version: 1, Sites: map[string]config.Site{}, Upstreams: map[string]config.Upstream{}, Limits: config.DefaultLimits(),
		Timeouts: config.Timeouts{Connect: inSeconds(patience), FirstToken: inSeconds(patience), BetweenTokens: inSeconds(patience), Total: inSeconds(60)},
	}
	sites := map[string]*site{}
	m := config.Model{}
	for i, name := range names {
		s := &site{sim: startSim(t, o)}
		sites[name] = s
		cfg.Sites[name] = config.Site{City: name, Priority: i + 1}
		cfg.Upstreams["at-"+name] = config.Upstream{Site: name, Kind: config.KindVLLM, URL: s.sim.url + "/v1", MaxConcurrency: 1024}
		m.Serve = append(m.Serve, config.Serve{Upstream: "at-" + name})
	}
	cfg.Models = map[string]config.Model{"m": m, "m@tokens=50,rate=50": m}
	for _, name := range names {
		s := sites[name]
		s.fleet = upstream.New(upstream.Options{
			Site: name,
			Peers: func() (peers []upstream.Peer) {
				for _, other := range names {
					if p := sites[other]; other != name {
						peers = append(peers, upstream.Peer{Node: other + "-1", Site: other, Client: meshTo{p.peers}})
					}
				}
				return peers
			},
		})
		if err := s.fleet.Configure(cfg); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(s.fleet.Close)
		s.bench = open(t, serving.New(serving.Options{Fleet: s.fleet}), func(o *Options) {
			o.Config = func() *config.Config { return cfg }
			o.Site, o.Node = name, name+"-1"
		})
		s.peers = listen(t, s.Gateway, s.PeerHandler())
	}
	return sites
}

// run has the fleet probe its servers, until the test ends.
func run(t *testing.T, f *upstream.Fleet) {
	t.Helper()
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- f.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

// meshTo sends all requests to one handler, whatever their URL.
type meshTo struct{ url string }

func (m meshTo) RoundTrip(r *http.Request) (*http.Response, error) {
	to, err := url.Parse(m.url)
	if err != nil {
		return nil, err
	}
	r = r.Clone(r.Context())
	r.URL.Host, r.URL.Scheme = to.Host, to.Scheme
	return http.DefaultTransport.RoundTrip(r)
}

// String is short enough for a test's log.
func (c client) String() string {
	return fmt.Sprintf("%d %q, finish %q, failure %q, done %v, error %v, header %v, body %.400q", c.status, c.text, c.finish, c.failure, c.done, c.err, c.header, c.body)
}

// client is what a client of a gateway saw.
type client struct {
	got
	text, finish string
	failure      string // code of an error event
	done         bool
}

func (s *site) ask(t *testing.T, model string, stream bool) client {
	t.Helper()
	c := client{got: do(t, "POST", s.url+"/v1/chat/completions",
		fmt.Sprintf(`{"model":%q,"messages":[{"role":"user","content":"hello"}],"stream":%v}`, model, stream))}
	type choice struct {
		Message, Delta struct{ Content string }
		FinishReason   *string `json:"finish_reason"`
	}
	take := func(doc string) {
		var a struct {
			Choices []choice
			Error   *struct{ Code string }
		}
		if err := json.Unmarshal([]byte(doc), &a); err != nil {
			t.Errorf("not JSON: %q", doc)
		}
		for _, ch := range a.Choices {
			c.text += ch.Message.Content + ch.Delta.Content
			if ch.FinishReason != nil {
				c.finish = *ch.FinishReason
			}
		}
		if a.Error != nil {
			c.failure = a.Error.Code
		}
	}
	if !strings.HasPrefix(c.header.Get("Content-Type"), "text/event-stream") {
		take(c.body)
		return c
	}
	lines := bufio.NewScanner(strings.NewReader(c.body))
	for lines.Scan() {
		switch data, isData := strings.CutPrefix(lines.Text(), "data: "); {
		case data == "[DONE]":
			c.done = true
		case isData:
			take(data)
		}
	}
	return c
}

// TestFaultMatrix has the first site's server fail in every way, plain and streamed, and
// checks which server answered and what the client saw.
func TestFaultMatrix(t *testing.T) {
	const (
		elsewhere = "another site answers, the client sees nothing"
		here      = "the same server's answer is good"
		broken    = "content, then an error event, no [DONE]"
		verbatim  = "whole JSON is taken at its word"
	)
	type row struct {
		mode            modelsim.Mode
		after           int
		plain, streamed string
		// alone is what a client gets when there is no other server.
		alonePlain, aloneStream string
	}
	for _, r := range []row{
		{modelsim.Refuse, 0, elsewhere, elsewhere, "502 upstream_failed", "502 upstream_failed"},
		{modelsim.HTTP500, 0, elsewhere, elsewhere, "502 upstream_failed", "502 upstream_failed"},
		{modelsim.HTTP503, 0, elsewhere, elsewhere, "502 upstream_failed", "502 upstream_failed"},
		{modelsim.HTTP429, 0, elsewhere, elsewhere, "503 overloaded", "503 overloaded"},
		{modelsim.HTTP401, 0, elsewhere, elsewhere, "503 no_upstream", "503 no_upstream"},
		{modelsim.ResetBefore, 0, elsewhere, elsewhere, "502 upstream_failed", "502 upstream_failed"},
		{modelsim.ResetAfter, 0, elsewhere, elsewhere, "502 upstream_truncated", "502 upstream_failed"},
		{modelsim.ResetAfter, 3, elsewhere, broken, "502 upstream_truncated", "200 upstream_truncated"},
		{modelsim.Stall, 0, elsewhere, elsewhere, "504 upstream_timeout", "504 upstream_timeout"},
		{modelsim.Stall, 3, elsewhere, broken, "504 upstream_timeout", "200 upstream_timeout"},
		{modelsim.StallComments, 0, elsewhere, elsewhere, "504 upstream_timeout", "504 upstream_timeout"},
		{modelsim.StallComments, 3, elsewhere, broken, "504 upstream_timeout", "200 upstream_timeout"},
		{modelsim.SlowDrip, 0, elsewhere, elsewhere, "504 upstream_timeout", "504 upstream_timeout"},
		{modelsim.BadJSON, 0, elsewhere, elsewhere, "502 upstream_failed", "502 upstream_failed"},
		{modelsim.BadJSON, 3, elsewhere, broken, "502 upstream_failed", "200 upstream_failed"},
		{modelsim.SilentEnd, 0, elsewhere, elsewhere, "502 upstream_failed", "502 upstream_truncated"},
		{modelsim.SilentEnd, 3, elsewhere, broken, "502 upstream_failed", "200 upstream_truncated"},
		{modelsim.MissingDone, 0, here, here, "200 ", "200 "},
		{modelsim.ErrorEvent, 0, elsewhere, elsewhere, "502 upstream_failed", "502 upstream_failed"},
		{modelsim.ErrorEvent, 3, elsewhere, broken, "502 upstream_failed", "200 upstream_failed"},
		{modelsim.TruncatedBody, 0, elsewhere, elsewhere, "502 upstream_truncated", "502 upstream_failed"},
		{modelsim.TruncatedBody, 3, elsewhere, broken, "502 upstream_truncated", "200 upstream_truncated"},
		{modelsim.RoleOnlyThenEnd, 0, verbatim, elsewhere, "200 ", "502 upstream_truncated"},
		{modelsim.InsufficientResource, 0, elsewhere, elsewhere, "502 upstream_failed", "502 upstream_failed"},
		{modelsim.InsufficientResource, 3, elsewhere, broken, "502 upstream_failed", "200 upstream_failed"},
	} {
		for _, stream := range []bool{false, true} {
			name, want, alone := "plain", r.plain, r.alonePlain
			if stream {
				name, want, alone = "stream", r.streamed, r.aloneStream
			}
			name = fmt.Sprintf("%s/%s after %d", name, r.mode, r.after)
			fault := modelsim.Fault{Mode: r.mode, After: r.after, IntervalMS: 50}
			if r.mode == modelsim.SlowDrip {
				fault.IntervalMS = 5000
			}
			// A plain answer may take its time while its server answers probes.
			hung := !stream && (r.mode == modelsim.Stall || r.mode == modelsim.StallComments)
			fault.Probes = hung
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				sites := startSites(t, modelsim.Options{Tokens: 8}, 1, "first", "second")
				first, second := sites["first"], sites["second"]
				well := second.ask(t, "m", stream)
				if well.status != 200 || well.finish != "stop" || stream != well.done || well.header.Get("X-Dsnode-Upstream") != "at-second" {
					t.Fatalf("without a fault: %+v", well)
				}
				if err := first.sim.SetFault(fault); err != nil {
					t.Fatal(err)
				}
				if hung {
					run(t, first.fleet)
				}
				saw := first.ask(t, "m", stream)
				who, hits := saw.header.Get("X-Dsnode-Upstream"), second.sim.Stats().Requests-1
				whole := saw.status == 200 && saw.err == nil && saw.text == well.text && saw.finish == "stop" && saw.done == stream && saw.failure == ""
				switch want {
				case elsewhere:
					if !whole || who != "at-second" || saw.header.Get("X-Dsnode-Site") != "second" || saw.header.Get("X-Dsnode-Attempts") != "2" || hits != 1 {
						t.Errorf("%s (%d there): %v", who, hits, saw)
					}
				case here:
					if !whole || who != "at-first" || hits != 0 {
						t.Errorf("%s (%d there): %v", who, hits, saw)
					}
				case verbatim:
					if saw.status != 200 || saw.text != "" || saw.finish != "" || who != "at-first" || hits != 0 {
						t.Errorf("%s (%d there): %v", who, hits, saw)
					}
				case broken:
					begun := saw.text != "" && strings.HasPrefix(well.text, saw.text) && saw.text != well.text
					if saw.status != 200 || !begun || saw.done || saw.failure == "" || who != "at-first" || hits != 0 {
						t.Errorf("%s (%d there): %v", who, hits, saw)
					}
				}
				if st := first.sim.Stats(); st.Requests+min(st.Refused, 1) != 1 || st.Faulted+min(st.Refused, 1) != 1 {
					t.Errorf("the first server was not asked once: %+v", st)
				}
				await(t, "the first server stops working", func() bool { return first.sim.Stats().InFlight == 0 })
			})
			t.Run(name+" alone", func(t *testing.T) {
				t.Parallel()
				only := startSites(t, modelsim.Options{Tokens: 8}, 1, "only")["only"]
				if err := only.sim.SetFault(fault); err != nil {
					t.Fatal(err)
				}
				if hung {
					run(t, only.fleet)
				}
				saw := only.ask(t, "m", stream)
				if is := fmt.Sprintf("%d %s", saw.status, saw.failure); is != alone || alone != "200 " && saw.done {
					t.Errorf("%q, want %q: %v", is, alone, saw)
				}
			})
		}
	}
}

// TestBurstOfStreams: 500 streams begun within half a second, 50 tokens 20 ms
// apart; a plain Go reverse proxy cuts one in a hundred (golang/go#40747).
func TestBurstOfStreams(t *testing.T) {
	const streams, tokens = 500, 50
	s := startSites(t, modelsim.Options{Keep: 1}, 30, "only")["only"]
	var all sync.WaitGroup
	start := time.NewTicker(500 * time.Millisecond / streams)
	defer start.Stop()
	for i := range streams {
		<-start.C
		all.Go(func() {
			saw := s.ask(t, "m@tokens=50,rate=50", true)
			if saw.err != nil || saw.status != 200 || !saw.done || saw.failure != "" || strings.Count(saw.body, `"content":"`)-1 != tokens {
				t.Errorf("stream %d: %v", i, saw)
			}
		})
	}
	all.Wait()
}

// TestHangUpsAreNoFailures: clients that leave at once, again and again, stop the
// server's work, and count as no failure of the server.
func TestHangUpsAreNoFailures(t *testing.T) {
	s := startSites(t, modelsim.Options{Keep: 1024}, 30, "only")["only"]
	const crowd, rounds = 256, 2
	for round := range uint64(rounds) {
		if err := s.sim.SetFault(modelsim.Fault{Mode: modelsim.Stall, After: int(round)}); err != nil {
			t.Fatal(err)
		}
		ctx, hangUp := context.WithCancel(t.Context())
		var all sync.WaitGroup
		for i := range crowd {
			all.Go(func() {
				body := fmt.Sprintf(`{"model":"m","messages":[],"stream":%v}`, i%2 == 0)
				req, _ := http.NewRequestWithContext(ctx, "POST", s.url+"/v1/chat/completions", strings.NewReader(body))
				if resp, err := http.DefaultClient.Do(req); err == nil {
					_, _ = io.Copy(io.Discard, resp.Body)
					_ = resp.Body.Close()
				}
			})
		}
		await(t, "the server is busy", func() bool { return s.sim.Stats().InFlight == crowd })
		hangUp()
		left := time.Now()
		all.Wait()
		await(t, "the server stops working", func() bool { return s.sim.Stats().InFlight == 0 })
		t.Logf("the last work stopped %s after the hang-up", time.Since(left).Round(time.Millisecond))
	}
	s.sim.ClearFault()
	if saw := s.ask(t, "m", false); saw.status != 200 || saw.header.Get("X-Dsnode-Attempts") != "1" {
		t.Errorf("after the hang-ups: %+v", saw)
	}
}
