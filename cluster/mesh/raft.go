package mesh

import (
	"context"
	"fmt"
	"net"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
)

// raftLayer implements raft.StreamLayer over the mesh. Raft's addresses are node
// names, so Raft never sees a node's address change.
type raftLayer struct {
	net.Listener
	mesh   *Mesh
	self   nameAddr
	closed atomic.Bool
}

// RaftLayer returns a stream layer for raft.NetworkTransport over KindRaft
// connections. advertise is this node's name, which peers dial. A closed layer
// neither dials nor accepts; CloseKind(KindRaft) ends the connections that are
// open. A new layer may be made after that.
func (m *Mesh) RaftLayer(advertise string) raft.StreamLayer {
	return &raftLayer{Listener: m.Listener(KindRaft), mesh: m, self: nameAddr(advertise)}
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
		// The disk watchdog closes the layer and then the open connections. A dial
		// under way at that time must not leave one behind.
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
