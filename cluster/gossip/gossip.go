// Package gossip keeps the list of the cluster's members, with hashicorp/memberlist:
// their addresses, versions, and whether they are alive. It is fast and proves
// nothing: an overloaded node reports healthy ones as dead. So the list is one source
// of addresses and a part of the status, and no decision may depend on it alone.
//
// The package owns the metadata that a node publishes about itself (meta.go), the
// table that memberlist's callbacks fill (table.go), the loop that joins seeds and
// lost members again (join.go), the one that finds out whether UDP gets through to each
// member (udp.go), and a transport with bounds (transport.go, stream.go) that passes only
// sealed messages (seal.go), each once (replay.go), of the types that nodes send
// (message.go).
//
// Start reading at Gossip.Run.
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
	"github.com/dsnode/dsnode/cluster/host"
	"github.com/dsnode/dsnode/cluster/throttle"
	"github.com/dsnode/dsnode/storage/notify"
)

// MemberState is a member's state according to gossip. No decision may depend on it
// alone: an overloaded node suspects healthy ones, and in a small cluster a single
// suspicion is enough to declare a member dead.
type MemberState string

// The states of a member. Suspect: it did not answer this node's own probe. Left: it
// announced that it leaves. Dead: it is gone without that.
const (
	MemberAlive   MemberState = "alive"
	MemberSuspect MemberState = "suspect"
	MemberDead    MemberState = "dead"
	MemberLeft    MemberState = "left"
)

// Member is a node as gossip knows it: the metadata that it publishes and its state.
type Member struct {
	Name      string
	Site      string
	RPC       string // host:port as advertised, and so are API, Admin and Gossip; the host may be a DNS name
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
	Since     time.Time // when State began, on this node's clock
}

// Options are what Gossip needs of its node.
type Options struct {
	Name string
	// Bind is host:port, for TCP and UDP; port 0 chooses a free port.
	Bind string
	// Advertise is the host:port at which other nodes reach this one; the host may be
	// a DNS name. Port 0 means the bound port, "" the bound address.
	Advertise string
	// Key encrypts and authenticates all gossip: 16, 24 or 32 bytes.
	Key []byte
	// Label keeps clusters and generations apart: members with another label are
	// ignored. At most 255 bytes.
	Label string
	// Self returns what this node publishes about itself. It is called from several
	// goroutines. Name, State and Since are ignored; an empty Gossip becomes Advertise.
	Self func() Member
	// Seeds returns host:port of nodes to join. It is called at every attempt.
	Seeds func() []string
	// OnChange is called with the latest value of a member that is new or has changed;
	// values in between may be skipped. Run makes the calls, one at a time, and a call
	// that blocks delays the next ones. May be nil.
	OnChange func(Member)
	// Admit returns an error for a site whose packets and streams must be refused. It
	// must return one for "", which stands for addresses of unknown nodes, while it
	// refuses any site: as long as Admit("") is nil, all are admitted. Nil admits all.
	Admit func(site string) error
	// Removed reports whether the cluster has removed a node. Nothing is accepted about
	// such a node, so that no later report of it, or an old one that somebody sends again,
	// makes it a member. Nil: none was removed.
	Removed func(name string) bool
	// Numbered reports whether all members number what they send. As long as it is false,
	// or nil, messages without a number are accepted, as earlier versions send them.
	Numbered func() bool
	// LeaveOnStop announces this node's leaving when Run ends, so that other members
	// see it as left, not dead.
	LeaveOnStop bool
	Host        *host.Host // nil: this machine
	Logger      *slog.Logger
	Registerer  prometheus.Registerer
}

// Timing for sites up to 60 ms apart: memberlist's LAN profile, whose probe timeout
// of 500 ms is many round trips, but dead members are remembered for longer.
const (
	probeInterval    = time.Second
	probeTimeout     = 500 * time.Millisecond
	streamTimeout    = 5 * time.Second
	pushPullInterval = 15 * time.Second
	sendInterval     = 200 * time.Millisecond // announcing a leave takes a few of them
	deadMemory       = time.Hour              // memberlist's GossipToTheDeadTime
	deadReclaim      = 30 * time.Second
	leaveTimeout     = time.Second
	updateTimeout    = time.Second
	runTick          = time.Second // of Run: metrics, and removing dead members
)

// Gossip is this node's part in the gossip of the cluster.
type Gossip struct {
	opts    Options
	table   *table
	metrics *metrics
	update  chan struct{}

	mu        sync.Mutex // guards transport
	transport *transport
	addr      atomic.Pointer[string] // bound
	meta      atomic.Pointer[[]byte] // the metadata that memberlist publishes
	timing    timing
	faults    faults
}

// timing are the times that tests shorten.
type timing struct {
	probeInterval, probeTimeout, reclaim time.Duration
	join                                 joinTiming
}

// New makes a Gossip. It binds its port in Listen or Run.
func New(o Options) *Gossip {
	metrics := newMetrics(o.Registerer)
	return &Gossip{
		opts:    o,
		table:   newTable(o.Name, o.Removed, metrics),
		metrics: metrics,
		update:  make(chan struct{}, 1),
		timing: timing{
			probeInterval: probeInterval, probeTimeout: probeTimeout, reclaim: deadReclaim,
			join: defaultJoinTiming,
		},
	}
}

// Listen binds the gossip port, so that Addr is known before Run. It is optional:
// Run binds too. Run must follow, because Run closes the port.
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
	if err := g.validate(); err != nil {
		return nil, fmt.Errorf("gossip: %w", err)
	}
	t, err := g.newTransport()
	if err != nil {
		return nil, fmt.Errorf("gossip: %w", err)
	}
	addr := t.addr()
	g.addr.Store(&addr)
	g.transport = t
	return t, nil
}

