package cluster

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"

	"github.com/dsnode/dsnode/cluster/clock"
)

const (
	// A tick each 250 ms is 14,400 entries an hour: a snapshot about every half
	// hour, and a log that is read in well under a second at start. The log
	// reaches back beyond the snapshot before, which is the one to use should the
	// newest be damaged.
	snapshotThreshold = 8192
	trailingLogs      = 10240
	maxAppendEntries  = 256
	raftPool          = 3
)

func (c *Cluster) raftConfig() *raft.Config {
	conf := raft.DefaultConfig()
	conf.LocalID = raft.ServerID(c.opts.Name)
	conf.HeartbeatTimeout = c.Timing().Heartbeat
	conf.ElectionTimeout = c.Timing().Heartbeat
	conf.LeaderLeaseTimeout = c.Timing().Heartbeat
	// A tick does this after each commit and four times a second anyway.
	conf.CommitTimeout = c.Timing().Tick
	conf.SnapshotThreshold = snapshotThreshold
	conf.SnapshotInterval = time.Minute
	conf.TrailingLogs = trailingLogs
	conf.MaxAppendEntries = maxAppendEntries
	conf.ShutdownOnRemove = false
	conf.NoLegacyTelemetry = true
	conf.Logger = newRaftLogger(c.log)
	// A node that starts without a quorum then serves from what was agreed, not
	// from its newest snapshot.
	_, conf.RestoreCommittedLogs = c.opts.Logs.(raft.CommitTrackingLogStore)
	return conf
}

// startRaft runs raft on what the stores hold. The id and the address of a
// server are both the node's name: addresses change, and the mesh looks them up
// at each dial.
func (c *Cluster) startRaft() (*raft.Raft, error) {
	transport := raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{
		Stream: c.layer, MaxPool: raftPool, Timeout: c.Timing().Transport, Logger: newRaftLogger(c.log),
		// More can wedge a follower for ever after one rejected append
		// (hashicorp/raft #612).
		MaxRPCsInFlight: 1,
	})
	if err := c.foundRaft(transport); err != nil {
		return nil, errors.Join(err, transport.Close())
	}
	voter := newVoterTransport(transport, c.member.Load().VoteFrom, c.raft.Load)
	r, err := raft.NewRaft(c.raftConfig(), c.fsm, newRestoredLog(c.opts.Logs, c.opts.Snapshots), c.opts.Stable, c.opts.Snapshots, voter)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start raft: %w", err), voter.Close())
	}
	c.raft.Store(r)
	return r, nil
}

// foundRaft writes the first configuration, with this node as its only voter,
// into the stores of a cluster that is just being founded.
func (c *Cluster) foundRaft(transport raft.Transport) error {
	if !c.member.Load().Founder {
		return nil
	}
	exists, err := raft.HasExistingState(c.opts.Logs, c.opts.Stable, c.opts.Snapshots)
	if err != nil {
		return fmt.Errorf("look into raft's stores: %w", err)
	}
	if exists {
		return nil
	}
	self := raft.Server{ID: raft.ServerID(c.opts.Name), Address: raft.ServerAddress(c.opts.Name)}
	err = raft.BootstrapCluster(c.raftConfig(), c.opts.Logs, c.opts.Stable, c.opts.Snapshots, transport,
		raft.Configuration{Servers: []raft.Server{self}})
	if err != nil {
		return fmt.Errorf("bootstrap raft: %w", err)
	}
	return nil
}

// leader is whom this node takes for the raft leader, empty for nobody.
func (c *Cluster) leader() (name string, term uint64) {
	r := c.raft.Load()
	if r == nil {
		return "", 0
	}
	_, id := r.LeaderWithID()
	return string(id), r.CurrentTerm()
}

func (c *Cluster) lastIndex() uint64 {
	if r := c.raft.Load(); r != nil {
		return r.LastIndex()
	}
	return 0
}

// Server is a member of raft's own configuration.
type Server struct {
	Name  string
	Voter bool
}

// RaftView is what this node knows of raft now.
type RaftView struct {
	Leader      string // empty: none known
	Leads       bool   // this node is it
	Term        uint64
	CommitIndex uint64
	LastIndex   uint64
	Applied     uint64
	Servers     []Server
	// Quorum says that a quorum was alive within the lease; Since is when that
	// began, or when it was lost. A zero Since means that it was never known.
	Quorum bool
	Since  time.Time
	// Ticked says that this node applied a tick of a leader since its start, and
	// TickAgo how long ago the newest was: how old at least what it knows of the
	// agreed state may be. The lease tells nothing of that, it goes by other ways.
	Ticked  bool
	TickAgo time.Duration
	// Epoch is the highest heard of; above the agreed state's, that is old.
	Epoch uint64
}

