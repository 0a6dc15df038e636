// Package cluster makes nodes agree on one state and monitor each other: Raft, the
// lease, joining and pings, over the connections of cluster/mesh and the membership
// of cluster/gossip. The agreed state itself, and the function that changes it, are
// in cluster/agreed. Start at Cluster.Run.
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
	"github.com/dsnode/dsnode/cluster/host"
	"github.com/dsnode/dsnode/cluster/mesh"
)

// Options configure a Cluster. All fields are required unless their comments say
// otherwise.
type Options struct {
	ClusterName string // as in the certificates and in node.yaml
	Name        string
	Site        string
	Version     string
	DataDir     string
	Seeds       []string // rpc addresses; may be empty on the first node

	Listener    net.Listener // the rpc port; Cluster closes it
	RPC         string       // advertised, as API, Admin and Gossip
	API, Admin  string
	Gossip      string // port 0 is replaced by the port that GossipBind got
	GossipBind  string
	GossipKey   []byte
	Credentials *mesh.Credentials

	Logs        raft.LogStore
	Stable      raft.StableStore
	Snapshots   raft.SnapshotStore
	StoreFailed <-chan struct{} // closed when raft's store has failed
	StoreError  func() error    // the error after StoreFailed
	// DataIntact is nil while DataDir is the directory that was opened, else it says what
	// happened to it. Nil: not asked.
	DataIntact func() error

	// OperatorKey is the fingerprint of this node's operator key,
	// OperatorKeyPrevious that of the previous key, which can still open data keys;
	// both may be empty. A cluster whose data keys are wrapped with neither refuses
	// the node.
	OperatorKey         string
	OperatorKeyPrevious string

	ClusterKeys ClusterKeys

	Host *host.Host // nil: this machine
	// FeatureLevel is the feature level that this node announces, so that the leader
	// raises the cluster's no further; 0: the newest. It is ignored once the cluster's
	// level is higher.
	FeatureLevel int

	Health     func() Health // called for each ping; must not block
	Logger     *slog.Logger
	Registerer prometheus.Registerer
	// PeerConns and PeerHandshakes are those of mesh.Options.
	PeerConns, PeerHandshakes int
	// Admit is called for each connection and gossip packet with the peer's site, or
	// with "" for an address whose site is unknown; while it refuses any site it must
	// refuse "" too. It must not block. Nil admits all. See Sever.
	Admit func(site string) error
	// Quarantined is called before the first tick of each leadership, and again
	// until it returns false. While it returns true, this leader commits no tick, so
	// no node gets a lease, and refuses changes with ErrQuarantined. Nil: never.
	Quarantined func() (why string, quarantined bool)
	// Services registers further gRPC services for peers on the rpc port; may be
	// nil. Handlers get the caller from mesh.PeerFromContext.
	Services func(grpc.ServiceRegistrar)
}

// Cluster is this node's membership in the cluster.
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
	large   *sentTimes
	pauses  *pauseMeter
	disk    *diskMeter
	metrics *metrics
	gossip  atomic.Pointer[gossip.Gossip]

	release func(ctx context.Context, switchoverID string) error // see OnRelease
	carried func(context.Context) (map[string]int64, error)      // see OnCarried
	acting  func() uint64                                        // see OnActing

	member   atomic.Pointer[memberFile] // nil until this node belongs to a cluster
	memberMu sync.Mutex                 // held while member and its file are changed
	joined   chan struct{}              // closes when member is set
	raft     atomic.Pointer[raft.Raft]
	votes    *voterTransport // set before raft
	// transport is raft's; set with raft.
	transport atomic.Pointer[raft.NetworkTransport]
	hadVote   atomic.Bool // in the configuration of this node's log at the start
	layer     *raftLayer
	// snapshotted is the index of the raft configuration in the newest snapshot.
	// Only upkeep uses it.
	snapshotted uint64
	waiting     atomic.Pointer[string] // why this node isn't a member yet, for the status

	fatal  context.CancelCauseFunc // ends runCtx with a cause
	runCtx context.Context         // ends when Run must end
	// diskHung gets the error of a disk that does not respond. Run then returns
	// without waiting for goroutines that wait for the disk.
	diskHung chan error

	quarantine atomic.Pointer[string] // why this leader is quarantined; nil: it is not
	foundedNow atomic.Bool            // this process founded the cluster
	leftBehind atomic.Pointer[string] // a peer has a newer generation

	removal   atomic.Pointer[string] // that this node was removed; nil: it was not
	removed   chan struct{}          // closes when removal is set
	returning *memberFile            // of a removed node; New sets it
	restarted bool                   // this node was a member before this process started; New sets it

	founding     sync.Mutex // held while this node founds a cluster or becomes a member
	founded      chan memberFile
	leadership   leadershipState
	transferring atomic.Bool // a leadership transfer is in progress: commit no ticks
	refusing     atomic.Bool // after a leadership transfer raft refuses ticks, see lead
	// committed requests a tick, so that followers learn that an entry was
	// committed. See commit.
	committed chan struct{}
}

