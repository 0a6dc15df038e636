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
	// heardSince has the living peers, each with the time on the host's Boottime since which
	// it has been heard without a break. Every node keeps it, so that a new leader knows
	// for how long it has heard a node.
	heardSince map[string]time.Duration
	problemsAt time.Duration // when health.Problems was made (Boottime)
}

const (
	viewInterval = 250 * time.Millisecond
	// problemsEvery is how often the node looks for what is wrong with itself, which
	// reads the ends of all its journals and the free space of its disk.
	problemsEvery = time.Second
	// trafficSlack is how much longer than the patience a kind of traffic other than pings
	// may be without an answer, because it is sent less often: large requests every 2 s,
	// with 1 s for the answer and then another attempt. A status shows a fault within the
	// patience + 2 s.
	trafficSlack = 1500 * time.Millisecond
)

func (n *Node) keepViewFresh(ctx context.Context) error {
	tick := time.NewTimer(0)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			tick.Reset(clock.UntilTick(n.host.Boottime(), viewInterval))
			n.updateView()
		}
	}
}

func (n *Node) updateView() {
	v := &peerView{
		health:     cluster.Health{PID: os.Getpid(), Draining: n.draining.Load(), Starting: n.starting() != "", JobsMissing: n.jobs.Missing()},
		heardSince: map[string]time.Duration{},
	}
	old, now := n.view.Load(), n.host.Boottime()
	before := old.heardSince
	v.health.Problems, v.problemsAt = old.health.Problems, old.problemsAt
	if v.problemsAt == 0 || now-v.problemsAt >= problemsEvery {
		v.health.Problems, v.problemsAt = n.problems(), now
	}
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
		replicated, ever := n.jobs.replication.AnsweredAgo(name)
		if !ever {
			replicated = p.HeardFor
		}
		v.health.Blocked = append(v.health.Blocked, blocked(p, replicated, patience+trafficSlack)...)
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
	slices.SortFunc(v.health.Blocked, func(a, b cluster.Blocked) int {
		return cmp.Or(cmp.Compare(a.Node, b.Node), cmp.Compare(a.Kind, b.Kind))
	})
	n.view.Store(v)
}

// blocked lists the traffic with a peer that is heard, other than pings, that has not gone
// through for a time. A peer that has just been heard has that time to answer.
func blocked(p cluster.PeerView, replicated, limit time.Duration) []cluster.Blocked {
	var list []cluster.Blocked
	for _, kind := range []struct {
		name cluster.Traffic
		ago  time.Duration
	}{
		{cluster.TrafficLarge, p.LargeAgo},
		{cluster.TrafficGossip, p.UDPAgo},
		{cluster.TrafficReplication, min(replicated, p.HeardFor)},
	} {
		if kind.name == cluster.TrafficGossip && p.Via != "" {
			continue // gossip uses no tunnel, and the status shows that the direct path is cut
		}
		if kind.ago >= limit {
			list = append(list, cluster.Blocked{Node: p.Name, Kind: kind.name, For: kind.ago})
		}
	}
	return list
}

// problems says what is wrong with this node itself, for its peers' statuses.
func (n *Node) problems() []string {
	var problems []string
	if p := n.cluster.LeftBehind(); p != "" {
		problems = append(problems, p)
	}
	if p := n.keys.Problem(); p != "" {
		problems = append(problems, p)
	}
	return append(problems, n.jobs.Problems()...)
}

func (n *Node) upstreamPeer(name string, p cluster.PeerView) upstream.Peer {
	dead := make(map[string]bool, len(p.UpstreamsDown))
	for _, u := range p.UpstreamsDown {
		dead[u] = true
	}
	return upstream.Peer{Node: name, Site: p.Site, Client: n.cluster.Mesh().HTTPTransport(), Draining: p.Draining, Dead: dead}
}

// ownHealth is what this node tells its peers about itself.
func (n *Node) ownHealth() cluster.Health {
	h := n.view.Load().health
	if st, begun := n.jobs.service.Writes(); begun {
		if end, held := n.jobs.log.End(st); held {
			h.Journal, h.JournalEnd = keyOf(st), end.Durable
		}
	}
	return h
}

// Health implements gateway.Health.
func (n *Node) Health() gateway.Report {
	if n.cluster.RemovedError() != nil {
		return gateway.Report{}
	}
	s := n.cluster.State()
	// A node that has just joined knows the upstreams of its peers before it has the
	// configuration, and could only refuse requests.
	ready := s.Parsed != nil && n.view.Load().ready
	r := gateway.Report{Ready: ready, Quorum: n.cluster.Raft().Quorum, Epoch: s.Primary.Epoch}
	if s.Parsed != nil {
		r.Role = s.Parsed.Role(n.cfg.Site, s.Primary.Site)
	}
	r.Acting = n.fence.Acting()
	return r
}
