package gossip

import (
	"context"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"math"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/memberlist"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/dsnode/dsnode/cluster/config"
)

// MemberState is what gossip believes of a member. Nothing may be decided on it
// alone: a starved node accuses healthy ones, and in a small cluster one
// accuser is enough.
type MemberState string

// The states of a member. Suspect is this node's own probe without an answer;
// left is a member that said goodbye, dead one that did not.
const (
	MemberAlive   MemberState = "alive"
	MemberSuspect MemberState = "suspect"
	MemberDead    MemberState = "dead"
	MemberLeft    MemberState = "left"
)

// Member is a node as gossip knows it: what it says of itself, and whether it
// is heard.
type Member struct {
	Name      string
	Site      string
	RPC       string // host:port as advertised; the host may be a DNS name
	API       string
	Admin     string
	Gossip    string
	Version   string
	PID       int
	Feature   int
	Instance  string // random per process start
	StartedAt time.Time
	Draining  bool
	State     MemberState
	Since     time.Time // of the state, on this node's clock
}

// GossipOptions are what Gossip needs of its node.
type Options struct {
	Name string
	// Bind is host:port, for TCP and UDP; port 0 takes a free one.
	Bind string
	// Advertise is host:port where the others reach this node; the host may be
	// a DNS name, port 0 means the bound one, "" the bound address.
	Advertise string
	// Key encrypts and authenticates all gossip: 16, 24 or 32 bytes.
	Key []byte
	// Label keeps clusters and generations apart: up to 255 bytes, and members
	// with another label are not heard.
	Label string
	// Self is what this node says of itself, asked from several goroutines.
	// Name, State and Since are ignored; an empty Gossip becomes Advertise.
	Self func() Member
	// Seeds are host:port of nodes to meet, asked at every attempt.
	Seeds func() []string
	// OnChange hears of a member that came, went or says something new, in its
	// latest state (changes in between may be left out). It is called from Run,
	// one at a time, and delays gossip's own view only when it blocks. May be nil.
	OnChange func(Member)
	// Admit refuses the packets and streams of a site with an error, "" being
	// addresses that are nobody's: refused while any site is. Nil admits all.
	Admit func(site string) error
	// LeaveOnStop says goodbye when Run ends, so that nobody suspects anything.
	LeaveOnStop bool
	Logger      *slog.Logger
	Registerer  prometheus.Registerer
}

// Timing for sites up to 60 ms apart: memberlist's LAN profile, whose probe
// timeout of 500 ms is many round trips, with the memory of a WAN.
const (
	probeInterval    = time.Second
	probeTimeout     = 500 * time.Millisecond
	streamTimeout    = 5 * time.Second
	pushPullInterval = 15 * time.Second
	sendInterval     = 200 * time.Millisecond // a goodbye takes a few of them
	deadMemory       = time.Hour              // memberlist's GossipToTheDeadTime
	deadReclaim      = 30 * time.Second
	leaveTimeout     = time.Second
	updateTimeout    = time.Second
	rejoinTick       = time.Second
)

// Gossip tells who is there, quickly and without proof: a phone book and a
// hint. It never decides anything. Start at Run.
type Gossip struct {
	opts    Options
	table   *table
	metrics *metrics
	update  chan struct{}

	mu        sync.Mutex // guards transport
	transport *transport
	addr      atomic.Pointer[string]
	meta      atomic.Pointer[[]byte] // what memberlist is given as metadata
	timing    timing
	faults    faults
}

// timing is what tests shorten.
type timing struct {
	probeInterval, probeTimeout, reclaim time.Duration
	rejoin                               rejoinTiming
}

// NewGossip makes a Gossip. Nothing is bound before Listen or Run.
func New(o Options) *Gossip {
	metrics := newMetrics(o.Registerer)
	return &Gossip{
		opts:    o,
		table:   newTable(o.Name, metrics),
		metrics: metrics,
		update:  make(chan struct{}, 1),
		timing: timing{
			probeInterval: probeInterval, probeTimeout: probeTimeout, reclaim: deadReclaim,
			rejoin: defaultRejoinTiming,
		},
	}
}

// Listen binds the gossip port, so that Addr is known before Run, which would
// do it otherwise. Run must follow: it closes what was bound.
func (g *Gossip) Listen() error {
	_, err := g.listen()
	return err
}

