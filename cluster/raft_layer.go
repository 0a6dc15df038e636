package cluster

import (
	"context"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
)

// raftLayer is raft's stream layer. Its dials wait for peers that are offline. It is
// blocked while the disk hangs, and while a leader with a slow disk is replaced.
type raftLayer struct {
	raft.StreamLayer
	ctx     context.Context // ends waiting dials
	wait    func(ctx context.Context, node string)
	stalled atomic.Bool // by the watchdog: refuse all dials and connections
	deposed atomic.Bool // by deposeSelf: the same

	mu      sync.Mutex // guards waiting
	waiting map[string]int
}

// maxWaitingDials is how many dials to one peer wait: raft's leader has one goroutine
// for entries and one for heartbeats of each peer.
const maxWaitingDials = 2

// Dial waits while the peer is known to be offline, and then dials. After failed dials
// raft backs off for up to 10 s, so if dials failed at once, a peer that was offline for
// half a minute would get its entries up to 10 s after its return. A dial that waits
// succeeds as soon as the peer answers pings.
func (l *raftLayer) Dial(address raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	if l.blocked() {
		return nil, ErrDiskStalled
	}
	if l.beginWait(string(address)) {
		l.wait(l.ctx, string(address))
		l.endWait(string(address))
	}
	if l.blocked() {
		return nil, ErrDiskStalled
	}
	if l.ctx.Err() != nil {
		return nil, ErrStopped
	}
	return l.StreamLayer.Dial(address, timeout)
}

func (l *raftLayer) blocked() bool { return l.stalled.Load() || l.deposed.Load() }

func (l *raftLayer) beginWait(node string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.waiting[node] >= maxWaitingDials {
		return false
	}
	l.waiting[node]++
	return true
}

func (l *raftLayer) endWait(node string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.waiting[node]--; l.waiting[node] == 0 {
		delete(l.waiting, node)
	}
}

// Accept closes new connections while the layer is blocked.
func (l *raftLayer) Accept() (net.Conn, error) {
	for {
		conn, err := l.StreamLayer.Accept()
		if err != nil || !l.blocked() {
			return conn, err
		}
		_ = conn.Close() // nothing was sent on it
	}
}

// waitForPeer blocks while this node leads and the peer does not answer pings. It does not
// while raft refuses ticks after a leadership transfer: then raft may wait for the end of
// this dial before it takes them again.
func (c *Cluster) waitForPeer(ctx context.Context, node string) {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		r := c.raft.Load()
		a, heard := c.peers.get(node)
		if r == nil || r.State() != raft.Leader || !c.isMember(node) || !heard || c.refusing.Load() || c.opts.Host.Boottime()-a.sent < 2*c.Timing().Tick+pingTimeout {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}
