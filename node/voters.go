package node

import (
	"context"
	"time"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/clock"
	"github.com/dsnode/dsnode/failover"
)

const (
	placeEvery = 500 * time.Millisecond
	// caughtUp is how many entries a non-voter's log may lack: about two
	// seconds of ticks.
	caughtUp = 16
)

// placeVoters keeps raft's configuration as it should be, one step at a time,
// while this node leads.
func (n *Node) placeVoters(ctx context.Context, l cluster.Leadership) error {
	tick := time.NewTicker(placeEvery)
	defer tick.Stop()
	said := failover.PlacementReason("")
	for {
		if s := n.cluster.State(); s.Parsed != nil {
			plan, why := failover.PlaceVoters(n.placement(s, l))
			if why != said {
				said = why
				n.log.Info("voters", "reason", why, "step", plan.Step, "of", plan.Node)
			}
			if err := n.placeStep(ctx, plan); err != nil && ctx.Err() == nil {
				n.log.Warn("voters not changed", "step", plan.Step, "of", plan.Node, "err", err)
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

func (n *Node) placeStep(ctx context.Context, p failover.Plan) error {
	switch p.Step {
	case failover.StepAddNonvoter:
		return n.cluster.ChangeServer(p.Node, cluster.MakeNonvoter)
	case failover.StepAddVoter:
		return n.cluster.ChangeServer(p.Node, cluster.MakeVoter)
	case failover.StepDemote:
		return n.cluster.ChangeServer(p.Node, cluster.Demote)
	case failover.StepRemove:
		return n.cluster.ChangeServer(p.Node, cluster.RemoveServer)
	case failover.StepMoveLeader:
		return n.cluster.TransferLeadership(ctx, p.Node)
	}
	return nil
}

// placement is what PlaceVoters looks at.
func (n *Node) placement(s *agreed.State, l cluster.Leadership) failover.PlacementView {
	now, heardSince := clock.Boottime(), n.surround.Load().heardSince
	// One that votes must answer now, not within the patience: a vote given to a
	// node that has just gone silent can cost a young cluster its quorum.
	fresh := 3 * n.cluster.Timing().Tick
	raft := n.cluster.Raft()
	v := failover.PlacementView{Leader: n.cfg.Name}
	for name, site := range s.Parsed.Sites {
		v.Sites = append(v.Sites, failover.PlacementSite{Name: name, City: site.City, Priority: site.Priority})
	}
	nodes := map[string]*failover.PlacementNode{}
	for name, m := range s.Nodes {
		_, known := s.Parsed.Sites[m.Site]
		nodes[name] = &failover.PlacementNode{Name: name, Site: m.Site, Leaving: !known}
	}
	for _, server := range raft.Servers {
		p := nodes[server.Name]
		if p == nil {
			p = &failover.PlacementNode{Name: server.Name, Leaving: true}
			nodes[server.Name] = p
		}
		p.InConfig, p.Voter = true, server.Voter
	}
	peers := n.cluster.Peers()
	for name, p := range nodes {
		peer, known := peers[name]
		since, heard := heardSince[name]
		switch {
		case name == n.cfg.Name:
			p.AliveFor, p.CaughtUp = now-l.FirstCommit+time.Hour, true // the leader hears itself
		case known && heard:
			p.AliveFor = max(now-since, 1)
			p.CaughtUp = peer.Ago < fresh && peer.AppliedIndex+caughtUp >= raft.CommitIndex
		default:
			// Before this leader's time it heard from nobody as leader.
			p.DeadFor = max(now-l.FirstCommit, 1)
			if known && peer.Heard {
				p.DeadFor = max(min(peer.Ago, p.DeadFor), 1)
			}
		}
		v.Nodes = append(v.Nodes, *p)
	}
	return v
}
