package cluster

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/hashicorp/raft"
)

const (
	// A tick each 250 ms is 14,400 entries an hour: a snapshot about every half
	// hour, and a log that is read in well under a second at start. The log
	// reaches back beyond the previous snapshot, which is used if the newest one is
	// damaged.
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
	// CommitTimeout need not be short: a tick follows each commit, see commit.
	conf.CommitTimeout = c.Timing().Tick
	conf.SnapshotThreshold = snapshotThreshold
	conf.SnapshotInterval = time.Minute
	conf.TrailingLogs = trailingLogs
	conf.MaxAppendEntries = maxAppendEntries
	conf.ShutdownOnRemove = false
	conf.NoLegacyTelemetry = true
	conf.Logger = newRaftLogger(c.log)
	// So a node that starts without a quorum uses all committed entries of its log, not
	// only its newest snapshot.
	_, conf.RestoreCommittedLogs = c.opts.Logs.(raft.CommitTrackingLogStore)
	return conf
}

// startRaft starts raft with the content of the stores. A server's id and address are
// both the node's name: addresses change, and the mesh looks them up at each dial.
func (c *Cluster) startRaft() (*raft.Raft, error) {
	transport := raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{
		Stream: c.layer, MaxPool: raftPool, Timeout: c.Timing().Transport, Logger: newRaftLogger(c.log),
		// With more, a follower can reject all appends for ever after rejecting one
		// (hashicorp/raft #612).
		MaxRPCsInFlight: 1,
	})
	if err := c.bootstrapRaft(transport); err != nil {
		return nil, errors.Join(err, transport.Close())
	}
	if err := c.noteLostStore(); err != nil {
		return nil, errors.Join(err, transport.Close())
	}
	last, err := c.opts.Logs.LastIndex()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("read raft's log: %w", err), transport.Close())
	}
	c.fsm.logged = last
	m := c.member.Load()
	voter := newVoterTransport(transport, m.VoteFrom, m.StoreLost, c.raft.Load, c.standsBack)
	c.votes = voter
	conf := c.raftConfig()
	if last < voter.from.Load() {
		conf.HeartbeatTimeout, conf.ElectionTimeout = noElection, noElection
	}
	r, err := raft.NewRaft(conf, c.fsm, newTimedLog(newRestoredLog(c.opts.Logs, c.opts.Snapshots), c.disk), c.opts.Stable, c.opts.Snapshots, voter)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start raft: %w", err), voter.Close())
	}
	c.transport.Store(transport)
	// A founder has just made itself a voter, so it keeps its vote.
	c.hadVote.Store(slices.ContainsFunc(r.GetConfiguration().Configuration().Servers, func(s raft.Server) bool {
		return s.ID == raft.ServerID(c.opts.Name) && s.Suffrage == raft.Voter
	}))
	c.raft.Store(r)
	return r, nil
}

// bootstrapRaft writes the first raft configuration, with this node as the only voter,
// if this node founds the cluster and its stores are empty.
func (c *Cluster) bootstrapRaft(transport raft.Transport) error {
	if !c.member.Load().Founder {
		return nil
	}
	exists, err := raft.HasExistingState(c.opts.Logs, c.opts.Stable, c.opts.Snapshots)
	if err != nil {
		return fmt.Errorf("read raft's stores: %w", err)
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

// leader is the raft leader that this node knows, empty for none, and the term.
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

// RaftView is raft's current state on this node.
type RaftView struct {
	Leader      string // empty: none known
	Leads       bool   // this node is the leader
	Term        uint64
	CommitIndex uint64
	// AppliedIndex is the newest entry that the agreed state contains.
	AppliedIndex uint64
	Servers      []Server
	// Quorum says whether this node holds a lease, which proves a quorum; Since is when
	// that began or ended. A zero Since means that there was no lease yet.
	Quorum bool
	Since  time.Time
	// Ticked says whether this node has applied a leader's tick that was not in its log
	// at its start, and TickAgo how long ago the newest one was: its agreed state may be that old. The
	// lease does not show this, because it may come from another node.
	Ticked  bool
	TickAgo time.Duration
	// Epoch is the highest epoch that this node has learned of. If it is above that of
	// the agreed state, the agreed state is out of date.
	Epoch uint64
}

// Raft returns a RaftView; the zero one before this node is a member.
func (c *Cluster) Raft() RaftView {
	r := c.raft.Load()
	if r == nil {
		return RaftView{}
	}
	v := RaftView{CommitIndex: r.CommitIndex(), AppliedIndex: c.fsm.applied.Load(), Leads: r.State() == raft.Leader}
	v.Leader, v.Term = c.leader()
	if f := r.GetConfiguration(); f.Error() == nil {
		for _, s := range f.Configuration().Servers {
			v.Servers = append(v.Servers, Server{Name: string(s.ID), Voter: s.Suffrage == raft.Voter})
		}
	}
	quorum, since := c.lease.quorum()
	v.Quorum = quorum
	_, v.Epoch = c.Lease()
	if ticked := c.fsm.ticked.Load(); ticked != 0 {
		v.Ticked, v.TickAgo = true, c.opts.Host.Boottime()-time.Duration(ticked)
	}
	if c.lease.everHeld() {
		v.Since = c.opts.Host.Now().Add(since - c.opts.Host.Boottime())
	}
	return v
}

// StateBytes is the size of the agreed state as in a snapshot.
func (c *Cluster) StateBytes() int { return c.fsm.size() }

// AgreedAge is how old this node's copy of the agreed state may be: how long ago it got the
// newest tick of a leader. Until it gets the first one after its start, the newest in its
// own log counts, by the wall clocks of that leader and of this node. known is false if
// there is none. AgreedAge is cheap: it is called for requests.
func (c *Cluster) AgreedAge() (age time.Duration, known bool) {
	if ticked := c.fsm.ticked.Load(); ticked != 0 {
		return c.opts.Host.Boottime() - time.Duration(ticked), true
	}
	if at := c.fsm.tickAt.Load(); at != 0 {
		return max(0, c.opts.Host.Now().Sub(time.Unix(0, at))), true
	}
	return 0, false
}

// HadVote reports whether this node was a voter as far as its log told at the start.
func (c *Cluster) HadVote() bool { return c.hadVote.Load() }

// serverTimeout bounds how long a change of raft's configuration waits to start.
const serverTimeout = 5 * time.Second

// ChangeServer changes a server in raft's configuration. It works only on the leader.
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

// ServerChange is a change of a server in raft's configuration.
type ServerChange string

// The changes.
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
		return fmt.Errorf("%w: raft's queue is full (%w)", ErrNoQuorum, err)
	}
	return err
}
