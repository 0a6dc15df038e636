package cluster

import (
	"errors"
	"fmt"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
)

// A voter that lost its disk has lost its votes and the entries that it acknowledged. If
// it rejoined under its name and voted, it and a voter that lags could elect a leader
// without all committed entries. So it is demoted before it is admitted again, and it
// refuses requests for votes until its log has the entry that admitted it.
//
// The same holds when only raft's stores were lost, and the member file was not. Such a node
// is still a member, and learns of a leader by the entries that it gets. It then asks to be
// admitted as if its disk were empty (Cluster.announce), and votes for nobody before.

// noteLostStore notes in the member file that raft's stores are empty although this node
// has run before. One that founds the cluster has bootstrapped them, one that has just
// joined is admitted by an entry after all that it could have lost.
func (c *Cluster) noteLostStore() error {
	c.memberMu.Lock()
	defer c.memberMu.Unlock()
	m := *c.member.Load()
	if m.StoreLost || !c.restarted {
		return nil
	}
	exists, err := raft.HasExistingState(c.opts.Logs, c.opts.Stable, c.opts.Snapshots)
	if err != nil {
		return fmt.Errorf("read raft's stores: %w", err)
	}
	if exists {
		return nil
	}
	c.log.Error("raft's stores are empty, but this node was a member before: it votes for nobody until it is admitted again")
	m.StoreLost = true
	return c.setMember(m)
}

// voteFrom ends what noteLostStore began: the leader has admitted this node by the entry
// index.
func (c *Cluster) voteFrom(index uint64) error {
	c.memberMu.Lock()
	defer c.memberMu.Unlock()
	m := *c.member.Load()
	m.VoteFrom, m.StoreLost = index, false
	if err := c.setMember(m); err != nil {
		return err
	}
	c.votes.from.Store(index)
	c.log.Info("admitted again after the loss of raft's stores", "index", index)
	return nil
}

// setMember needs memberMu.
func (c *Cluster) setMember(m memberFile) error {
	if err := writeMemberFile(c.opts.DataDir, m); err != nil {
		return err
	}
	c.member.Store(&m)
	return nil
}

// demoteRejoiner makes a voter that rejoins with an empty disk a non-voter. The placement
// of voters promotes it again when it has caught up.
func (c *Cluster) demoteRejoiner(name string) error {
	if name == c.opts.Name {
		return nil // this node leads, so it has its log
	}
	for _, server := range c.Raft().Servers {
		if server.Name == name && server.Voter {
			if err := c.ChangeServer(name, Demote); err != nil {
				return fmt.Errorf("%s rejoins with an empty disk and must be demoted first: %w", name, err)
			}
			c.log.Warn("demoted a voter that rejoins with an empty disk", "node", name)
		}
	}
	return nil
}

// noElection is raft's timeout for elections before this node may vote. While it gets its
// log again, the newest configuration there may be one of long ago in which it is the only
// voter. It would elect itself then, without asking anybody, and apply an entry of its own
// where the others have another one, which it would never apply.
const noElection = time.Hour

// allowElections ends noElection when the log has the entry that admitted this node.
func (c *Cluster) allowElections() {
	r := c.raft.Load()
	conf := r.ReloadableConfig()
	if conf.HeartbeatTimeout != noElection || c.votes.tooEarly() {
		return
	}
	conf.HeartbeatTimeout, conf.ElectionTimeout = c.Timing().Heartbeat, c.Timing().Heartbeat
	if err := r.ReloadConfig(conf); err != nil {
		c.log.Error("this node can't take part in elections: restart it", "err", err)
		return
	}
	c.log.Info("takes part in elections again")
}

var errNoVoteYet = errors.New("this node has just joined: it can't vote before it has the entry that admitted it")

var errStandsBack = errors.New("this node's disk is slow: it leaves raft's leadership to others")

// voterTransport is raft's transport, except that it refuses requests for votes until
// this node's log has the entry that admitted it. From then on this node votes only for
// candidates whose logs are at least as long: they have the earlier demotion too, and
// don't count its vote. While this node's disk is slow it also asks for no votes: raft has
// no priorities, but a node that gets no pre-vote stays a follower.
type voterTransport struct {
	*raft.NetworkTransport
	from    atomic.Uint64 // index of the entry that admitted this node; never: not known yet
	running func() *raft.Raft
	yields  func() bool // this node should not become the leader
	passed  chan raft.RPC
	closed  chan struct{}
	once    sync.Once
	done    sync.WaitGroup
}

// If the transport does not implement WithPreVote, raft turns pre-vote off without an
// error, and a node that returns after an outage would depose a healthy leader.
var _ raft.WithPreVote = (*voterTransport)(nil)

// never is above every index.
const never = math.MaxUint64

func newVoterTransport(t *raft.NetworkTransport, from uint64, storeLost bool, running func() *raft.Raft, yields func() bool) *voterTransport {
	v := &voterTransport{
		NetworkTransport: t, running: running, yields: yields,
		passed: make(chan raft.RPC), closed: make(chan struct{}),
	}
	v.from.Store(from)
	if storeLost {
		v.from.Store(never)
	}
	v.done.Go(v.pass)
	return v
}

// Consumer returns the requests that raft may answer.
func (v *voterTransport) Consumer() <-chan raft.RPC { return v.passed }

// Close closes the transport; raft calls it at shutdown.
func (v *voterTransport) Close() error {
	v.once.Do(func() { close(v.closed) })
	err := v.NetworkTransport.Close()
	v.done.Wait()
	return err
}

func (v *voterTransport) pass() {
	requests := v.NetworkTransport.Consumer()
	for {
		select {
		case <-v.closed:
			return
		case rpc := <-requests:
			if v.refuses(rpc) {
				rpc.Respond(nil, errNoVoteYet)
				continue
			}
			select {
			case v.passed <- rpc:
			case <-v.closed:
				return
			}
		}
	}
}

func (v *voterTransport) refuses(rpc raft.RPC) bool {
	switch rpc.Command.(type) {
	case *raft.RequestVoteRequest, *raft.RequestPreVoteRequest, *raft.TimeoutNowRequest:
		return v.tooEarly()
	}
	return false
}

// tooEarly reports whether this node's log lacks the entry that admitted it.
func (v *voterTransport) tooEarly() bool {
	r := v.running()
	return r == nil || r.LastIndex() < v.from.Load()
}

// RequestVote asks for a vote for this node. Until it may vote it may not lead either: a
// voter that lags could elect it.
func (v *voterTransport) RequestVote(id raft.ServerID, target raft.ServerAddress, args *raft.RequestVoteRequest, resp *raft.RequestVoteResponse) error {
	if v.tooEarly() {
		return errNoVoteYet
	}
	return v.NetworkTransport.RequestVote(id, target, args, resp)
}

// RequestPreVote is the same for a pre-vote. It also refuses while this node's disk is slow.
// A leadership transfer to this node needs no pre-vote: who transfers to it knows of its disk.
func (v *voterTransport) RequestPreVote(id raft.ServerID, target raft.ServerAddress, args *raft.RequestPreVoteRequest, resp *raft.RequestPreVoteResponse) error {
	if v.yields() {
		return errStandsBack
	}
	if v.tooEarly() {
		return errNoVoteYet
	}
	return v.NetworkTransport.RequestPreVote(id, target, args, resp)
}