// Raft gives a RaftView; the zero one before this node is a member.
func (c *Cluster) Raft() RaftView {
	r := c.raft.Load()
	if r == nil {
		return RaftView{}
	}
	v := RaftView{
		CommitIndex: r.CommitIndex(), LastIndex: r.LastIndex(), Applied: c.fsm.applied.Load(),
		Leads: r.State() == raft.Leader,
	}
	v.Leader, v.Term = c.leader()
	if f := r.GetConfiguration(); f.Error() == nil {
		for _, s := range f.Configuration().Servers {
			v.Servers = append(v.Servers, Server{Name: string(s.ID), Voter: s.Suffrage == raft.Voter})
		}
	}
	ok, since := c.lease.quorum()
	v.Quorum = ok
	_, v.Epoch = c.Lease()
	if ticked := c.fsm.ticked.Load(); ticked != 0 {
		v.Ticked, v.TickAgo = true, clock.Boottime()-time.Duration(ticked)
	}
	if c.lease.everHeld() {
		v.Since = time.Now().Add(since - clock.Boottime())
	}
	return v
}

// serverTimeout bounds the start of a change of raft's configuration.
const serverTimeout = 5 * time.Second

// ChangeServer makes one change of raft's configuration. Only the leader can.
func (c *Cluster) ChangeServer(name string, change ServerChange) error {
	r := c.raft.Load()
	if r == nil {
		return ErrNotMember
	}
	id, addr := raft.ServerID(name), raft.ServerAddress(name)
	var f raft.IndexFuture
	switch change {
	case MakeVoter:
		f = r.AddVoter(id, addr, 0, serverTimeout)
	case MakeNonvoter:
		f = r.AddNonvoter(id, addr, 0, serverTimeout)
	case Demote:
		f = r.DemoteVoter(id, 0, serverTimeout)
	case RemoveServer:
		f = r.RemoveServer(id, 0, serverTimeout)
	default:
		return fmt.Errorf("change server %s: unknown change %q", name, change)
	}
	if err := f.Error(); err != nil {
		return fmt.Errorf("%s %s: %w", change, name, translate(err))
	}
	return nil
}

// ServerChange is a step of raft's configuration.
type ServerChange string

// The steps.
const (
	MakeVoter    ServerChange = "make voter"
	MakeNonvoter ServerChange = "make non-voter"
	Demote       ServerChange = "demote"
	RemoveServer ServerChange = "remove"
)

// translate maps raft's errors to this package's.
func translate(err error) error {
	switch {
	case errors.Is(err, raft.ErrNotLeader), errors.Is(err, raft.ErrLeadershipTransferInProgress):
		return fmt.Errorf("%w (%w)", ErrNotLeader, err)
	case errors.Is(err, raft.ErrLeadershipLost), errors.Is(err, raft.ErrAbortedByRestore):
		return fmt.Errorf("%w (%w)", ErrLeadershipMoved, err)
	case errors.Is(err, raft.ErrRaftShutdown):
		return fmt.Errorf("%w (%w)", ErrStopped, err)
	case errors.Is(err, raft.ErrEnqueueTimeout):
		return fmt.Errorf("%w: raft takes no more work (%w)", ErrNoQuorum, err)
	}
	return err
}

// gatedLayer is raft's stream layer with a gate that the disk watchdog shuts,
// and with dials that wait for a peer that is away.
type gatedLayer struct {
	raft.StreamLayer
	living context.Context
	hold   func(ctx context.Context, node string)
	closed atomic.Bool

	mu    sync.Mutex // guards holds
	holds map[string]int
}

// maxHolds is how many dials to one peer wait: raft's leader has one goroutine
// for entries and one for heartbeats of each peer.
const maxHolds = 2

func newGatedLayer(living context.Context, l raft.StreamLayer, hold func(context.Context, string)) *gatedLayer {
	return &gatedLayer{StreamLayer: l, living: living, hold: hold, holds: map[string]int{}}
}

func (l *gatedLayer) shut(closed bool) { l.closed.Store(closed) }

// Dial waits while the peer is known to be away, and then dials. raft backs off
// up to 10 s after failed attempts, so a dial that fails at once makes a peer
// that was away for half a minute wait that long for its entries; one that
// waits is through as soon as the peer is heard.
func (l *gatedLayer) Dial(address raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	if l.closed.Load() {
		return nil, ErrDiskStalled
	}
	if l.take(string(address)) {
		l.hold(l.living, string(address))
		l.release(string(address))
	}
	if l.closed.Load() {
		return nil, ErrDiskStalled
	}
	if l.living.Err() != nil {
		return nil, ErrStopped
	}
	return l.StreamLayer.Dial(address, timeout)
}

func (l *gatedLayer) take(node string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.holds[node] >= maxHolds {
		return false
	}
	l.holds[node]++
	return true
}

func (l *gatedLayer) release(node string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.holds[node]--; l.holds[node] == 0 {
		delete(l.holds, node)
	}
}

// Accept drops connections while the gate is shut.
func (l *gatedLayer) Accept() (net.Conn, error) {
	for {
		conn, err := l.StreamLayer.Accept()
		if err != nil || !l.closed.Load() {
			return conn, err
		}
		_ = conn.Close() // it is refused; nothing was said on it
	}
}

// holdDial blocks while this node leads and the peer does not answer pings.
func (c *Cluster) holdDial(ctx context.Context, node string) {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		r := c.raft.Load()
		a, heard := c.peers.get(node)
		if r == nil || r.State() != raft.Leader || !c.knows(node) || !heard || clock.Boottime()-a.sent < 2*c.Timing().Tick+pingTimeout {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}
