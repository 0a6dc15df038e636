package cluster

import (
	"errors"
	"fmt"
	"sync"

	"github.com/hashicorp/raft"
)

// A voter that lost its disk has forgotten its votes and what it acknowledged. If it
// came back under its name and voted, it and a voter that lags could elect a leader
// that lacks committed entries. So it is demoted before it is let in again, and votes
// only after it has learned of the demotion.

// disenfranchise makes a voter that comes back with an empty disk a non-voter;
// the placement of voters makes it one again when it has caught up.
func (c *Cluster) disenfranchise(name string) error {
	if name == c.opts.Name {
		return nil // who leads has a disk
	}
	for _, server := range c.Raft().Servers {
		if server.Name == name && server.Voter {
			if err := c.ChangeServer(name, Demote); err != nil {
				return fmt.Errorf("%s comes back with an empty disk, and can't lose its vote: %w", name, err)
			}
			c.log.Warn("a voter came back with an empty disk: it votes again when it has caught up", "node", name)
		}
	}
	return nil
}

var errNoVoteYet = errors.New("this node has just joined: it votes when it has the entry that let it in")

// voterTransport is raft's transport with one rule: it refuses requests for votes
// until this node's log holds the entry that let it in. A candidate needs a log at
// least as long, so from then on every candidate knows too that this node's vote
// does not count.
type voterTransport struct {
	*raft.NetworkTransport
	from    uint64
	running func() *raft.Raft
	passed  chan raft.RPC
	closed  chan struct{}
	once    sync.Once
	done    sync.WaitGroup
}

// Pre-vote is silently off unless the transport offers it, and a node that comes
// back would depose a healthy leader.
var _ raft.WithPreVote = (*voterTransport)(nil)

func newVoterTransport(t *raft.NetworkTransport, from uint64, running func() *raft.Raft) *voterTransport {
	v := &voterTransport{
		NetworkTransport: t, from: from, running: running,
		passed: make(chan raft.RPC), closed: make(chan struct{}),
	}
	v.done.Go(v.pass)
	return v
}

// Consumer gives raft the requests that it may answer.
func (v *voterTransport) Consumer() <-chan raft.RPC { return v.passed }

// Close ends it; raft calls it when it shuts down.
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