func (g *Gossip) listen() (*transport, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.transport != nil {
		return g.transport, nil
	}
	t, err := newTransport(g.opts.Bind, g.metrics, g.faults, g.admits)
	if err != nil {
		return nil, fmt.Errorf("gossip: %w", err)
	}
	addr := t.addr()
	g.addr.Store(&addr)
	g.transport = t
	return t, nil
}

// admits asks Admit for the site behind an address. A stream that was accepted
// comes from any port, so there every site at that IP must be admitted: rather a
// neighbour unheard for a while than a leak in a cut.
func (g *Gossip) admits(remote netip.AddrPort, anyPort bool) bool {
	if g.opts.Admit == nil || g.opts.Admit("") == nil {
		return true
	}
	sites := g.table.sitesAt(remote, anyPort)
	for _, site := range sites {
		if g.opts.Admit(site) != nil {
			return false
		}
	}
	return len(sites) > 0
}

// sever closes the streams that are no longer admitted.
func (g *Gossip) CloseRefused() {
	g.mu.Lock()
	t := g.transport
	g.mu.Unlock()
	if t != nil {
		t.closeRefused()
	}
}

func (g *Gossip) unlisten(t *transport) {
	_ = t.Shutdown() // never fails
	g.mu.Lock()
	defer g.mu.Unlock()
	g.transport = nil
}

// Addr is the bound address, host:port; "" before Listen or Run.
func (g *Gossip) Addr() string {
	if addr := g.addr.Load(); addr != nil {
		return *addr
	}
	return ""
}

// Members is everybody gossip knows, this node included, ordered by name: the
// dead and the gone ones too, for an hour.
func (g *Gossip) Members() []Member { return g.table.snapshot(time.Now()) }

// Update has Self asked again and told to the others, if it says something new.
func (g *Gossip) Update() { poke(g.update) }

func (g *Gossip) validate() error {
	switch len(g.opts.Key) {
	case 16, 24, 32:
	default:
		return fmt.Errorf("the gossip key has %d bytes, it must have 16, 24 or 32", len(g.opts.Key))
	}
	if len(g.opts.Label) > memberlist.LabelMaxSize {
		return fmt.Errorf("the gossip label has %d bytes, at most %d are allowed", len(g.opts.Label), memberlist.LabelMaxSize)
	}
	return config.CheckIdentityPart("node", g.opts.Name)
}

// Run gossips until ctx ends. It meets the seeds and everybody it knew again
// and again: memberlist by itself never returns to those it gave up.
func (g *Gossip) Run(ctx context.Context) error {
	transport, err := g.listen()
	if err != nil {
		return err
	}
	defer g.unlisten(transport)
	if err := g.validate(); err != nil {
		return fmt.Errorf("gossip: %w", err)
	}
	if _, err := g.refreshMeta(false); err != nil {
		return fmt.Errorf("gossip: %w", err)
	}
	if err := g.resolveAdvertise(ctx, transport); err != nil {
		return err
	}
	list, err := memberlist.Create(g.config(transport))
	if err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return fmt.Errorf("gossip: %w", err)
	}
	defer func() { _ = list.Shutdown() }() // only logs

	inner, cancel := context.WithCancel(ctx)
	var loops sync.WaitGroup
	loops.Go(func() { g.keepMeeting(inner, list, transport) })
	loops.Go(func() { g.keepTelling(inner, list) })

	tick := time.NewTicker(rejoinTick)
	defer tick.Stop()
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-g.table.wake:
		case <-tick.C:
			g.metrics.health.Set(float64(list.GetHealthScore()))
		}
		for _, m := range g.table.changes(time.Now()) {
			if g.opts.OnChange != nil {
				g.opts.OnChange(m)
			}
		}
	}
	cancel()
	transport.stopStreams() // a join under way would hold up the end
	loops.Wait()
	if g.opts.LeaveOnStop {
		g.leave(list)
	}
	return nil
}

// leave says goodbye. Memberlist's events don't tell the gone from the dead, so
// the metadata says it first.
func (g *Gossip) leave(list *memberlist.Memberlist) {
	if _, err := g.refreshMeta(true); err == nil {
		if err := list.UpdateNode(leaveTimeout); err != nil {
			g.opts.Logger.Debug("gossip: leaving was not announced to anybody", "error", err)
		}
	}
	if err := list.Leave(leaveTimeout); err != nil {
		g.opts.Logger.Warn("gossip: nobody heard the goodbye, the others will find out by themselves", "error", err)
	}
}

