package node

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"

	"google.golang.org/grpc"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/replication"
	"github.com/dsnode/dsnode/storage/journal"
)

func (n *Node) openReplication() (err error) {
	j := n.jobs
	j.replication, err = replication.New(replication.Options{
		Self: n.cfg.Name, Site: n.cfg.Site, Dir: filepath.Join(n.cfg.DataDir, jobsDir), Log: j.log, Table: j.table, Ring: n.keys.Ring,
		Members: j.members, Current: j.current, Retired: j.retired, Deliver: n.storeEntry,
		Dial:     func(node string) (grpc.ClientConnInterface, error) { return n.cluster.Mesh().ClientConn(node) },
		Boottime: j.n.host.Boottime, Logger: n.log, Registerer: n.reg,
	})
	return err
}

// members are the nodes that hold journals, with this one.
func (j *asyncJobs) members() []replication.Member {
	s := j.n.cluster.State()
	if s.Parsed == nil {
		return nil
	}
	patience := j.n.cluster.Timing().Patience
	peers := j.n.cluster.Peers()
	members := make([]replication.Member, 0, len(s.Nodes))
	for name, node := range s.Nodes {
		m := replication.Member{Node: name, Site: node.Site, City: s.Parsed.Sites[node.Site].City, Heard: name == j.n.cfg.Name}
		if p := peers[name]; p.HeardWithin(patience) {
			m.Heard, m.Hears = true, make(map[string]bool, len(p.HeardBy))
			for other := range p.HeardBy {
				m.Hears[other] = p.HearsWithin(patience, other)
			}
		}
		members = append(members, m)
	}
	return members
}

// current reports whether members is up to date: this node follows a leader with a quorum.
func (j *asyncJobs) current() bool {
	raft := j.n.cluster.Raft()
	return raft.Quorum && raft.Ticked && raft.TickAgo < j.n.cluster.Timing().Patience
}

// retired reports whether no node needs the records of a stream any more: its owner has
// dropped it, or it was never agreed on, its origin is no member, and all its jobs have
// ended. (A stream with other jobs is inherited, see node/jobs.)
func (j *asyncJobs) retired(s journal.Stream) bool {
	state, key := j.n.cluster.State(), agreed.StreamKey(s.Origin, s.Incarnation.String())
	if _, agreed := state.Streams[key]; agreed {
		return false
	}
	_, member := state.Nodes[s.Origin]
	if state.ClusterID == "" {
		return false
	}
	return slices.Contains(state.DoneStreams, key) || !member && !j.table.Partial() && j.table.LiveCounts()[s] == 0
}

// jobReplication is a jobs.Replication that also looks at the journals.
type jobReplication struct {
	*replication.Replication
	j *asyncJobs
}

// AwaitCaughtUp waits for the records of other nodes, and then for records that this node's
// own journals lost to damage: without them it is not known which jobs have ended.
func (r jobReplication) AwaitCaughtUp(ctx context.Context) error {
	logged := ""
	for {
		if err := r.Replication.AwaitCaughtUp(ctx); err != nil {
			return err
		}
		damaged := r.j.damaged()
		if damaged == "" {
			return nil
		}
		if damaged != logged {
			logged = damaged
			r.j.n.log.Error("not executing jobs that were accepted before", "reason", damaged)
		}
		select {
		case <-r.j.log.Changed():
		case <-ctx.Done():
			return fmt.Errorf("catch up: %w", ctx.Err())
		}
	}
}

// CaughtUp implements jobs.Replication.
func (r jobReplication) CaughtUp() bool { return r.Standing().CaughtUp }

// manyStreams bounds the agreed streams of a node. With more, a stream counts as spread
// although a member lacks records of it, because a member may be away for any time. That
// member gets rows of the table instead.
const manyStreams = 32

// Spread reports whether every member holds all of a stream.
func (r jobReplication) Spread(s journal.Stream) bool {
	if r.j.table.Partial() {
		return false // jobs that have not ended may be missing
	}
	end, held := r.j.log.End(s)
	if !held || r.HeldByAll(s) >= end.Durable {
		return true
	}
	count := 0
	for _, stream := range r.j.n.cluster.State().Streams {
		if stream.Origin == s.Origin {
			count++
		}
	}
	return count > manyStreams
}
