package serving

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/node/cache"
)

// MaxHops is how many peers a request may pass.
const MaxHops = 1

// Options are what a Pipeline is made of. Zero values are replaced by defaults.
type Options struct {
	Site       string       // the own site's name in the configuration
	Node       string       // the own node's name, for the log
	Peers      Peers        // nil: none
	Cache      *cache.Cache // nil: none
	Logger     *slog.Logger
	Registerer prometheus.Registerer
	// LookupEnv and ReadFile resolve secrets and TLS files; the process's own
	// environment and files by default.
	LookupEnv func(string) (string, bool)
	ReadFile  func(string) ([]byte, error)
	// Now and Random (0 ≤ Random(n) < n) are the process's own by default.
	Now    func() time.Time
	Random func(n int) int
	// Transport replaces the HTTP transport of an own upstream, for tests.
	Transport func(upstream string) http.RoundTripper
	// Resolver looks up the upstreams with discover, each LookUpEvery (5 s);
	// the process's own by default.
	Resolver    Resolver
	LookUpEvery time.Duration
}

func (o *Options) complete() {
	if o.Peers == nil {
		o.Peers = func() []Peer { return nil }
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Registerer == nil {
		o.Registerer = prometheus.NewRegistry()
	}
	if o.LookupEnv == nil {
		o.LookupEnv = os.LookupEnv
	}
	if o.ReadFile == nil {
		o.ReadFile = os.ReadFile
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Random == nil {
		o.Random = rand.IntN
	}
	if o.Resolver == nil {
		o.Resolver = net.DefaultResolver
	}
	if o.LookUpEvery <= 0 {
		o.LookUpEvery = lookUpEvery
	}
}

// Pipeline turns requests into answers. Configure it, run it, then Serve.
type Pipeline struct {
	site    string
	log     *slog.Logger
	opts    Options
	peers   Peers
	now     func() time.Time
	random  func(int) int
	metrics *metrics
	budget  budget
	fleet   fleet
	cache   *cache.Cache // nil: none
	flights flights
	probe   chan struct{} // asks Run for a round of probes now
	table   atomic.Pointer[table]
	// pick chooses among usable upstreams; it is choose, but for tests.
	pick func(s *search, usable []target) int

	mu      sync.Mutex // serialises Configure and SetDrained; guards all below
	drained map[string]bool
	conf    *config.Config
	found   map[string]*found // by upstream, of those with discover
}

// New makes a pipeline that knows no models yet. It starts nothing.
func New(o Options) *Pipeline {
	o.complete()
	p := &Pipeline{
		site: o.Site, log: o.Logger, opts: o, peers: o.Peers, cache: o.Cache, now: o.Now, random: o.Random,
		metrics: newMetrics(o.Registerer), probe: make(chan struct{}, 1), found: map[string]*found{},
	}
	p.fleet = fleet{metrics: p.metrics, onMove: p.moved, peers: map[string]*peer{}}
	p.pick = p.choose
	p.table.Store(&table{})
	return p
}

// Serve answers one request: who may ask, then the cache, then the pool in its
// order, then one upstream after another until one has shown content. Stages that
// are to come (split, degradation, admission, continuation) go between these lines.
//
// The error is nil when the sink has got a complete answer. Otherwise it wraps
// one of this package's sentinels, or is a *StatusError or *BusyError, or what
// the sink or ctx ended with.
func (p *Pipeline) Serve(ctx context.Context, r *Request, sink Sink) error {
	t := p.table.Load()
	m, err := t.admit(r)
	if err != nil {
		return err
	}
	return p.cached(ctx, t, m, r, sink)
}

// fetch gets an answer that nobody has yet.
func (p *Pipeline) fetch(ctx context.Context, t *table, m *model, r *Request, sink Sink, cached CacheStatus) error {
	p.budget.deposit(p.now(), r.RetryCount > 0)
	pool := &search{p: p, t: t, r: r, model: m, rest: m.fallbacks, cached: cached}
	return p.ask(ctx, pool, sink)
}

// admit says whether the model exists for who asks. A key that doesn't allow a
// model sees it as unknown. A peer has asked this already.
func (t *table) admit(r *Request) (*model, error) {
	if r.Hops > MaxHops {
		return nil, ErrHopLimit
	}
	m := t.models[r.Model]
	if m == nil || r.Hops == 0 && !r.Principal.allows(r.Model) {
		return nil, fmt.Errorf("%w: %q", ErrUnknownModel, r.Model)
	}
	return m, nil
}

func (p Principal) allows(model string) bool {
	return len(p.Models) == 0 || slices.Contains(p.Models, model)
}

// ask tries candidates until one has answered, or the request can only fail.
func (p *Pipeline) ask(ctx context.Context, pool *search, sink Sink) error {
	start := time.Now()
	var last failures
	attempts := 0
	for {
		c, ok := pool.next()
		if !ok {
			return failed(pool, &last, attempts)
		}
		if attempts > 0 && !p.mayRetry(&last) {
			c.permit.withdraw()
			return failed(pool, &last, attempts)
		}
		a := &attempt{candidate: c, r: pool.r, sink: sink, now: p.now, start: start}
		a.head.Attempts, a.head.Cache.Status = attempts+1, pool.cached
		o := p.try(ctx, a)
		attempts += max(o.attempts, 1)
		if o.result == resultOK {
			return nil
		}
		if o.sent || !effects[o.result].next {
			return final(a, o)
		}
		last.add(a, o)
		p.log.LogAttrs(ctx, slog.LevelInfo, "upstream failed, asking another", a.describe(o)...)
		if a.peer != nil && (o.result == resultRefused || o.result == resultConnectTimer) {
			pool.reopen(a.peer)
		}
	}
}

// try makes one attempt and settles it with the backend.
func (p *Pipeline) try(ctx context.Context, a *attempt) outcome {
	var gone context.Context
	if a.peer != nil {
		gone = a.peer.gone
	}
	a.w = newWatch(ctx, a.timers, a.start.Add(a.timers.total), gone, a.patience())
	asked := time.Now()
	o := a.run()
	a.w.stop()
	latency := time.Duration(0)
	if a.first > 0 {
		latency = max(a.start.Add(a.first).Sub(asked), 1)
	}
	a.permit.leave(p.now(), o, latency)
	p.observe(a, o)
	if o.result == resultCredentials && a.peer == nil {
		p.rejectedKey(a.target.upstream)
	}
	return o
}

// rejectedKey reads a key again that the upstream refused: it may have changed.
func (p *Pipeline) rejectedKey(u *upstream) {
	if err := u.refreshKey(p.opts.LookupEnv, p.opts.ReadFile); err != nil {
		p.log.Error("upstream refused its api key, and it can't be read again", append(u.words(), "error", err)...)
		return
	}
	p.log.Error("upstream refused its api key or has no money left; check api_key", u.words()...)
}

func (p *Pipeline) observe(a *attempt, o outcome) {
	if o.sent && a.head.Stream && a.r.Hops == 0 && a.first > 0 {
		p.metrics.firstToken.Observe(a.first.Seconds())
	}
	if a.in+a.out == 0 {
		return
	}
	p.metrics.tokens.WithLabelValues(a.model.name, "in").Add(float64(a.in))
	p.metrics.tokens.WithLabelValues(a.model.name, "out").Add(float64(a.out))
	if a.head.Stream && a.out > 1 && o.result == resultOK {
		p.metrics.perToken.Observe((time.Since(a.start) - a.first).Seconds() / float64(a.out-1))
	}
}

// mayRetry asks the budget, unless the one that failed is known to be down:
// turning to another is then no retry but the way things are.
func (p *Pipeline) mayRetry(last *failures) bool {
	switch {
	case last.free:
		p.metrics.retries.WithLabelValues("free").Inc()
	case p.budget.withdraw(p.now()):
		p.metrics.retries.WithLabelValues("budget").Inc()
	default:
		p.metrics.retries.WithLabelValues("refused").Inc()
		return false
	}
	return true
}

// failures are what a request has met so far.
type failures struct {
	status *StatusError
	err    error
	free   bool // the last one needs no budget
	busy   bool // some backend asked to come later
	wait   time.Duration
	peer   bool // some peer was busy
}

func (f *failures) add(a *attempt, o outcome) {
	e := effects[o.result]
	now := a.now()
	// What costs a backend nothing may go on: an open breaker, an answer that
	// says "not I".
	f.free = e.breaker == neutral || a.permit.b.open(now)
	switch o.result {
	case resultRateLimited:
		paused, _ := a.permit.b.away(now)
		if paused == 0 {
			paused = cmp.Or(o.retryAfter, defaultPause)
		}
		if f.wait == 0 || paused < f.wait {
			f.wait = paused
		}
		f.busy = true
	case resultNotServed:
		f.status = o.status
	case resultPeerBusy:
		f.peer = true
		if wait := cmp.Or(o.retryAfter, defaultPause); f.wait == 0 || wait < f.wait {
			f.wait = wait
		}
		f.busy = f.busy || o.overloaded
	default:
		f.err = fmt.Errorf("%w: %s: %w", e.err, a.permit.b.name, o.err)
	}
}

// failed is the client's error when nobody is left. What says "come again"
// goes before what says "broken", and that before one server's "not here".
func failed(pool *search, f *failures, attempts int) error {
	err := f.err
	switch {
	case f.busy:
		err = &BusyError{Err: ErrOverloaded, RetryAfter: f.wait, Attempts: attempts}
	case pool.full, err == nil && f.status == nil && !f.peer:
		busy := pool.exhausted()
		busy.Attempts = attempts
		err = busy
	case err == nil && f.status != nil:
		err = f.status
	case err == nil:
		err = &BusyError{Err: ErrNoUpstream, RetryAfter: cmp.Or(f.wait, time.Second), Attempts: attempts}
	}
	return err
}

// final is the error of an attempt after which nobody else is asked. The door
// puts it into words and logs it.
func final(a *attempt, o outcome) error {
	switch {
	case o.result == resultCancelled:
		return o.err
	case o.status != nil && !o.sent:
		return o.status
	}
	if o.sent && o.result != resultTruncated && !errors.Is(o.err, ErrTimeout) {
		return fmt.Errorf("%w: %s: %w", ErrUpstreamFailed, a.permit.b.name, o.err)
	}
	return fmt.Errorf("%s: %w", a.permit.b.name, o.err)
}

func (a *attempt) describe(o outcome) []slog.Attr {
	attrs := []slog.Attr{
		slog.String("request", a.r.ID), slog.String("model", a.model.name), slog.String("upstream", a.permit.b.name),
		slog.String("result", o.result.String()), slog.Any("error", o.err),
	}
	if a.peer != nil {
		attrs = append(attrs, slog.String("peer", a.peer.node))
	}
	if at := a.permit.b.address; at != "" {
		attrs = append(attrs, slog.String("instance", at))
	}
	return attrs
}

// moved is told of every breaker that changes.
func (p *Pipeline) moved(b *backend, to breakerState, why breakerReason) {
	level := slog.LevelInfo
	if to == breakerOpen {
		level = slog.LevelWarn
	}
	attrs := []slog.Attr{slog.String("upstream", b.name), slog.String("state", to.String()), slog.String("reason", string(why))}
	if b.node == "" {
		b.counts.stand(b, to)
	} else {
		attrs = append(attrs, slog.String("peer", b.node))
	}
	if b.address != "" {
		attrs = append(attrs, slog.String("instance", b.address))
	}
	p.log.LogAttrs(context.Background(), level, "breaker", attrs...)
}

// Close closes idle connections. Call it when no request is under way.
func (p *Pipeline) Close() {
	p.flights.work.Wait() // those whose clients have all just gone
	for u := range p.table.Load().instances() {
		if u.transport != nil {
			u.transport.CloseIdleConnections()
		}
	}
}

var _ Server = (*Pipeline)(nil)
