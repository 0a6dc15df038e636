// Package cluster is how nodes agree and know of each other: identity and
// connections (identity.go, mesh.go), gossip, raft with the agreed state
// (state.go, apply.go), the lease, and pings. Start at Cluster.Run.
package cluster

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/clusterpb"
	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/cluster/gossip"
	"github.com/dsnode/dsnode/cluster/mesh"
)

// Options is what a Cluster is made of. All of it is needed unless it says
// otherwise.
type Options struct {
	ClusterName string // what certificates and configuration call the cluster
	Name        string
	Site        string
	Version     string
	DataDir     string
	Seeds       []string // rpc addresses; may be empty on the first node

	Listener    net.Listener // the rpc port; the Cluster closes it
	RPC         string       // advertised addresses
	API, Admin  string
	Gossip      string // advertised; port 0 becomes the real one
	GossipBind  string
	GossipKey   []byte
	Credentials *mesh.Credentials

	Logs        raft.LogStore
	Stable      raft.StableStore
	Snapshots   raft.SnapshotStore
	StoreFailed <-chan struct{} // closed when the store under raft can't go on
	StoreError  func() error

	// OperatorKey is the fingerprint of this node's operator key, and
	// OperatorKeyPrevious of the one before it that still opens things; may be
	// empty. A cluster whose data keys neither opens does not let the node in.
	OperatorKey         string
	OperatorKeyPrevious string

	Health     func() Health // read on each ping; must not block
	Logger     *slog.Logger
	Registerer prometheus.Registerer
	// Admit is asked at each connection and gossip packet with a site, with ""
	// for an address whose site nobody knows: that must be refused while anything
	// is. Nil admits all. It must be quick. See Sever.
	Admit func(site string) error
	// Quarantined is asked before the first tick of each leadership and again
	// until it says no: while it says why, this leader commits no tick, so
	// nobody gets a lease, and refuses changes with ErrQuarantined. Nil: never.
	Quarantined func() (why string, quarantined bool)
	// Services registers what else is served to peers on the rpc port; nil:
	// nothing. Handlers learn who calls from PeerFromContext.
	Services func(grpc.ServiceRegistrar)
}

// Cluster is this node's part in the cluster.
type Cluster struct {
	opts     Options
	log      *slog.Logger
	instance string
	started  time.Time
	timing   atomic.Pointer[config.Timing] // the default until this node is a member

	mesh    *mesh.Mesh
	book    *addressBook
	fsm     *fsm
	lease   *lease
	peers   *peerTable
	pauses  *pauseMeter
	metrics *metrics
	gossip  atomic.Pointer[gossip.Gossip]

	release func(ctx context.Context, switchoverID string) error // see OnRelease
	carried func(context.Context) (map[string]int64, error)      // see OnCarried

	member atomic.Pointer[memberFile] // nil until this node belongs to a cluster
	joined chan struct{}              // closes when member is set
	raft   atomic.Pointer[raft.Raft]
	layer  *gatedLayer
	// snapshotted is the configuration index that the newest snapshot holds;
	// upkeep's alone.
	snapshotted uint64
	waiting     atomic.Pointer[string] // why this node isn't a member yet, for the status

	fatal  context.CancelCauseFunc // set by Run
	living context.Context         // ends with Run's work, its cause says why
	// diskDead gets the error of a disk that hangs for good; then Run returns
	// without waiting for what waits for the disk.
	diskDead chan error

	quarantine atomic.Pointer[string] // why this leader holds still; nil: it does not
	foundedNow atomic.Bool            // this process founded the cluster
	leftBehind atomic.Pointer[string] // a peer is of a newer generation

	founding   sync.Mutex // one Bootstrap at a time
	founded    chan memberFile
	leadership leadershipBoard
	yielding   atomic.Bool // a transfer is under way: no ticks
	// committed has an entry when something was committed here that followers
	// don't know of yet: a tick tells them. See commit.
	committed chan struct{}
}