// keepTelling publishes this node's metadata when it changes.
func (g *Gossip) keepTelling(ctx context.Context, list *memberlist.Memberlist) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-g.update:
		}
		changed, err := g.refreshMeta(false)
		if err != nil {
			g.opts.Logger.Error("gossip: the others keep the old word of this node", "error", err)
			continue
		}
		if !changed {
			continue
		}
		// Its error is that nobody was there to be told in time; whoever comes
		// later is told.
		_ = list.UpdateNode(updateTimeout)
	}
}

func (g *Gossip) refreshMeta(leaving bool) (changed bool, err error) {
	self := g.opts.Self()
	if self.Gossip == "" {
		self.Gossip = g.advertised()
	}
	meta, err := appendMeta(nil, self, leaving)
	if err != nil {
		return false, err
	}
	old := g.meta.Swap(&meta)
	return old == nil || string(*old) != string(meta), nil
}

// advertised is Advertise with the bound port where it leaves that open.
func (g *Gossip) advertised() string {
	if g.opts.Advertise == "" {
		return g.Addr()
	}
	if host, port, err := net.SplitHostPort(g.opts.Advertise); err == nil && port == "0" {
		if _, bound, err := net.SplitHostPort(g.Addr()); err == nil {
			return net.JoinHostPort(host, bound)
		}
	}
	return g.opts.Advertise
}

// resolveAdvertise finds the IP address that memberlist must tell the others.
// A name service that is down delays it and doesn't stop the node.
func (g *Gossip) resolveAdvertise(ctx context.Context, t *transport) error {
	bound := t.listener.Addr().(*net.TCPAddr).AddrPort()
	if g.opts.Advertise == "" {
		if bound.Addr().IsUnspecified() {
			return fmt.Errorf("gossip: bound to %s, so it must be told which address to advertise", g.opts.Bind)
		}
		t.setAdvertise(bound)
		return nil
	}
	for pause := time.Second; ; pause = min(2*pause, 30*time.Second) {
		addrs, err := resolveHostPort(ctx, g.opts.Advertise)
		if err == nil {
			a := addrs[0]
			if a.Port() == 0 {
				a = netip.AddrPortFrom(a.Addr(), bound.Port())
			}
			t.setAdvertise(a)
			return nil
		}
		var bad *net.AddrError
		if errors.As(err, &bad) {
			return fmt.Errorf("gossip: advertise address: %w", err)
		}
		g.opts.Logger.Warn("gossip: the advertised address can't be resolved yet", "address", g.opts.Advertise, "error", err)
		select {
		case <-ctx.Done():
			return nil // Create fails on a transport without an address
		case <-time.After(pause):
		}
	}
}

func (g *Gossip) config(t *transport) *memberlist.Config {
	c := memberlist.DefaultLANConfig()
	c.Name = g.opts.Name
	c.Transport = t
	c.Label = g.opts.Label
	c.SecretKey = g.opts.Key
	c.ProbeInterval = g.timing.probeInterval
	c.ProbeTimeout = g.timing.probeTimeout
	c.TCPTimeout = streamTimeout
	c.PushPullInterval = pushPullInterval
	c.GossipInterval = sendInterval
	c.SuspicionMult = 4
	c.GossipToTheDeadTime = deadMemory
	c.DeadNodeReclaimTime = g.timing.reclaim
	c.EnableCompression = false           // a few hundred bytes, encrypted after it
	c.QueueCheckInterval = math.MaxInt64  // only feeds a metrics sink that nobody installs
	c.Delegate = delegate{meta: &g.meta}  // metadata out
	c.Events, c.Alive = g.table, g.table  // members in
	c.Conflict, c.Ping = g.table, g.table // a name with two addresses; probes answered
	c.Logger = log.New(newLogWriter(g.opts.Logger, g.table), "", 0)
	return c
}

// delegate gives memberlist this node's metadata and wants nothing else.
type delegate struct{ meta *atomic.Pointer[[]byte] }

func (d delegate) NodeMeta(int) []byte             { return *d.meta.Load() }
func (delegate) NotifyMsg([]byte)                  {}
func (delegate) GetBroadcasts(_, _ int) [][]byte   { return nil }
func (delegate) LocalState(bool) []byte            { return nil }
func (delegate) MergeRemoteState(_ []byte, _ bool) {}
