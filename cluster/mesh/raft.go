package mesh

import (
	"context"
	"fmt"
	"net"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
)

// raftLayer is the mesh as raft's transport sees it. Raft's addresses are node
// names, so an address that changes is none of raft's business.
type raftLayer struct {
	net.Listener
	mesh   *Mesh
	self   meshAddr
	closed atomic.Bool
}

// RaftLayer is a stream layer for raft.NetworkTransport over KindRaft
// connections. advertise is what peers dial: this node's name. Closing it stops
// both directions for new connections; CloseKind(KindRaft) ends those that
// stand. A new layer may be made after that.
func (m *Mesh) RaftLayer(advertise string) raft.StreamLayer {
	return &raftLayer{Listener: m.Listener(KindRaft), mesh: m, self: meshAddr(advertise)}
}

// Dial opens a connection to the node of that name.
func (l *raftLayer) Dial(node raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	if l.closed.Load() {
		return nil, fmt.Errorf("dial node %s for raft: %w", node, net.ErrClosed)
	}
	ctx := context.Background()
	if timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, timeout)
		defer cancel()
	}
	conn, err := l.mesh.Dial(ctx, KindRaft, string(node))
	if err == nil && l.closed.Load() {
		// The disk watchdog closes the layer and then cuts what stands: a dial
		// that was under way must not outlive both.
		_ = conn.Close()
		return nil, fmt.Errorf("dial node %s for raft: %w", node, net.ErrClosed)
	}
	return conn, err
}

// Close closes the layer.
func (l *raftLayer) Close() error {
	l.closed.Store(true)
	return l.Listener.Close()
}

// Addr is the node's name.
func (l *raftLayer) Addr() net.Addr { return l.self }
