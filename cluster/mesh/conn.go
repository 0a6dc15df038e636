package mesh

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"sync"
	"time"
)

// peerKeepAlive finds a peer that vanished without a word on an idle
// connection; setUserTimeout does so on a busy one.
var peerKeepAlive = net.KeepAliveConfig{Enable: true, Idle: 5 * time.Second, Interval: 2 * time.Second, Count: 3}

// PeerConn is a connection with a known peer: TLS, with the preface done. Bytes
// go straight through the embedded connection.
type PeerConn struct {
	*tls.Conn
	raw        net.Conn
	mesh       *Mesh
	peer       Identity
	membership Membership
	kind       Kind
	direction  string // "dialled" or "accepted"
	via        string // the node whose tunnel it runs through; then raw is that half of it
	target     string // of an accepted KindTunnel
	opened     time.Time
}

func newPeerConn(secure *tls.Conn, raw net.Conn, m *Mesh, direction string) *PeerConn {
	c := &PeerConn{Conn: secure, raw: raw, mesh: m, direction: direction, opened: time.Now()}
	if half, ok := raw.(*PeerConn); ok {
		c.via = half.peer.Node
	}
	return c
}

// Peer is who is at the other end, as its certificate says.
func (c *PeerConn) Peer() Identity { return c.peer }

// Membership is what the peer said of itself when the connection was made.
func (c *PeerConn) Membership() Membership { return c.membership }

// Kind is what the connection carries.
func (c *PeerConn) Kind() Kind { return c.kind }

// Via is the node through which the connection runs, empty when it is direct.
// That node sees nothing but ciphertext.
func (c *PeerConn) Via() string { return c.via }

// dials reports whether this node opened the connection, to that one.
func (c *PeerConn) dials(node string) bool { return c.direction == "dialled" && c.peer.Node == node }

// Close closes the connection. It may be called more than once.
func (c *PeerConn) Close() error {
	c.forget()
	return c.Conn.Close()
}

// forget takes the connection off the mesh's list.
func (c *PeerConn) forget() { c.mesh.conns.remove(c) }

// cut closes the connection without TLS's farewell, which could wait for a
// peer that no longer reads. Its owner sees errors and closes it.
func (c *PeerConn) cut() {
	if half, ok := c.raw.(*PeerConn); ok { // a tunnel's, with TLS of its own
		half.forget()
		half.cut()
		return
	}
	_ = c.raw.Close()
}

// peerConns is every connection that stands.
type peerConns struct {
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
	if len(p.all) >= maxPeerConns {
		return fmt.Errorf("%w: %d stand", errTooManyConns, len(p.all))
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

func (p *peerConns) drop(which func(*PeerConn) bool) {
	p.mu.Lock()
	var victims []*PeerConn
	for c := range p.all {
		if which(c) {
			victims = append(victims, c)
			p.removeLocked(c)
		}
	}
	p.mu.Unlock()
	for _, c := range victims {
		c.cut()
	}
}

func (p *peerConns) close() {
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	p.drop(func(*PeerConn) bool { return true })
}

// kindListener gives out the accepted connections of one kind. There is no
// queue behind it: a connection waits in its handshake's goroutine, whose
// number and time are bounded.
type kindListener struct {
	kind Kind
	next chan *PeerConn
	done chan struct{}
	once sync.Once
}

// Listener gives out the accepted connections of a kind; each is a *PeerConn.
// Until it is asked for, and after it was closed, peers are refused with
// CodeKindClosed. Asking again after a close opens it anew.
func (m *Mesh) Listener(kind Kind) net.Listener {
	m.mu.Lock()
	defer m.mu.Unlock()
	if l, ok := m.listeners[kind]; ok && !l.isClosed() {
		return l
	}
	l := &kindListener{kind: kind, next: make(chan *PeerConn), done: make(chan struct{})}
	if m.closed {
		_ = l.Close() // never fails
		return l
	}
	m.listeners[kind] = l
	return l
}

func (m *Mesh) openListener(kind Kind) *kindListener {
	m.mu.Lock()
	defer m.mu.Unlock()
	if l, ok := m.listeners[kind]; ok && !l.isClosed() {
		return l
	}
	return nil
}

func (m *Mesh) listening(kind Kind) bool { return m.openListener(kind) != nil }

func (m *Mesh) deliver(ctx context.Context, c *PeerConn) error {
	l := m.openListener(c.kind)
	if l == nil {
		return fmt.Errorf("hand over a %s connection: %w", c.kind, net.ErrClosed)
	}
	select {
	case l.next <- c:
		return nil
	case <-l.done:
		return fmt.Errorf("hand over a %s connection: %w", c.kind, net.ErrClosed)
	case <-ctx.Done():
		return fmt.Errorf("hand over a %s connection: %w", c.kind, context.Cause(ctx))
	}
}

func (l *kindListener) Accept() (net.Conn, error) {
	// A closed listener gives nothing out, even when a connection waits too.
	if l.isClosed() {
		return nil, net.ErrClosed
	}
	select {
	case c := <-l.next:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *kindListener) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

func (l *kindListener) isClosed() bool {
	select {
	case <-l.done:
		return true
	default:
		return false
	}
}

func (l *kindListener) Addr() net.Addr { return meshAddr(l.kind) }

// meshAddr is an address that is a name: a kind's listener has no port of its
// own, and raft knows nodes by their names.
type meshAddr string

func (meshAddr) Network() string  { return "dsnode" }
func (a meshAddr) String() string { return string(a) }
