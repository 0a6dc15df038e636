package mesh

import (
	"context"
	"fmt"
	"net"
)

// kindListener is a net.Listener for the accepted connections of one kind. It has
// no queue: a connection waits in the goroutine of its handshake, and the number
// and the time of those are bounded.
type kindListener struct {
	kind Kind
	next chan *PeerConn
	open context.Context // ends when the listener is closed
	stop context.CancelFunc
}

// Listener returns the listener for the accepted connections of a kind; each of
// them is a *PeerConn. Before the first call, and after the listener was closed,
// peers are refused with CodeKindClosed. A call after that opens a new listener.
func (m *Mesh) Listener(kind Kind) net.Listener {
	m.mu.Lock()
	defer m.mu.Unlock()
	if l, ok := m.listeners[kind]; ok && l.open.Err() == nil {
		return l
	}
	l := &kindListener{kind: kind, next: make(chan *PeerConn)}
	l.open, l.stop = context.WithCancel(context.Background())
	if m.closed {
		_ = l.Close() // never fails
		return l
	}
	m.listeners[kind] = l
	return l
}

// openListener is nil when nobody accepts connections of that kind.
func (m *Mesh) openListener(kind Kind) *kindListener {
	m.mu.Lock()
	defer m.mu.Unlock()
	if l, ok := m.listeners[kind]; ok && l.open.Err() == nil {
		return l
	}
	return nil
}

// deliver waits until the kind's listener has accepted the connection.
func (m *Mesh) deliver(ctx context.Context, c *PeerConn) error {
	l := m.openListener(c.kind)
	if l == nil {
		return fmt.Errorf("hand over a %s connection: %w", c.kind, net.ErrClosed)
	}
	select {
	case l.next <- c:
		return nil
	case <-l.open.Done():
		return fmt.Errorf("hand over a %s connection: %w", c.kind, net.ErrClosed)
	case <-ctx.Done():
		return fmt.Errorf("hand over a %s connection: %w", c.kind, context.Cause(ctx))
	}
}

func (l *kindListener) Accept() (net.Conn, error) {
	// The select below picks at random, so a closed listener could still return a
	// connection that waits.
	if l.open.Err() != nil {
		return nil, net.ErrClosed
	}
	select {
	case c := <-l.next:
		return c, nil
	case <-l.open.Done():
		return nil, net.ErrClosed
	}
}

func (l *kindListener) Close() error {
	l.stop()
	return nil
}

func (l *kindListener) Addr() net.Addr { return nameAddr(l.kind) }

// nameAddr is a net.Addr that is only a name: a kind's listener has no port of
// its own, and Raft addresses nodes by name.
type nameAddr string

func (nameAddr) Network() string  { return "dsnode" }
func (a nameAddr) String() string { return string(a) }
