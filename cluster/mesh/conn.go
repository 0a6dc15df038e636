package mesh

import (
	"crypto/tls"
	"fmt"
	"net"
	"sync"
	"time"
)

// peerKeepAlive detects a vanished peer on an idle connection; setUserTimeout
// does so on a busy one.
var peerKeepAlive = net.KeepAliveConfig{Enable: true, Idle: 5 * time.Second, Interval: 2 * time.Second, Count: 3}

// PeerConn is a connection with an authenticated peer: TLS, after the preface.
// Reads and writes go straight to the embedded connection.
type PeerConn struct {
	*tls.Conn
	raw       net.Conn // below TLS: TCP, or for a tunnel the *PeerConn with the relay
	mesh      *Mesh
	peer      Identity // as the peer's certificate says
	kind      Kind
	direction string // "dialled" or "accepted"
	via       string // the relay, which sees only ciphertext; "" for a direct connection
	target    string // of an accepted KindTunnel: the node to reach
	theirs    Membership
	founded   bool // the acceptor that was dialled belongs to some cluster
	opened    time.Time
}

func newPeerConn(m *Mesh, secure *tls.Conn, raw net.Conn, direction string, peer Identity, kind Kind) *PeerConn {
	c := &PeerConn{Conn: secure, raw: raw, mesh: m, peer: peer, kind: kind, direction: direction, opened: time.Now()}
	if leg, ok := raw.(*PeerConn); ok {
		c.via = leg.peer.Node
	}
	return c
}

// Membership is what the peer said of itself in its preface.
func (c *PeerConn) Membership() Membership { return c.theirs }

// Founded reports whether the node that was dialled belongs to a cluster. Only one that
// shows the same cluster id learns to which.
func (c *PeerConn) Founded() bool { return c.founded }

// dialledTo reports whether this node opened the connection, and to that node.
func (c *PeerConn) dialledTo(node string) bool {
	return c.direction == "dialled" && c.peer.Node == node
}

// Close closes the connection. It may be called more than once.
func (c *PeerConn) Close() error {
	c.unregister()
	return c.Conn.Close()
}

func (c *PeerConn) unregister() { c.mesh.conns.remove(c) }

// abort closes the connection without TLS's close_notify, whose write could block
// on a peer that no longer reads. The connection's user sees errors and closes it.
func (c *PeerConn) abort() {
	if leg, ok := c.raw.(*PeerConn); ok { // a tunnel: the connection with the relay has its own TLS
		leg.unregister()
		leg.abort()
		return
	}
	_ = c.raw.Close()
}

// peerConns is the list of open connections.
type peerConns struct {
	limit   int
	metrics *metrics

	mu     sync.Mutex // guards all, closed
	all    map[*PeerConn]struct{}
	closed bool
}

func (p *peerConns) add(c *PeerConn) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return net.ErrClosed
	}
	if len(p.all) >= p.limit {
		return fmt.Errorf("%w: %d are open", errTooManyConns, len(p.all))
	}
	p.all[c] = struct{}{}
	p.metrics.connections.WithLabelValues(string(c.kind), c.direction).Inc()
	p.metrics.opened.WithLabelValues(string(c.kind), c.direction).Inc()
	return nil
}

func (p *peerConns) remove(c *PeerConn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.removeLocked(c)
}

func (p *peerConns) removeLocked(c *PeerConn) {
	if _, ok := p.all[c]; ok {
		delete(p.all, c)
		p.metrics.connections.WithLabelValues(string(c.kind), c.direction).Dec()
	}
}

func (p *peerConns) abortWhere(matches func(*PeerConn) bool) {
	p.mu.Lock()
	var found []*PeerConn
	for c := range p.all {
		if matches(c) {
			found = append(found, c)
			p.removeLocked(c)
		}
	}
	p.mu.Unlock()
	for _, c := range found {
		c.abort()
	}
}

func (p *peerConns) close() {
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	p.abortWhere(func(*PeerConn) bool { return true })
}
