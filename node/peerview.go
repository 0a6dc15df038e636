package node

import (
	"cmp"
	"context"
	"os"
	"slices"
	"time"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/cluster/clock"
	"github.com/dsnode/dsnode/node/gateway"
	"github.com/dsnode/dsnode/node/upstream"
)

// peerView is what requests and pings read of the node's own health and of
// its peers: made anew a few times a second, so that reading costs one load.
type peerView struct {
	health cluster.Health
	peers  []upstream.Peer // of other sites, nearest knowledge of who lives
	ready  bool            // some upstream in some site is reachable
	// heardSince is when the present unbroken time of hearing each peer began,
	// on clock.Boottime. It is kept whether this node leads or not: a new
	// leader must not take nodes that it has heard all along for newcomers.
	heardSince map[string]time.Duration
}

const lookEvery = 250 * time.Millisecond

func (n *Node) keepLooking(ctx context.Context) error {
	tick := time.NewTimer(0)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			tick.Reset(clock.UntilTick(clock.Boottime(), lookEvery))
			n.look()
		}
	}
}

func (n *Node) look() {
	s := &peerView{
		health:     cluster.Health{PID: os.Getpid(), Draining: n.draining.Load()},
		heardSince: map[string]time.Duration{},
	}
	before, now := n.view.Load().heardSince, clock.Boottime()
	for _, u := range n.fleet.Status() {
		if u.Drained {
			continue // it is nobody's to count on
		}
		s.health.UpstreamsTotal++
		switch {
		case u.Healthy:
			s.health.UpstreamsHealthy++
		case u.Known:
			s.health.UpstreamsDown = append(s.health.UpstreamsDown, u.Name)
		}
	}
	s.ready = s.health.UpstreamsHealthy > 0
	patience, client := n.cluster.Timing().Patience, n.cluster.Mesh().HTTPTransport()
	for name, p := range n.cluster.Peers() {
		if !p.HeardWithin(patience) {
			continue
		}
		s.heardSince[name] = now
		if since, already := before[name]; already {
			s.heardSince[name] = since
		}
		if p.Site == n.cfg.Site {
			continue
		}
		s.ready = s.ready || p.UpstreamsHealthy > 0
		dead := make(map[string]bool, len(p.UpstreamsDown))
		for _, u := range p.UpstreamsDown {
			dead[u] = true
		}
		s.peers = append(s.peers, upstream.Peer{Node: name, Site: p.Site, Client: client, Draining: p.Draining, Dead: dead})
	}
	slices.SortFunc(s.peers, func(a, b upstream.Peer) int { return cmp.Compare(a.Node, b.Node) })
	n.view.Store(s)
}

// Health is what the health endpoints say.
func (n *Node) Health() gateway.Report {
	s := n.cluster.State()
	// A node that has just joined hears of others' upstreams before it has the
	// configuration, and could only refuse.
	ready := s.Parsed != nil && n.view.Load().ready
	r := gateway.Report{Ready: ready, Quorum: n.cluster.Raft().Quorum, Epoch: s.Primary.Epoch}
	if s.Parsed != nil {
		r.Role = s.Parsed.Role(n.cfg.Site, s.Primary.Site)
	}
	r.Lease = n.fence.Acting()
	return r
}
