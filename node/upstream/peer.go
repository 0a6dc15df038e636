package upstream

import (
	"context"
	"net/http"
	"slices"
	"sync"
	"time"
)

// Peer is a living node of another site.
type Peer struct {
	Node string
	Site string
	// Client reaches the peer's gateway over mutual TLS; the URL's host is ignored.
	Client http.RoundTripper
	// Draining peers are asked last.
	Draining bool
	// Dead holds the upstreams that the peer itself can't reach now.
	Dead map[string]bool
}

// Peers lists the living nodes of other sites. It is called for each request that
// no server of the own site can answer, and must not block.
type Peers func() []Peer

// reachesNone reports that the peer itself says it reaches none of the upstreams.
func (p *Peer) reachesNone(upstreams []string) bool {
	for _, u := range upstreams {
		if !p.Dead[u] {
			return false
		}
	}
	return true
}

// peer is the live state of a node of another site.
type peer struct {
	backend
	lost   context.Context // ends when the peer is lost
	lose   context.CancelFunc
	absent int // checks in a row that did not find it listed
}

const (
	// maxPeers bounds the live state that is kept of peers.
	maxPeers   = 1024
	peersEvery = 250 * time.Millisecond
	// lostAfter is how many checks in a row must miss a peer. A list may be
	// incomplete for a moment while it is made anew.
	lostAfter = 4
)

// peers keeps the live state of peers.
type peers struct {
	metrics *metrics
	onMove  func(b *backend, to breakerState, why breakerReason)

	mu     sync.Mutex // guards byNode and the peers' absent
	byNode map[string]*peer
}

// peer finds or makes the live state of a listed peer.
func (s *peers) peer(p Peer) *peer {
	s.mu.Lock()
	defer s.mu.Unlock()
	if have, ok := s.byNode[p.Node]; ok && have.site == p.Site {
		return have
	}
	made := &peer{}
	made.name, made.site, made.node = "peer/"+p.Site, p.Site, p.Node
	made.counts = s.metrics.backend(made.name)
	made.onMove = s.onMove
	made.lost, made.lose = context.WithCancel(context.Background())
	if len(s.byNode) < maxPeers { // beyond it the state lasts for one request
		s.byNode[p.Node] = made
	}
	return made
}

// check drops peers that are no longer listed. A request that waits for one of them
// and has shown no content turns to another server.
func (s *peers) check(listed []Peer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for node, p := range s.byNode {
		p.absent++
		if slices.ContainsFunc(listed, func(l Peer) bool { return l.Node == node && l.Site == p.site }) {
			p.absent = 0
		}
		if p.absent >= lostAfter {
			p.lose()
			delete(s.byNode, node)
		}
	}
}
