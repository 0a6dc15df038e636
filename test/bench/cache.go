//go:build linux

package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
)

// cacheSettings are the flags of `bench cache`.
type cacheSettings struct {
	pairs       int
	seconds     float64
	connections int
	binary      string
	wrk, nginx  string // paths, empty: not installed
	profile     string
	json        bool
}

// cacheRun is one measurement of one system. Times are in seconds.
type cacheRun struct {
	Round     int     `json:"round"`
	System    string  `json:"system"`
	PerSecond float64 `json:"per_second"`
	P50       float64 `json:"p50_seconds"`
	P99       float64 `json:"p99_seconds"`
	CPU       float64 `json:"cpu_seconds_per_hit"`
	Elsewhere float64 `json:"elsewhere_cpus"` // CPUs that other processes kept busy
}

// nginxCache caches answers by the whole request body. Its workers run as the user that
// started nginx and owns the directory; for another user than root it logs a warning.
const nginxCache = `user root; worker_processes 2; daemon off; pid DIR/nginx.pid; worker_rlimit_nofile 16384;
events { worker_connections 8192; }
http {
  access_log off; sendfile on; tcp_nodelay on; keepalive_requests 100000000; keepalive_timeout 300s;
  client_body_temp_path DIR/b; proxy_temp_path DIR/p; fastcgi_temp_path DIR/f; uwsgi_temp_path DIR/u; scgi_temp_path DIR/s;
  proxy_cache_path DIR/cache levels=1:2 keys_zone=c:10m max_size=100m;
  upstream model { server UPSTREAM; keepalive 512; keepalive_requests 100000000; }
  server {
    listen LISTEN backlog=4096;
    location / {
      proxy_pass http://model; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_cache c; proxy_cache_methods GET HEAD POST; proxy_cache_key "$request_uri|$request_body"; proxy_cache_valid 200 1h;
      client_body_buffer_size 64k; client_max_body_size 64k; add_header X-Cache $upstream_cache_status;
    }
  }
}
`

// question is a cacheable request body of typical size.
func question(model, about string) string {
	return fmt.Sprintf(`{"model":"%s","stream":false,"messages":[{"role":"system","content":"You are a helpful assistant."},{"role":"user","content":"Tell me, in about 160 words, what a quick brown fox does all day long, and why the dog is lazy%s."}],"temperature":0,"max_tokens":256}`, model, about)
}

