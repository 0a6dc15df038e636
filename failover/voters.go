package failover

import (
	"context"
	"log/slog"
	"time"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/config"
)

const (
	placeEvery = 500 * time.Millisecond
	// caughtUp is how many entries a non-voter's log may lack: about two seconds of
	// ticks.
	caughtUp = 16
)

// Servers is what Voters needs of the cluster; *cluster.Cluster is one.
type Servers interface {
	State() *agreed.State
	Peers() map[string]cluster.PeerView
	Raft() cluster.RaftView
	Timing() config.Timing
	ChangeServer(name string, change cluster.ServerChange) error
	TransferLeadership(ctx context.Context, to string) error
}

// Voters changes Raft's configuration as PlaceVoters says, while this node leads.
type Voters struct {
	name       string
	servers    Servers
	heardSince func() map[string]time.Duration
	boottime   func() time.Duration
	log        *slog.Logger
}

// NewVoters makes the Voters of a node; Lead runs it. heardSince gives since when,
// on boottime, this node has heard each peer without a gap longer than the patience;
// peers that it does not hear are absent.
func NewVoters(name string, s Servers, heardSince func() map[string]time.Duration, boottime func() time.Duration, log *slog.Logger) *Voters {
	return &Voters{name: name, servers: s, heardSince: heardSince, boottime: boottime, log: log}
}

// Lead makes one change at a time until the leadership ends; for
// cluster.WhileLeader.
func (v *Voters) Lead(ctx context.Context, l cluster.Leadership) error {
	tick := time.NewTicker(placeEvery)
	defer tick.Stop()
	said := PlacementReason("")
	for {
		if s := v.servers.State(); s.Parsed != nil {
			plan, why := PlaceVoters(v.view(s, l))
			if why != said {
				said = why
				v.log.Info("voters", "reason", why, "step", plan.Step, "of", plan.Node)
			}
			if err := v.take(ctx, plan); err != nil && ctx.Err() == nil {
				v.log.Warn("voters not changed", "step", plan.Step, "of", plan.Node, "err", err)
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

func (v *Voters) take(ctx context.Context, p Plan) error {
	switch p.Step {
	case StepAddNonvoter:
		return v.servers.ChangeServer(p.Node, cluster.MakeNonvoter)
	case StepAddVoter:
		return v.servers.ChangeServer(p.Node, cluster.MakeVoter)
	case StepDemote:
		return v.servers.ChangeServer(p.Node, cluster.Demote)
	case StepRemove:
		return v.servers.ChangeServer(p.Node, cluster.RemoveServer)
	case StepMoveLeader:
		return v.servers.TransferLeadership(ctx, p.Node)
	case StepNone:
	}
	return nil
}

// view gathers what PlaceVoters looks at.
func (v *Voters) view(s *agreed.State, l cluster.Leadership) PlacementView {
	now, heardSince := v.boottime(), v.heardSince()
	// A node that is to vote must answer now, not within the patience: a vote given
	// to a node that has just gone silent can cost a cluster of few voters its quorum.
	fresh := 3 * v.servers.Timing().Tick
	raft := v.servers.Raft()
	nodes := map[string]*PlacementNode{}
	for name, m := range s.Nodes {
		_, known := s.Parsed.Sites[m.Site]
		nodes[name] = &PlacementNode{Name: name, Site: m.Site, Leaving: !known}
	}
	for _, server := range raft.Servers {
		p := nodes[server.Name]
		if p == nil {
			p = &PlacementNode{Name: server.Name, Leaving: true}
			nodes[server.Name] = p
		}
		p.InConfig, p.Voter = true, server.Voter
	}
	peers := v.servers.Peers()
	view := PlacementView{Leader: v.name, Primary: s.Primary.Site, Sites: configured(s)}
	for name, p := range nodes {
		peer, known := peers[name]
		since, heard := heardSince[name]
		switch {
		case name == v.name:
			p.AliveFor, p.CaughtUp = now-l.FirstCommit+time.Hour, true // the leader hears itself
		case known && heard:
			p.AliveFor, p.SlowFor = max(now-since, 1), peer.Disk.SlowFor
			p.CaughtUp = peer.HeardWithin(fresh) && peer.AppliedIndex+caughtUp >= raft.CommitIndex
		default:
			// Silence counts from the first commit of this leadership at the earliest.
			p.DeadFor = max(now-l.FirstCommit, 1)
			if known && peer.Heard {
				p.DeadFor = max(min(peer.Ago, p.DeadFor), 1)
			}
		}
		view.Nodes = append(view.Nodes, *p)
	}
	return view
}
