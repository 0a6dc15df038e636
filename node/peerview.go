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

// peerView is what requests and pings read about this node's own health and about its
// peers. It is made anew every viewInterval, so that reading it is one atomic load.
type peerView struct {
	health cluster.Health
	peers  []upstream.Peer // living nodes of other sites, by name
	ready  bool            // some upstream of some site is healthy
	// heardSince has the living peers, each with the time on clock.Boottime since which
	// it has been heard without a break. Every node keeps it, so that a new leader knows
	// for how long it has heard a node.
	heardSince map[string]time.Duration
}

const viewInterval = 250 * time.Millisecond

func (n *Node) keepViewFresh(ctx context.Context) error {
	tick := time.NewTimer(0)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			tick.Reset(clock.UntilTick(clock.Boottime(), viewInterval))
			n.updateView()
		}
	}
}

func (n *Node) updateView() {
	v := &peerView{
		health:     cluster.Health{PID: os.Getpid(), Draining: n.draining.Load(), JobsMissing: n.jobs.Missing()},
		heardSince: map[string]time.Duration{},
	}
	before, now := n.view.Load().heardSince, clock.Boottime()
	for _, u := range n.fleet.Status() {
		if u.Drained {
			continue // it gets no requests, so it does not count as capacity
		}
		v.health.UpstreamsTotal++
		switch {
		case u.Healthy:
			v.health.UpstreamsHealthy++
		case u.Known:
			v.health.UpstreamsDown = append(v.health.UpstreamsDown, u.Name)
		}
	}
	v.ready = v.health.UpstreamsHealthy > 0
	patience := n.cluster.Timing().Patience
	for name, p := range n.cluster.Peers() {
		if !p.HeardWithin(patience) {
			continue
		}
		v.heardSince[name] = now
		if since, known := before[name]; known {
			v.heardSince[name] = since
		}
		if p.Site == n.cfg.Site {
			continue
		}
		v.ready = v.ready || p.UpstreamsHealthy > 0
		v.peers = append(v.peers, n.upstreamPeer(name, p))
	}
	slices.SortFunc(v.peers, func(a, b upstream.Peer) int { return cmp.Compare(a.Node, b.Node) })
	n.view.Store(v)
}

func (n *Node) upstreamPeer(name string, p cluster.PeerView) upstream.Peer {
	dead := make(map[string]bool, len(p.UpstreamsDown))
	for _, u := range p.UpstreamsDown {
		dead[u] = true
	}
	return upstream.Peer{Node: name, Site: p.Site, Client: n.cluster.Mesh().HTTPTransport(), Draining: p.Draining, Dead: dead}
}

// ownHealth is what this node tells its peers about itself.
func (n *Node) ownHealth() cluster.Health { return n.view.Load().health }

// Health implements gateway.Health.
func (n *Node) Health() gateway.Report {
	s := n.cluster.State()
	// A node that has just joined knows the upstreams of its peers before it has the
	// configuration, and could only refuse requests.
	ready := s.Parsed != nil && n.view.Load().ready
	r := gateway.Report{Ready: ready, Quorum: n.cluster.Raft().Quorum, Epoch: s.Primary.Epoch}
	if s.Parsed != nil {
		r.Role = s.Parsed.Role(n.cfg.Site, s.Primary.Site)
	}
	r.Lease = n.fence.Acting()
	return r
}
