package cluster

import (
	"errors"
	"fmt"
	"sync"

	"github.com/hashicorp/raft"
)

// A voter that lost its disk has lost its votes and the entries that it acknowledged. If
// it rejoined under its name and voted, it and a voter that lags could elect a leader
// without all committed entries. So it is demoted before it is admitted again, and it
// refuses requests for votes until its log has the entry that admitted it.

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

var errNoVoteYet = errors.New("this node has just joined: it can't vote before it has the entry that admitted it")

var errStandsBack = errors.New("this node's disk is slow: it leaves raft's leadership to others")

// voterTransport is raft's transport, except that it refuses requests for votes until
// this node's log has the entry that admitted it. From then on this node votes only for
// candidates whose logs are at least as long: they have the earlier demotion too, and
// don't count its vote. While this node's disk is slow it also asks for no votes: raft has
// no priorities, but a node that gets no pre-vote stays a follower.
type voterTransport struct {
	*raft.NetworkTransport
	from    uint64 // index of the entry that admitted this node
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

func newVoterTransport(t *raft.NetworkTransport, from uint64, running func() *raft.Raft, yields func() bool) *voterTransport {
	v := &voterTransport{
		NetworkTransport: t, from: from, running: running, yields: yields,
		passed: make(chan raft.RPC), closed: make(chan struct{}),
	}
	v.done.Go(v.pass)
	return v
}

// RequestPreVote implements raft.WithPreVote. A leadership transfer to this node needs no
// pre-vote: who transfers to it knows of its disk.
func (v *voterTransport) RequestPreVote(id raft.ServerID, to raft.ServerAddress, args *raft.RequestPreVoteRequest, resp *raft.RequestPreVoteResponse) error {
	if v.yields() {
		return errStandsBack
	}
	return v.NetworkTransport.RequestPreVote(id, to, args, resp)
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
	case *raft.RequestVoteRequest, *raft.RequestPreVoteRequest:
		r := v.running()
		return r == nil || r.LastIndex() < v.from
	}
	return false
}