// New creates a Cluster; Run starts it.
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
		opts: o, log: o.Logger, instance: hex.EncodeToString(id[:]), started: o.Host.Now().UTC().Truncate(time.Millisecond),
		book: &addressBook{entries: map[string]agreed.Node{}}, lease: &lease{host: o.Host},
		peers: &peerTable{answers: map[string]answer{}}, large: &sentTimes{at: map[string]time.Duration{}}, pauses: &pauseMeter{host: o.Host},
		removed: make(chan struct{}),
		founded: make(chan memberFile, 1), joined: make(chan struct{}), diskHung: make(chan error, 1), committed: make(chan struct{}, 1),
		release: func(context.Context, string) error { return ErrNotMember },
		carried: func(context.Context) (map[string]int64, error) { return map[string]int64{}, nil },
		acting:  func() uint64 { return 0 },
	}
	if err := c.setTiming(m.heartbeat()); err != nil {
		return nil, err
	}
	c.disk = newDiskMeter(c.Timing, o.Host.Boottime)
	c.runCtx, c.fatal = context.WithCancelCause(context.Background())
	c.fsm = newFSM(o.Logger, o.Host, func(err error) { c.fatal(err) })
	switch {
	case m.Removed != "":
		c.returning = &m
		c.waiting.Store(&m.Removed)
	case m.ClusterID != "":
		c.restarted = !m.Founder
		c.member.Store(&m)
		close(c.joined)
		for _, n := range m.Nodes {
			c.book.recordIndirect(n)
		}
	}
	c.mesh = mesh.New(mesh.Options{
		Credentials: o.Credentials, Membership: c.Membership, Address: c.book.rpc,
		Host: o.Host, Logger: o.Logger, Registerer: o.Registerer, Admit: o.Admit,
		MaxConns: o.PeerConns, MaxHandshakes: o.PeerHandshakes,
		Relays: c.relays, Silent: c.silentPeers, Removed: c.wasRemoved, Member: c.isMemberPeer,
		OnRemoved: func(peer mesh.Identity, why string) { c.learnRemoval(why) },
		OnNewerGeneration: func(peer mesh.Identity, theirs agreed.Generation) {
			message := fmt.Sprintf("node %s has generation %d: the cluster was recovered without this node; stop it, wipe its data directory and let it join again", peer.Node, theirs.Number)
			if old := c.leftBehind.Swap(&message); old == nil {
				c.log.Error("a peer has a newer generation: the cluster was recovered without this node", "peer", peer.Node, "generation", theirs.Number)
			}
		},
	})
	c.layer = &raftLayer{StreamLayer: c.mesh.RaftLayer(o.Name), ctx: c.runCtx, wait: c.waitForPeer, waiting: map[string]int{}}
	c.metrics = newMetrics(o.Registerer, c)
	return c, nil
}

// Mesh returns the connections to peers.
func (c *Cluster) Mesh() *mesh.Mesh { return c.mesh }

// Timing is the timing of failure detection: the default before this node is a
// member, then that from the cluster's bootstrap.
func (c *Cluster) Timing() config.Timing { return *c.timing.Load() }

// setTiming is called before raft and the loops start. A cluster's timing never
// changes afterwards: if two nodes used different lease lengths, two sites could
// act as primary at the same time.
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

// State is the agreed state that this node has applied: never nil, immutable. Its
// ClusterID is empty while the node belongs to no cluster.
func (c *Cluster) State() *agreed.State { return c.fsm.state.Load() }

// Changed returns a channel that closes at the next change of State.
func (c *Cluster) Changed() <-chan struct{} { return c.fsm.changed.Next() }

// Membership is what this node sends in the preface of each connection.
func (c *Cluster) Membership() mesh.Membership {
	if m := c.member.Load(); m != nil {
		return m.membership()
	}
	return mesh.Membership{}
}