func runCache(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	var set cacheSettings
	flags := flag.NewFlagSet("bench cache", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.IntVar(&set.pairs, "pairs", 5, "rounds")
	flags.Float64Var(&set.seconds, "seconds", 3, "length of each measurement")
	flags.IntVar(&set.connections, "connections", 64, "connections of the closed loop")
	flags.StringVar(&set.binary, "binary", "", "dsnode binary (default: build it)")
	flags.StringVar(&set.profile, "profile", "", "write a CPU profile of dsnode to a file with this prefix and the suffix .hits.pb.gz, in another round that is not counted")
	flags.BoolVar(&set.json, "json", false, "print the measurements as JSON lines")
	generator := flags.String("generator", "auto", "wrk, own, or auto for wrk if it is installed")
	if err := parse(flags, args); err != nil {
		return err
	}
	if set.pairs < 1 || set.seconds <= 0 || set.connections < 1 {
		return fmt.Errorf("%w: numbers must be positive", errUsage)
	}
	tools := settings{}
	if err := tools.findTools(*generator, stderr); err != nil {
		return err
	}
	set.wrk, set.nginx = tools.wrk, tools.nginx
	s, err := newSandbox()
	if err != nil {
		return err
	}
	runs, err := set.compare(ctx, s, stderr)
	if err = errors.Join(err, s.close()); err != nil {
		return err
	}
	return set.print(stdout, runs)
}

// cacheServer is a target that caches answers and marks hits with a header. The target
// without a header is the upstream itself, which shows what net/http alone can do.
type cacheServer struct {
	target
	header, value string
}

// compare measures the targets in turn. Each round has the reverse order of the one
// before.
func (set *cacheSettings) compare(ctx context.Context, s *sandbox, progress io.Writer) (runs []cacheRun, err error) {
	if set.binary == "" {
		if set.binary, err = s.buildNode(ctx); err != nil {
			return nil, err
		}
	}
	server, upstream, err := s.startSelf("upstream", childUpstream)
	if err != nil {
		return nil, err
	}
	n, err := s.startNode(ctx, nameDsnode, set.binary, clusterText(upstream, []string{modelAtOnce}))
	if err != nil {
		return nil, err
	}
	caches := []cacheServer{
		{target{nameDsnode, n.api, n.key, n.process}, "X-Dsnode-Cache", "hit-local"},
		{target: target{nameDirect, upstream, n.key, server}},
	}
	if set.nginx != "" {
		p, addr, err := s.startNginx(nameNginx, set.nginx, nginxCache, upstream)
		if err != nil {
			return nil, err
		}
		caches = append(caches, cacheServer{target{nameNginx, addr, n.key, p}, "X-Cache", "HIT"})
	}
	for _, k := range caches {
		if err := k.proc.until(ctx, func() error { return k.hit(ctx) }); err != nil {
			return nil, fmt.Errorf("wait for a hit of %s: %w", k.name, err)
		}
		closedLoopOf(ctx, k.addr, (*client).ask, k.post(question(modelAtOnce, "")), set.connections, set.length()/5)
	}
	m := cacheMeter{set: set, sandbox: s, node: n, upstream: upstream}
	for round := range set.pairs {
		for _, k := range caches {
			run, err := m.measure(ctx, k)
			if err != nil {
				return nil, fmt.Errorf("round %d, %s: %w", round+1, k.name, err)
			}
			run.Round = round + 1
			runs = append(runs, run)
			fmt.Fprintf(progress, "round %d: %-6s %8.0f/s  p50 %6.2f ms  p99 %6.2f ms  %6.1f µs of CPU per hit; other processes used %.2f CPUs\n",
				run.Round, run.System, run.PerSecond, run.P50*1e3, run.P99*1e3, run.CPU*1e6, run.Elsewhere)
		}
		slices.Reverse(caches)
	}
	if set.profile == "" {
		return runs, nil
	}
	profiled := round{set: &settings{profile: set.profile}, node: n, progress: progress}
	_, err = profiled.profiled(load{name: "hits", length: set.length(), run: func(ctx context.Context, t target) (result, error) {
		return m.load(ctx, t)
	}})(ctx, target{nameDsnode, n.api, n.key, n.process})
	return runs, err
}

func (set *cacheSettings) length() time.Duration {
	return time.Duration(set.seconds * float64(time.Second))
}

// cacheMeter measures hits and checks that all answers were hits.
type cacheMeter struct {
	set      *cacheSettings
	sandbox  *sandbox
	node     *dsnode
	upstream string
}

func (m *cacheMeter) load(ctx context.Context, t target) (result, error) {
	text := question(modelAtOnce, "")
	if m.set.wrk != "" {
		return m.sandbox.wrk(ctx, m.set.wrk, t, text, m.set.connections, m.set.length())
	}
	return closedLoopOf(ctx, t.addr, (*client).ask, t.post(text), m.set.connections, m.set.length()), nil
}

var errNoHit = errors.New("not every answer was a hit")

// measure runs the load on one target. Every answer must be a 200 without a request to
// the upstream, and dsnode must have counted as many hits.
func (m *cacheMeter) measure(ctx context.Context, k cacheServer) (cacheRun, error) {
	run := cacheRun{System: k.name}
	if err := k.hit(ctx); err != nil {
		return run, err
	}
	before, err := m.look(ctx, k)
	if err != nil {
		return run, err
	}
	r, err := m.load(ctx, k.target)
	if err != nil {
		return run, err
	}
	after, err := m.look(ctx, k)
	switch {
	case err != nil:
		return run, err
	case r.Failed > 0 || r.Done == 0:
		return run, fmt.Errorf("%w: %d done, %d failed: %v", errWrong, r.Done, r.Failed, r.Errors)
	case k.header != "" && after.asked != before.asked:
		return run, fmt.Errorf("%w: the upstream was asked %d times", errNoHit, after.asked-before.asked)
	case k.name == nameDsnode && after.hits-before.hits < uint64(r.Done): //nolint:gosec // not negative
		return run, fmt.Errorf("%w: %d answers, %d local hits", errNoHit, r.Done, after.hits-before.hits)
	}
	if err := k.hit(ctx); err != nil {
		return run, err
	}
	run.PerSecond, run.P50, run.P99 = float64(r.Done)/r.Seconds, r.P50, r.P99
	run.CPU = (after.cpu - before.cpu).Seconds() / float64(r.Done)
	run.Elsewhere = elsewhere(before.machine, after.machine)
	return run, nil
}

// cacheLook is the counters of a target at one moment.
type cacheLook struct {
	cpu     time.Duration
	asked   int64  // requests to the upstream
	hits    uint64 // counted by dsnode
	machine busy
}

func (m *cacheMeter) look(ctx context.Context, k cacheServer) (l cacheLook, err error) {
	if l.asked, err = askedOf(ctx, m.upstream); err != nil {
		return l, err
	}
	if l.hits, err = m.node.localHits(ctx); err != nil {
		return l, err
	}
	if l.cpu, err = cpuTime(k.proc.pid()); err != nil {
		return l, err
	}
	l.machine, err = m.sandbox.busy()
	return l, err
}

func (n *dsnode) localHits(ctx context.Context) (uint64, error) {
	st, err := n.admin.CacheStats(ctx)
	if err != nil {
		return 0, err
	}
	return st.Requests["local"]["hit"], nil
}

// askedOf returns how many requests the upstream has had.
func askedOf(ctx context.Context, upstream string) (int64, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+upstream+askedPath, nil)
	if err != nil {
		return 0, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, err
	}
	return strconv.ParseInt(string(text), 10, 64)
}

