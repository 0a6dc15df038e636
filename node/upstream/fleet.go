// Package upstream is the fleet of model servers that a node can send a request
// to: the upstreams of its own site, and the nodes of other sites (peers), which
// send it on to theirs. It knows which are healthy, which are full, and which comes next.
//
// Fleet.Configure makes a Table from the configuration, Fleet.Search goes through
// it for one request in the order that search.go gives, and each Permit that a
// Search returns is the right to send the request to one server once. Start
// reading at Search.Next. Of a request the package knows the model, and what the
// prompt begins with.
package upstream

import (
	"cmp"
	"context"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/dsnode/dsnode/cluster/clock"
	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/cluster/host"
)

// Options are what a Fleet is made of. Zero values are replaced by defaults.
type Options struct {
	Site       string // the own site's name in the configuration
	Peers      Peers  // nil: none
	Logger     *slog.Logger
	Registerer prometheus.Registerer
	// LookupEnv and ReadFile resolve secrets and TLS files; the process's own
	// environment and files by default.
	LookupEnv func(string) (string, bool)
	ReadFile  func(string) ([]byte, error)
	Host      *host.Host // nil: this machine
	// Now and Random (0 ≤ Random(n) < n) are the process's own by default.
	Now    func() time.Time
	Random func(n int) int
	// Resolver looks up the upstreams with discover, each LookUpEvery (5 s);
	// the process's own by default.
	Resolver    Resolver
	LookUpEvery time.Duration
	// Transport replaces the HTTP client of an own upstream unless it is nil, and Pick
	// the choice between n usable instances (0 ≤ Pick(n) < n). Both are for tests.
	Transport func(upstream string) http.RoundTripper
	Pick      func(n int) int
}

func (o *Options) complete() {
	if o.Peers == nil {
		o.Peers = func() []Peer { return nil }
	}
	o.Logger = cmp.Or(o.Logger, slog.New(slog.DiscardHandler))
	o.Registerer = cmp.Or[prometheus.Registerer](o.Registerer, prometheus.NewRegistry())
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
	o.Resolver = cmp.Or[Resolver](o.Resolver, net.DefaultResolver)
	o.LookUpEvery = cmp.Or(o.LookUpEvery, lookUpEvery)
}

// Fleet is all that can be asked, with its live state. Configure it, and run it.
type Fleet struct {
	o        Options
	log      *slog.Logger
	metrics  *metrics
	peers    peers
	probeNow chan struct{} // asks Run for a round of probes now
	table    atomic.Pointer[Table]

	mu      sync.Mutex // serialises configuration; guards all below
	drained map[string]bool
	conf    *config.Config
	found   map[string]*found // by upstream, of those with discover
}

// New makes a fleet that knows no models yet. It starts nothing.
func New(o Options) *Fleet {
	o.complete()
	f := &Fleet{
		o: o, log: o.Logger, metrics: newMetrics(o.Registerer), probeNow: make(chan struct{}, 1), found: map[string]*found{},
	}
	f.peers = peers{metrics: f.metrics, onMove: f.breakerMoved, byNode: map[string]*peer{}}
	f.table.Store(&Table{})
	return f
}

// Table is the configuration in force. A request takes it once.
func (f *Fleet) Table() *Table { return f.table.Load() }

// Run probes the own site's upstreams, looks up those with discover, reads their
// keys again and notices peers that are lost, until ctx ends.
func (f *Fleet) Run(ctx context.Context) error {
	defer f.Close()
	probes := time.NewTicker(probeEvery)
	defer probes.Stop()
	peers := time.NewTimer(peersEvery)
	defer peers.Stop()
	lookUps := time.NewTicker(f.o.LookUpEvery)
	defer lookUps.Stop()
	var rounds sync.WaitGroup
	defer rounds.Wait()
	// One round of each at a time.
	round := func(what func(context.Context)) func() {
		busy := make(chan struct{}, 1)
		return func() {
			select {
			case busy <- struct{}{}:
				rounds.Go(func() { what(ctx); <-busy })
			default:
			}
		}
	}
	probe, lookUp := round(f.Probe), round(f.discover)
	probe()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-f.probeNow:
			probe()
		case <-probes.C:
			probe()
		case <-lookUps.C:
			lookUp()
		case <-peers.C:
			peers.Reset(clock.UntilTick(f.o.Host.Boottime(), peersEvery))
			f.peers.check(f.o.Peers())
		}
	}
}

// Close closes idle connections. Call it when no request is under way.
func (f *Fleet) Close() {
	for i := range f.Table().instances() {
		if i.transport != nil {
			i.transport.CloseIdleConnections()
		}
	}
}

// Capacity says how many requests the own site's servers could take now beside
// those that they have, and how many they take at most. A server that can't be
// asked at this moment (drained, unusable, paused, breaker open) counts nothing.
// Work that can wait leaves some of it free for clients that can't.
func (f *Fleet) Capacity() (free, total int) {
	now := f.o.Now()
	for _, u := range f.Table().upstreams {
		for _, i := range u.instances {
			if u.drained || !i.usable() || !i.accepts(now) {
				continue
			}
			total += int(i.max)
			free += max(0, int(i.max-i.inFlight.Load()))
		}
	}
	return free, total
}

// breakerMoved logs and counts a breaker that has changed.
func (f *Fleet) breakerMoved(b *backend, to breakerState, why breakerReason) {
	level := slog.LevelInfo
	if to == breakerOpen {
		level = slog.LevelWarn
	}
	attrs := []slog.Attr{slog.String("upstream", b.name), slog.String("state", to.String()), slog.String("reason", string(why))}
	if b.node == "" {
		b.counts.setState(b, to)
	} else {
		attrs = append(attrs, slog.String("peer", b.node))
	}
	if b.address != "" {
		attrs = append(attrs, slog.String("instance", b.address))
	}
	f.log.LogAttrs(context.Background(), level, "breaker", attrs...)
}