// Waiting says why this node is not a member yet; empty if it is one.
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

// Lease is how long this node's lease lasts (zero or less: the node is fenced), and
// the highest epoch that it has learned of. A node may act in a role only while the
// lease lasts and that epoch is the one in its State.
func (c *Cluster) Lease() (left time.Duration, epoch uint64) {
	left, heard := c.lease.left()
	return left, heard.epoch
}

// OwnershipLease is the lease for starting jobs: how long it lasts (zero or less:
// none), and the highest State.Ownership that this node has learned of. A node may
// start jobs of a stream only while the lease lasts and its own State.Ownership is
// not older.
func (c *Cluster) OwnershipLease() (left time.Duration, ownership uint64) {
	left, heard := c.lease.left()
	return left, heard.ownership
}

// LeaseChanged returns a channel that closes when a lease begins, or when the node
// learns of a higher epoch or ownership. It does not close when the lease ends: Lease
// returns that time beforehand.
func (c *Cluster) LeaseChanged() <-chan struct{} { return c.lease.changed.Next() }

// Founded reports whether this process founded the cluster: then no node has an
// older state.
func (c *Cluster) Founded() bool { return c.foundedNow.Load() }

// Quarantined says why this node, as raft's leader, is quarantined; empty if it is
// not.
func (c *Cluster) Quarantined() string {
	if why := c.quarantine.Load(); why != nil {
		return *why
	}
	return ""
}

// LeftBehind says that the cluster was recovered without this node; empty if this
// node has met no peer of a newer generation.
func (c *Cluster) LeftBehind() string {
	if message := c.leftBehind.Load(); message != nil {
		return *message
	}
	return ""
}

// Cold reports whether this node has held no lease since the process started.
func (c *Cluster) Cold() bool { return !c.lease.everHeld() }

// Paused is the longest recent time for which this process did not run.
func (c *Cluster) Paused() time.Duration { return c.pauses.longest() }

// Sever closes every connection with the sites that Options.Admit refuses now. Later
// connections are refused by Admit itself.
func (c *Cluster) Sever() {
	c.mesh.CloseRefused()
	if g := c.gossip.Load(); g != nil {
		g.CloseRefused()
	}
}

// Members are the nodes that gossip knows; nil before this node is a member.
func (c *Cluster) Members() []gossip.Member {
	if g := c.gossip.Load(); g != nil {
		return g.Members()
	}
	return nil
}

// Announce publishes changes of Health by gossip. Pings always have the current one.
func (c *Cluster) Announce() {
	if g := c.gossip.Load(); g != nil {
		g.Update()
	}
}

func (c *Cluster) self() agreed.Node {
	n := agreed.Node{
		Name: c.opts.Name, Site: c.opts.Site, RPC: c.opts.RPC, Gossip: c.opts.Gossip,
		API: c.opts.API, Admin: c.opts.Admin, Version: c.opts.Version, Feature: announcedLevel(c.opts.FeatureLevel, c.State().FeatureLevel),
		Instance: c.instance, StartedAt: c.started,
		OperatorKey: c.opts.OperatorKey, OperatorKeyPrevious: c.opts.OperatorKeyPrevious,
	}
	if host, port, err := net.SplitHostPort(n.Gossip); err == nil && port == "0" {
		if g := c.gossip.Load(); g != nil {
			if _, bound, err := net.SplitHostPort(g.Addr()); err == nil {
				n.Gossip = net.JoinHostPort(host, bound)
			}
		}
	}
	return n
}

// Run blocks until ctx ends, then transfers raft's leadership if this node has it,
// and stops. It returns early with an error when this node can't continue.
func (c *Cluster) Run(ctx context.Context) error {
	defer c.fatal(ErrStopped)
	// The leadership transfer needs the peers, so connections stay open after ctx
	// has ended.
	connCtx, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	g, connCtx := errgroup.WithContext(connCtx)
	g.Go(func() error { return c.mesh.Serve(connCtx, c.opts.Listener) })
	g.Go(func() error { return c.mesh.MonitorRoutes(connCtx) })
	g.Go(func() error { return c.serveRPC(connCtx) })
	g.Go(func() error { return c.opts.Credentials.Run(connCtx) })
	g.Go(func() error {
		defer stop()
		return c.runMember(ctx, connCtx)
	})
	ended := make(chan error, 1)
	go func() { ended <- errors.Join(g.Wait(), c.mesh.Close()) }()
	select {
	case err := <-ended:
		return err
	case err := <-c.diskHung:
		// Raft, and everything that stops before it, may wait for the disk for ever.
		return err
	}
}