// hit sends one request; an answer that is no hit is an error.
func (k cacheServer) hit(ctx context.Context) error {
	c, err := dial(ctx, k.addr)
	if err != nil {
		return err
	}
	defer c.close()
	header, err := c.answer(k.post(question(modelAtOnce, "")))
	if err != nil {
		return err
	}
	if k.header != "" && header.Get(k.header) != k.value {
		return fmt.Errorf("%w: %s is %q", errNoHit, k.header, header.Get(k.header))
	}
	return nil
}

// print shows the ratio of each round and the median.
func (set *cacheSettings) print(w io.Writer, runs []cacheRun) error {
	if set.json {
		out := json.NewEncoder(w)
		for _, r := range runs {
			if err := out.Encode(r); err != nil {
				return err
			}
		}
		return nil
	}
	of := func(system string, value func(cacheRun) float64) (all []float64) {
		for round := range set.pairs {
			for _, r := range runs {
				if r.System == system && r.Round == round+1 {
					all = append(all, value(r))
				}
			}
		}
		return all
	}
	rate := func(r cacheRun) float64 { return r.PerSecond }
	p := &printer{w: tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)}
	p.f("\thits/s\tp50 ms\tp99 ms\tCPU µs\tdsnode / it\tby round\t\n")
	ours := of(nameDsnode, rate)
	for _, name := range []string{nameDsnode, nameNginx, nameDirect} {
		theirs := of(name, rate)
		if len(theirs) == 0 {
			continue
		}
		ratios := make([]float64, len(ours))
		var each strings.Builder
		for i := range ours {
			ratios[i] = ours[i] / theirs[i]
			fmt.Fprintf(&each, " %.2f", ratios[i])
		}
		title := name
		if name == nameDirect {
			title = "net/http alone"
		}
		p.f("%s\t%.0f\t%.2f\t%.2f\t%.1f\t%.2f ×\t%s\t\n", title, median(theirs),
			median(of(name, func(r cacheRun) float64 { return r.P50 * 1e3 })), median(of(name, func(r cacheRun) float64 { return r.P99 * 1e3 })),
			median(of(name, func(r cacheRun) float64 { return r.CPU * 1e6 })), median(ratios), each.String())
	}
	if p.err == nil {
		p.err = p.w.Flush()
	}
	generator := "the built-in generator"
	if set.wrk != "" {
		generator = "wrk"
	}
	if p.err == nil {
		_, p.err = fmt.Fprintf(w, "1 KiB answers, %d connections, %s, medians of %d rounds; target: 0.7 × nginx, later 1 ×\n", set.connections, generator, set.pairs)
	}
	return p.err
}
