package node

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/dsnode/dsnode/failover"
	"github.com/dsnode/dsnode/node/jobs"
)

// A process that has just started holds a lease after a moment, since peers pass leases on.
// But its copy of the agreed state may be from before the start, with voters and owners of
// that time, and it can't act as primary yet. An operator who restarts nodes one by one
// waits for a healthy status before the next, so the status is not healthy before the node
// could stand in for the next one.

// startView is all that lacks looks at.
type startView struct {
	Ticked             bool   // it has an entry of the raft leader from after its start
	Applied, Committed uint64 // the newest entry in its agreed state, and in that of a peer
	// FenceWait is for how long it may not act as primary because it has just started.
	FenceWait  time.Duration
	FenceKnown bool
	JobsLoaded bool
	Lacking    []string // living nodes whose jobs it has not followed to their end
	// HadVote: it was a voter before its start. Voters is how many there are, MostVoters how
	// many there could be with the nodes that are heard.
	HadVote            bool
	Voters, MostVoters int
	Running            time.Duration // since its start
}

// mayLack is how many entries a node that has caught up may be behind its peers: they are
// on their way.
const mayLack = 16

// lacks says what a node has not caught up with since its start; empty: nothing. It is pure.
func (v startView) lacks() string {
	switch {
	case !v.Ticked:
		return "it has received nothing from the raft leader yet, so its copy of the agreed state may be old"
	case v.Applied+mayLack < v.Committed:
		return fmt.Sprintf("its copy of the agreed state is at entry %d, that of a peer at %d", v.Applied, v.Committed)
	case !v.JobsLoaded:
		return "its job table is not loaded yet"
	case len(v.Lacking) > 0:
		return "it has not yet all jobs of " + strings.Join(v.Lacking, ", ")
	case v.HadVote && v.Voters < v.MostVoters && v.Running < failover.VoteReturnsWithin:
		// Those who stop the next nodes count on as many votes as before. That this node has
		// its own again is not enough: of four voters only one may be lost.
		return fmt.Sprintf("voters were replaced while it was away, and %d of %d are placed", v.Voters, v.MostVoters)
	case !v.FenceKnown:
		return "it does not know the primary yet"
	case v.FenceWait > 0:
		return fmt.Sprintf("it may not act as primary for another %.1f s, until leases from before its start have ended", v.FenceWait.Seconds())
	}
	return ""
}

// starting says what this node has not caught up with since its start; empty: it has caught
// up with everything once.
func (n *Node) starting() string {
	if n.started.Load() {
		return ""
	}
	lacks := n.startView().lacks()
	if lacks == "" && !n.started.Swap(true) {
		n.log.Info("caught up since the start")
	}
	return lacks
}

func (n *Node) startView() startView {
	raft := n.cluster.Raft()
	v := startView{Ticked: raft.Ticked, Applied: raft.AppliedIndex}
	patience := n.cluster.Timing().Patience
	perSite := map[string]int{n.cfg.Site: 1}
	for _, p := range n.cluster.Peers() {
		if p.HeardWithin(patience) {
			v.Committed = max(v.Committed, p.AppliedIndex)
			perSite[p.Site]++
		}
	}
	v.HadVote, v.MostVoters = n.cluster.HadVote(), failover.MostVoters(perSite)
	for _, s := range raft.Servers {
		if s.Voter {
			v.Voters++
		}
	}
	v.Running = time.Since(n.cluster.StartedAt())
	v.FenceWait, v.FenceKnown = n.fence.StartWait()
	_, err := n.jobs.service.Counts()
	v.JobsLoaded = !errors.Is(err, jobs.ErrNotReady)
	v.Lacking = n.jobs.replication.NotFollowed()
	slices.Sort(v.Lacking)
	return v
}