// New makes a Cluster; Run starts it.
func New(o Options) (*Cluster, error) {
	m, err := readMemberFile(o.DataDir)
	if err != nil {
		return nil, err
	}
	if m.ClusterID != "" && m.Name != o.ClusterName {
		return nil, fmt.Errorf("%s belongs to cluster %q, this node is configured for %q: %w", o.DataDir, m.Name, o.ClusterName, ErrWrongCluster)
	}
	var id [16]byte
	_, _ = rand.Read(id[:]) // never fails
	c := &Cluster{
		opts: o, log: o.Logger, instance: hex.EncodeToString(id[:]), started: time.Now().UTC().Truncate(time.Millisecond),
		book: newAddressBook(), lease: &lease{},
		peers: &peerTable{answers: map[string]answer{}}, pauses: &pauseMeter{},
		founded: make(chan memberFile, 1), joined: make(chan struct{}), diskDead: make(chan error, 1), committed: make(chan struct{}, 1),
		release: func(context.Context, string) error { return ErrNotMember },
		carried: func(context.Context) (map[string]int64, error) { return map[string]int64{}, nil },
	}
	if err := c.setTiming(m.heartbeat()); err != nil {
		return nil, err
	}
	c.living, c.fatal = context.WithCancelCause(context.Background())
	c.fsm = newFSM(o.Logger, func(err error) { c.fatal(err) })
	c.leadership.init()
	if m.ClusterID != "" {
		c.member.Store(&m)
		close(c.joined)
		for _, n := range m.Nodes {
			c.book.learn(n)
		}
	}
	c.mesh = mesh.New(mesh.Options{
		Credentials: o.Credentials, Membership: c.Membership, Address: c.book.rpc,
		Logger: o.Logger, Registerer: o.Registerer, Admit: o.Admit,
		Relays: c.relays, Silent: c.silent,
		OnNewerGeneration: func(peer mesh.Identity, theirs agreed.Generation) {
			words := fmt.Sprintf("node %s is of generation %d: the cluster was recovered without this node; stop it, wipe its data directory and let it join again", peer.Node, theirs.Number)
			if old := c.leftBehind.Swap(&words); old == nil {
				c.log.Error("left behind by a recovery", "peer", peer.Node, "generation", theirs.Number)
			}
		},
	})
	c.layer = newGatedLayer(c.living, c.mesh.RaftLayer(o.Name), c.holdDial)
	c.metrics = newMetrics(o.Registerer, c)
	return c, nil
}

// Mesh carries connections to peers.
func (c *Cluster) Mesh() *mesh.Mesh { return c.mesh }

// Timing is what failure detection uses: the default before this node is a
// member, then what the cluster was founded with.
func (c *Cluster) Timing() config.Timing { return *c.timing.Load() }

// setTiming happens before raft and the loops start: a cluster's timing never
// changes while it runs, because two nodes with different ideas of a lease's
// length could both be right about who is in charge.
func (c *Cluster) setTiming(heartbeat time.Duration) error {
	t := config.TimingFrom(heartbeat)
	if err := t.Check(); err != nil {
		return err
	}
	c.timing.Store(&t)
	c.lease.setLength(t.Lease)
	return nil
}

// Instance is this process's random id.
func (c *Cluster) Instance() string { return c.instance }

// StartedAt is when this process started.
func (c *Cluster) StartedAt() time.Time { return c.started }

// State is the agreed state as this node has applied it: never nil, immutable.
// Its ClusterID is empty while the node belongs to no cluster.
func (c *Cluster) State() *agreed.State { return c.fsm.state.Load() }

// Changed gives a channel that closes at the next change of State.
func (c *Cluster) Changed() <-chan struct{} { return c.fsm.watch() }

// Membership is what the preface of each connection says of this node.
func (c *Cluster) Membership() mesh.Membership {
	if m := c.member.Load(); m != nil {
		return m.membership()
	}
	return mesh.Membership{}
}

// Waiting says why this node is not a member yet, in words; empty when it is.
func (c *Cluster) Waiting() string {
	if c.member.Load() != nil {
		return ""
	}
	if w := c.waiting.Load(); w != nil {
		return *w
	}
	return "waiting for dsnode bootstrap, or for a seed that belongs to a cluster"
}