// admits reports whether packets and streams of an address are admitted. An accepted
// stream comes from any port, so with anyPort every site at that IP address must be
// admitted. This may ignore an admitted site at the same IP address, but it never
// lets an isolated one through.
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

func (g *Gossip) numbered() bool { return g.opts.Numbered != nil && g.opts.Numbered() }

// CloseRefused closes the streams that Admit refuses now.
func (g *Gossip) CloseRefused() {
	g.mu.Lock()
	t := g.transport
	g.mu.Unlock()
	if t != nil {
		t.closeRefused()
	}
}

func (g *Gossip) closeTransport(t *transport) {
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

// Members returns all known members, including this node, ordered by name. Members
// that are dead or have left stay in the list for an hour.
func (g *Gossip) Members() []Member { return g.table.snapshot(time.Now()) }

// Update calls Options.Self again, and publishes the result if it has changed.
func (g *Gossip) Update() { notify.Wake(g.update) }

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

// Run gossips until ctx ends. It joins the seeds and lost members again and again:
// memberlist by itself never contacts a dead member again.
func (g *Gossip) Run(ctx context.Context) error {
	transport, err := g.listen()
	if err != nil {
		return err
	}
	defer g.closeTransport(transport)
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
	loops.Go(func() { g.joinLoop(inner, list, transport) })
	loops.Go(func() { g.publishLoop(inner, list) })
	loops.Go(func() { g.probeUDPLoop(inner, list) })

	tick := time.NewTicker(runTick)
	defer tick.Stop()
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-g.table.wakeRun:
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
	transport.stopStreams() // a join under way would delay the end
	loops.Wait()
	if g.opts.LeaveOnStop {
		g.leave(list)
	}
	return nil
}

// leave announces that this node leaves. memberlist reports a member that left and a
// dead one with the same event, so the metadata is published with a flag first.
func (g *Gossip) leave(list *memberlist.Memberlist) {
	if _, err := g.refreshMeta(true); err == nil {
		if err := list.UpdateNode(leaveTimeout); err != nil {
			g.opts.Logger.Debug("gossip: could not publish the leaving flag; members may see this node as dead", "err", err)
		}
	}
	if err := list.Leave(leaveTimeout); err != nil {
		g.opts.Logger.Warn("gossip: could not announce the leave; members will detect that this node is gone", "err", err)
	}
}

// publishLoop publishes this node's metadata when Update is called and it has changed.
func (g *Gossip) publishLoop(ctx context.Context, list *memberlist.Memberlist) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-g.update:
		}
		changed, err := g.refreshMeta(false)
		if err != nil {
			g.opts.Logger.Error("gossip: could not publish metadata; peers keep the previous version", "err", err)
			continue
		}
		if !changed {
			continue
		}
		// An error means that no member received it in time. Members that are alive
		// later receive it then.
		_ = list.UpdateNode(updateTimeout)
	}
}

func (g *Gossip) refreshMeta(leaving bool) (changed bool, err error) {
	self := g.opts.Self()
	if self.Gossip == "" {
		self.Gossip = g.advertised()
	}
	meta, err := encodeMeta(self, leaving)
	if err != nil {
		return false, err
	}
	old := g.meta.Swap(&meta)
	return old == nil || string(*old) != string(meta), nil
}

// advertised is Advertise, with the bound port in place of port 0.
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

// resolveAdvertise finds the IP address that memberlist publishes. It retries while
// the name can't be resolved: a failed name service delays the node but doesn't end
// it.
func (g *Gossip) resolveAdvertise(ctx context.Context, t *transport) error {
	bound := t.listener.Addr().(*net.TCPAddr).AddrPort()
	if g.opts.Advertise == "" {
		if bound.Addr().IsUnspecified() {
			return fmt.Errorf("gossip: bound to %s, so the address to advertise must be configured", g.opts.Bind)
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
		g.opts.Logger.Warn("gossip: could not resolve the advertised address, retrying", "address", g.opts.Advertise, "err", err)
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
	c.UDPBufferSize = packetSize - len(t.sealing.label) - sealOverhead // label and key are the transport's
	c.ProbeInterval = g.timing.probeInterval
	c.ProbeTimeout = g.timing.probeTimeout
	c.TCPTimeout = streamTimeout
	c.PushPullInterval = pushPullInterval
	c.GossipInterval = sendInterval
	c.SuspicionMult = 4
	c.GossipToTheDeadTime = deadMemory
	c.DeadNodeReclaimTime = g.timing.reclaim
	c.EnableCompression = false           // messages have a few hundred bytes
	c.QueueCheckInterval = math.MaxInt64  // it only feeds a metrics sink, and none is installed
	c.Delegate = delegate{meta: &g.meta}  // metadata to publish
	c.Events, c.Alive = g.table, g.table  // members heard
	c.Conflict, c.Ping = g.table, g.table // names with two addresses; answered probes
	c.Logger = log.New(&logWriter{log: g.opts.Logger, table: g.table, throttle: throttle.NewLines()}, "", 0)
	return c
}

// delegate gives memberlist this node's metadata and uses none of its messages.
type delegate struct{ meta *atomic.Pointer[[]byte] }

func (d delegate) NodeMeta(int) []byte             { return *d.meta.Load() }
func (delegate) NotifyMsg([]byte)                  {}
func (delegate) GetBroadcasts(_, _ int) [][]byte   { return nil }
func (delegate) LocalState(bool) []byte            { return nil }
func (delegate) MergeRemoteState(_ []byte, _ bool) {}