// runMember joins the cluster, runs raft, gossip and all loops until ctx ends, and
// stops them.
func (c *Cluster) runMember(ctx, connCtx context.Context) error {
	// ctx ends with the caller's context, with connCtx (the connections have failed),
	// or with runCtx (a fatal error).
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(c.runCtx, func() { cancel(context.Cause(c.runCtx)) })()
	defer context.AfterFunc(connCtx, func() { cancel(nil) })()

	if err := c.awaitMembership(ctx); err != nil {
		return endError(ctx, err)
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

	loops, stopLoops := context.WithCancel(connCtx)
	defer stopLoops()
	g, lctx := errgroup.WithContext(loops)
	for _, loop := range []func(context.Context) error{
		gossip.Run, c.pauses.Run, c.pingAll, c.leadLoop, c.announce, c.keepMemberFile, c.upkeep,
		c.watchDisk, c.watchStore, c.judgeDisk, c.leaveSlowDisk,
	} {
		g.Go(func() error { return loop(lctx) })
	}
	defer context.AfterFunc(lctx, func() { cancel(nil) })()

	<-ctx.Done()
	if lctx.Err() == nil && errors.Is(context.Cause(ctx), context.Canceled) {
		c.handOver(connCtx)
	}
	stopLoops()
	err = g.Wait()
	c.fatal(ErrStopped) // ends dials that wait for a peer
	if serr := r.Shutdown().Error(); serr != nil {
		err = errors.Join(err, fmt.Errorf("stop raft: %w", serr))
	}
	if c.removedWhy() != "" {
		return errors.Join(c.RemovedError(), err)
	}
	if cause := context.Cause(ctx); err == nil && !errors.Is(cause, context.Canceled) && !errors.Is(cause, ErrStopped) {
		err = cause
	}
	return err
}

// endError is the error to return after err: nil if ctx was canceled, its cause if
// it ended for another reason, and err if it has not ended.
func endError(ctx context.Context, err error) error {
	if ctx.Err() == nil {
		return err
	}
	if cause := context.Cause(ctx); !errors.Is(cause, context.Canceled) {
		return cause
	}
	return nil
}

// numberedGossipLevel is the feature level whose members all number their gossip, so that
// messages without a number are old ones that somebody sends again.
const numberedGossipLevel = 3

func (c *Cluster) newGossip() *gossip.Gossip {
	m := c.Membership()
	return gossip.New(gossip.Options{
		Host: c.opts.Host, Name: c.opts.Name, Bind: c.opts.GossipBind, Advertise: c.opts.Gossip, Key: c.opts.GossipKey,
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
			if m.Name != c.opts.Name && c.isMember(m.Name) {
				c.book.recordIndirect(agreed.Node{
					Name: m.Name, Site: m.Site, RPC: m.RPC, Gossip: m.Gossip, API: m.API, Admin: m.Admin,
					Version: m.Version, Feature: m.Feature, Instance: m.Instance, StartedAt: m.StartedAt,
				})
			}
		},
		Removed: func(name string) bool {
			_, removed := c.State().Removal(name)
			return removed
		},
		Numbered: func() bool { return c.State().FeatureLevel >= numberedGossipLevel },
		Admit:    c.opts.Admit, LeaveOnStop: true, Logger: c.log, Registerer: c.opts.Registerer,
	})
}

// watchStore ends the node when raft's store has failed: after a failed fsync the
// content of the disk is unknown, and a retry may succeed without writing it.
func (c *Cluster) watchStore(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case <-c.opts.StoreFailed:
		return fmt.Errorf("raft's store failed: %w", c.opts.StoreError())
	}
}

func (c *Cluster) watchDisk(ctx context.Context) error {
	var syncs func() uint64
	if s, ok := c.opts.Logs.(interface{ Syncs() uint64 }); ok {
		syncs = s.Syncs
	}
	w := newDiskWatchdog(c.opts.DataDir, c.opts.Host, c.log, syncs, c.diskStalled)
	w.intact = c.opts.DataIntact
	w.write = func(path string) error { return c.disk.measure(func() error { return writeAndSync(path) }) }
	err := w.Run(ctx)
	if errors.Is(err, ErrDiskStalled) {
		c.diskHung <- err
	}
	return err
}

func (c *Cluster) diskStalled(stalled bool) {
	c.layer.stalled.Store(stalled)
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
