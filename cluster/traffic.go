package cluster

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/dsnode/dsnode/cluster/clock"
	"github.com/dsnode/dsnode/cluster/clusterpb"
	"github.com/dsnode/dsnode/cluster/mesh"
)

// Traffic is a kind of traffic between two nodes. Each uses packets or connections of
// its own, so one can be blocked while the others go through.
type Traffic string

// The kinds. Raft has none: a peer that its leader's entries don't reach is
// PeerView.Stuck, and every node sees that.
const (
	// TrafficPing is small messages: leases and all failover decisions use them.
	TrafficPing Traffic = "ping"
	// TrafficLarge is requests that fill whole packets, as forwarded client requests
	// do, on their connections.
	TrafficLarge Traffic = "large"
	// TrafficGossip is gossip's UDP packets.
	TrafficGossip Traffic = "gossip"
	// TrafficReplication is job records and answers about them.
	TrafficReplication Traffic = "replication"
)

// Blocked is a kind of traffic that has not gone through between the node that reports it
// and another one, which it hears.
type Blocked struct {
	Node string
	Kind Traffic
	For  time.Duration // how long ago it last went through
}

// Bounds of what a ping's answer tells about its sender's troubles. With them an answer
// still fits in a small packet in a cluster of a few nodes, so that it arrives where
// large packets are dropped.
const (
	maxProblemBytes = 600 // of all sentences together
	maxBlockedSent  = 64
)

// largeEvery is how often a large request is sent to each peer. It costs 8 KiB and
// about 0.3 ms of CPU time at both ends together.
const largeEvery = 2 * time.Second

// sentTimes is when the newest large request that a peer answered was sent (Boottime).
type sentTimes struct {
	mu sync.Mutex // guards at
	at map[string]time.Duration
}

func (s *sentTimes) put(node string, at time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.at[node] = at
}

func (s *sentTimes) get(node string) (time.Duration, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	at, ok := s.at[node]
	return at, ok
}

func (s *sentTimes) remove(node string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.at, node)
}

// sendLarge sends large requests to a peer while it answers pings, until ctx ends.
func (c *Cluster) sendLarge(ctx context.Context, name string) {
	timer := time.NewTimer(clock.UntilTick(c.opts.Host.Boottime(), c.Timing().Tick))
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		every := c.Timing().Tick
		if a, ok := c.peers.get(name); ok && c.opts.Host.Boottime()-a.sent < c.Timing().Patience {
			sent := c.opts.Host.Boottime()
			err := c.largeRequest(ctx, name)
			switch {
			case err == nil:
				c.large.put(name, sent)
				every = largeEvery
			case ctx.Err() == nil:
				c.metrics.largeFailures.Inc()
				c.log.Debug("large request to a peer failed", "peer", name, "err", err)
			}
		}
		timer.Reset(clock.UntilTick(c.opts.Host.Boottime(), every))
	}
}

// largeRequest sends one large request and waits for the answer.
func (c *Cluster) largeRequest(ctx context.Context, name string) error {
	// No longer than for a ping: on a connection that a cut has made useless it must fail
	// in time for the next one, which may use a tunnel.
	ctx, cancel := context.WithTimeout(ctx, pingTimeout)
	defer cancel()
	err := c.mesh.Probe(ctx, name)
	// A node that stops serving clients refuses the connection after the handshake, in
	// which certificates filled whole packets.
	var refused *mesh.RefusedError
	if errors.As(err, &refused) && refused.ByPeer && refused.Code == mesh.CodeKindClosed {
		return nil
	}
	return err
}

// largeAgo is PeerView.LargeAgo of a peer that was heard without a break since a time.
func (c *Cluster) largeAgo(node string, since, now time.Duration) time.Duration {
	at, _ := c.large.get(node)
	return now - max(at, since)
}

// udpAgo is PeerView.UDPAgo, as largeAgo.
func (c *Cluster) udpAgo(node string, since, now time.Duration) time.Duration {
	if g := c.gossip.Load(); g != nil {
		if ago, ever := g.UDPAgo(node); ever {
			return min(ago, now-since)
		}
	}
	return now - since
}

// troubles adds to a ping's answer what this node says of itself.
func troubles(to *clusterpb.PingResponse, h Health) {
	left := maxProblemBytes
	for _, p := range h.Problems {
		p = cutText(p, left)
		if p == "" {
			break
		}
		to.Problems = append(to.Problems, p)
		left -= len(p)
	}
	for _, b := range h.Blocked[:min(len(h.Blocked), maxBlockedSent)] {
		to.Blocked = append(to.Blocked, &clusterpb.Blocked{Node: b.Node, Kind: string(b.Kind), ForMs: b.For.Milliseconds()})
	}
}

// readTroubles is the inverse of troubles. A peer may have sent more than this node would.
func readTroubles(got *clusterpb.PingResponse, h *Health) {
	left := maxProblemBytes
	for _, p := range got.GetProblems() {
		if p = cutText(p, left); p == "" {
			break
		}
		h.Problems = append(h.Problems, p)
		left -= len(p)
	}
	for _, b := range got.GetBlocked()[:min(len(got.GetBlocked()), maxBlockedSent)] {
		switch kind := Traffic(b.GetKind()); kind {
		case TrafficPing, TrafficLarge, TrafficGossip, TrafficReplication:
			h.Blocked = append(h.Blocked, Blocked{Node: b.GetNode(), Kind: kind, For: time.Duration(b.GetForMs()) * time.Millisecond})
		}
	}
}

// cutText cuts a text to a number of bytes; with an ellipsis if something is missing.
func cutText(s string, most int) string {
	const ellipsis = "…"
	if len(s) <= most {
		return s
	}
	if most <= len(ellipsis) {
		return ""
	}
	cut := most - len(ellipsis)
	for cut > 0 && s[cut]&0xc0 == 0x80 { // not in the middle of a character
		cut--
	}
	return s[:cut] + ellipsis
}
