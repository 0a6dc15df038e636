package serving

import (
	"context"
	"sync"
	"time"
)

// maxPeers bounds the live state that is kept of peers.
const maxPeers = 1024

// peer is the live state of a node of another site.
type peer struct {
	backend
	gone   context.Context // ends when the peer is lost
	lose   context.CancelFunc
	absent int // checks in a row that did not find it listed
}

// fleet keeps the peers' live state.
type fleet struct {
	metrics *metrics
	onMove  func(b *backend, to breakerState, why breakerReason)

	mu    sync.Mutex // guards peers and their absent
	peers map[string]*peer
}

// peer finds or makes the live state of a listed peer.
func (f *fleet) peer(p Peer) *peer {
	f.mu.Lock()
	defer f.mu.Unlock()
	if have, ok := f.peers[p.Node]; ok && have.site == p.Site {
		return have
	}
	made := &peer{}
	made.name, made.site, made.node = "peer/"+p.Site, p.Site, p.Node
	made.counts = f.metrics.backend(made.name)
	made.onMove = f.onMove
	made.gone, made.lose = context.WithCancel(context.Background())
	if len(f.peers) < maxPeers { // beyond it a peer is met anew each time
		f.peers[p.Node] = made
	}
	return made
}

// lostAfter is how many checks in a row must miss a peer: a list that is just
// being made anew is no news.
const (
	lostAfter  = 4
	peersEvery = 250 * time.Millisecond
)

// check lets go of peers that are no longer listed: who waits for one of them
// without having seen content turns to another.
func (f *fleet) check(listed []Peer) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for node, p := range f.peers {
		p.absent++
		for _, l := range listed {
			if l.Node == node && l.Site == p.site {
				p.absent = 0
				break
			}
		}
		if p.absent >= lostAfter {
			p.lose()
			delete(f.peers, node)
		}
	}
}

func (f *fleet) empty() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.peers) == 0
}