// AwaitMember blocks until this node belongs to a cluster.
func (c *Cluster) AwaitMember(ctx context.Context) error {
	select {
	case <-c.joined:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// ReloadCredentials reads the certificates again now.
func (c *Cluster) ReloadCredentials() error { return c.opts.Credentials.Reload() }

// Lease is how long this node's knowledge of a live quorum is still good (zero
// or less: fenced), and the highest epoch it has heard of. A node may act in a
// role only while the lease lasts and that epoch is the one in its State.
func (c *Cluster) Lease() (left time.Duration, epoch uint64) {
	left, heard := c.lease.left()
	return left, heard.epoch
}

// OwnershipLease is the lease for starting jobs: how long it is good (zero or
// less: none), and the newest change of State.Ownership that was heard of. Who
// acts for a stream does so only while the one in its State is not older.
func (c *Cluster) OwnershipLease() (left time.Duration, ownership uint64) {
	left, heard := c.lease.left()
	return left, heard.ownership
}

// LeaseChanged gives a channel that closes when a lease begins or a higher epoch
// or change of ownership is heard of. Its end is no event: Lease tells it beforehand.
func (c *Cluster) LeaseChanged() <-chan struct{} { return c.lease.changed() }

// Founded reports whether this process founded the cluster: then there is
// nothing older anywhere.
func (c *Cluster) Founded() bool { return c.foundedNow.Load() }

// Quarantined says why this node, leading raft, holds still; empty when it does
// not.
func (c *Cluster) Quarantined() string {
	if why := c.quarantine.Load(); why != nil {
		return *why
	}
	return ""
}

// LeftBehind says that a recovery went on without this node; empty: not known.
func (c *Cluster) LeftBehind() string {
	if words := c.leftBehind.Load(); words != nil {
		return *words
	}
	return ""
}

// Cold reports whether no lease was held since this process started.
func (c *Cluster) Cold() bool { return !c.lease.everHeld() }

// Paused is the longest recent time that this process did not run.
func (c *Cluster) Paused() time.Duration { return c.pauses.longest() }

// Sever ends every connection with the sites that Options.Admit refuses now.
// What comes later Admit refuses by itself.
func (c *Cluster) Sever() {
	c.mesh.CloseRefused()
	if g := c.gossip.Load(); g != nil {
		g.CloseRefused()
	}
}

// Members is what gossip knows; nil before this node is a member.
func (c *Cluster) Members() []gossip.Member {
	if g := c.gossip.Load(); g != nil {
		return g.Members()
	}
	return nil
}

// Announce makes gossip and the next pings carry what changed in Health.
func (c *Cluster) Announce() {
	if g := c.gossip.Load(); g != nil {
		g.Update()
	}
}

func (c *Cluster) self() agreed.Node {
	n := agreed.Node{
		Name: c.opts.Name, Site: c.opts.Site, RPC: c.opts.RPC, Gossip: c.opts.Gossip,
		API: c.opts.API, Admin: c.opts.Admin, Version: c.opts.Version, Feature: agreed.MaxFeatureLevel,
		Instance: c.instance, StartedAt: c.started,
		OperatorKey: c.opts.OperatorKey, OperatorKeyPrevious: c.opts.OperatorKeyPrevious,
	}
	if host, port, err := net.SplitHostPort(n.Gossip); err == nil && port == "0" {
		if g := c.gossip.Load(); g != nil {
			if _, real, err := net.SplitHostPort(g.Addr()); err == nil {
				n.Gossip = net.JoinHostPort(host, real)
			}
		}
	}
	return n
}

// Run blocks until ctx ends, then hands over what it holds and stops. It
// returns early with the reason when this node can't go on.
func (c *Cluster) Run(ctx context.Context) error {
	defer c.fatal(ErrStopped)
	// Peers must still be reachable while this node hands over, so the
	// connections outlive ctx.
	carriage, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	g, carriage := errgroup.WithContext(carriage)
	g.Go(func() error { return c.mesh.Serve(carriage, c.opts.Listener) })
	g.Go(func() error { return c.mesh.MonitorRoutes(carriage) })
	g.Go(func() error { return c.serveRPC(carriage) })
	g.Go(func() error { return c.opts.Credentials.Run(carriage) })
	g.Go(func() error {
		defer stop()
		return c.live(ctx, carriage)
	})
	ended := make(chan error, 1)
	go func() { ended <- errors.Join(g.Wait(), c.mesh.Close()) }()
	select {
	case err := <-ended:
		return err
	case err := <-c.diskDead:
		// raft waits for its disk, for ever perhaps, and so does all that would
		// have to end before it.
		return err
	}
}

// live is the life of a member, from joining to leaving.
func (c *Cluster) live(ctx, carriage context.Context) error {
	// Whatever ends first: the owner's wish, a broken connection layer, or
	// something that this node can't go on with.
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(c.living, func() { cancel(context.Cause(c.living)) })()
	defer context.AfterFunc(carriage, func() { cancel(nil) })()

	if err := c.awaitMembership(ctx); err != nil {
		return quiet(ctx, err)
	}
	r, err := c.startRaft()
	if err != nil {
		return err
	}
	gossip := c.newGossip()
	if err := gossip.Listen(); err != nil {
		return errors.Join(err, r.Shutdown().Error())
	}
	c.gossip.Store(gossip)

	loops, stopLoops := context.WithCancel(carriage)
	defer stopLoops()
	g, lctx := errgroup.WithContext(loops)
	for _, loop := range []func(context.Context) error{
		gossip.Run, c.pauses.Run, c.pingAll, c.leadLoop, c.announce, c.remember, c.upkeep,
		c.watchDisk, c.watchStore,
	} {
		g.Go(func() error { return loop(lctx) })
	}
	defer context.AfterFunc(lctx, func() { cancel(nil) })()

	<-ctx.Done()
	if lctx.Err() == nil && errors.Is(context.Cause(ctx), context.Canceled) {
		c.handOver(carriage)
	}
	stopLoops()
	err = g.Wait()
	c.fatal(ErrStopped) // frees dials that wait for a peer
	if serr := r.Shutdown().Error(); serr != nil {
		err = errors.Join(err, fmt.Errorf("stop raft: %w", serr))
	}
	if cause := context.Cause(ctx); err == nil && !errors.Is(cause, context.Canceled) && !errors.Is(cause, ErrStopped) {
		err = cause
	}
	return err
}

// quiet turns the end of ctx into success, unless it ended for a reason.
func quiet(ctx context.Context, err error) error {
	if ctx.Err() == nil {
		return err
	}
	if cause := context.Cause(ctx); !errors.Is(cause, context.Canceled) {
		return cause
	}
	return nil
}

func (c *Cluster) newGossip() *gossip.Gossip {
	m := c.Membership()
	return gossip.New(gossip.Options{
		Name: c.opts.Name, Bind: c.opts.GossipBind, Advertise: c.opts.Gossip, Key: c.opts.GossipKey,
		Label: fmt.Sprintf("%s/%d/%s", m.ClusterID, m.Generation.Number, m.Generation.ID),
		Self: func() gossip.Member {
			n := c.self()
			return gossip.Member{
				Name: n.Name, Site: n.Site, RPC: n.RPC, API: n.API, Admin: n.Admin, Version: n.Version,
				PID: c.opts.Health().PID, Feature: n.Feature, Instance: n.Instance, StartedAt: n.StartedAt,
				Draining: c.opts.Health().Draining,
			}
		},
		Seeds: func() []string {
			var seeds []string
			for _, n := range c.book.all() {
				if n.Name != c.opts.Name && n.Gossip != "" {
					seeds = append(seeds, n.Gossip)
				}
			}
			return seeds
		},
		OnChange: func(m gossip.Member) {
			if m.Name != c.opts.Name {
				c.book.learn(agreed.Node{
					Name: m.Name, Site: m.Site, RPC: m.RPC, Gossip: m.Gossip, API: m.API, Admin: m.Admin,
					Version: m.Version, Feature: m.Feature, Instance: m.Instance, StartedAt: m.StartedAt,
				})
			}
		},
		Admit: c.opts.Admit, LeaveOnStop: true, Logger: c.log, Registerer: c.opts.Registerer,
	})
}

// watchStore ends the node when the store under raft has failed: after a failed
// fsync nobody knows what is on the disk, and a retry would lie.
func (c *Cluster) watchStore(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case <-c.opts.StoreFailed:
		return fmt.Errorf("raft's store failed: %w", c.opts.StoreError())
	}
}

func (c *Cluster) watchDisk(ctx context.Context) error {
	var synced func() uint64
	if s, ok := c.opts.Logs.(interface{ Syncs() uint64 }); ok {
		synced = s.Syncs
	}
	err := newDiskWatchdog(c.opts.DataDir, c.log, synced, c.diskStalled).Run(ctx)
	if errors.Is(err, ErrDiskStalled) {
		c.diskDead <- err
	}
	return err
}

func (c *Cluster) diskStalled(stalled bool) {
	c.layer.shut(stalled)
	if stalled {
		c.mesh.CloseKind(mesh.KindRaft)
	}
}

func (c *Cluster) client(node string) (clusterpb.PeerClient, error) {
	conn, err := c.mesh.ClientConn(node)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", node, err)
	}
	return clusterpb.NewPeerClient(conn), nil
}
