package mesh

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/peer"
)

// Keepalive of both sides. The server tolerates pings twice as often as this
// client sends them. With the default limit, one in five minutes, it would close
// the connection with ENHANCE_YOUR_CALM.
const (
	grpcPingInterval    = 10 * time.Second // a gRPC client allows no shorter one
	grpcPingTimeout     = 5 * time.Second
	grpcPingMinInterval = grpcPingInterval / 2
	grpcBackoffMax      = time.Second
)

// Flow-control windows of both sides, as large as gRPC's estimator would make
// them. The estimator is off because it sends a ping with nearly every message,
// which doubled the frames of an idle cluster.
const (
	grpcStreamWindow = 8 << 20
	grpcConnWindow   = 16 << 20
)

// Client is the gRPC channel to a node. When the route to the node changes,
// another Client takes its place.
type Client struct {
	*grpc.ClientConn
	first atomic.Pointer[PeerConn] // the connection to start with, if there is one already
	via   atomic.Pointer[string]   // the relay of the newest connection; nil before the first

	// Replaced ends when this channel was replaced or closed.
	Replaced context.Context
	replace  context.CancelFunc
}

// ClientConn returns the gRPC channel to a node, opened on first use and shared by
// all callers. It dials by name, so it follows the node to new addresses.
// Callers get it anew for each call: when the route to the node changes, another
// channel replaces it, and this one is closed after replaceGrace. Callers don't
// close it; Forget and Close do.
func (m *Mesh) ClientConn(node string) (*grpc.ClientConn, error) {
	client, err := m.Client(node)
	if err != nil {
		return nil, err
	}
	return client.ClientConn, nil
}

// Client is ClientConn for callers that hold a call open and must know when the
// channel was replaced.
func (m *Mesh) Client(node string) (*Client, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return nil, net.ErrClosed
	}
	if client, ok := m.clients[node]; ok {
		return client, nil
	}
	if len(m.clients) >= maxClientConns {
		return nil, fmt.Errorf("channel to node %s: %w: %d channels", node, errTooManyConns, len(m.clients))
	}
	client, err := m.newClient(node, nil)
	if err != nil {
		return nil, err
	}
	m.clients[node] = client
	return client, nil
}

func (m *Mesh) newClient(node string, first *PeerConn) (*Client, error) {
	c := &Client{}
	c.first.Store(first)
	c.Replaced, c.replace = context.WithCancel(context.Background())
	var err error
	c.ClientConn, err = m.newClientConn(node, func(ctx context.Context, _ string) (net.Conn, error) {
		if conn := c.first.Swap(nil); conn != nil {
			c.via.Store(&conn.via)
			return conn, nil
		}
		conn, err := m.Dial(ctx, KindGRPC, node)
		if peer, ok := conn.(*PeerConn); ok {
			c.via.Store(&peer.via)
		}
		return conn, err
	})
	return c, err
}

// tunnelled reports whether the channel's newest connection goes through a relay.
func (c *Client) tunnelled() bool {
	via := c.via.Load()
	return via != nil && *via != ""
}

// Close closes the channel and ends the calls under way.
func (c *Client) Close() error {
	c.replace()
	err := c.ClientConn.Close()
	if unused := c.first.Swap(nil); unused != nil {
		unused.unregister()
		unused.abort()
	}
	return err
}

// replaceGrace is how long calls on a replaced channel may still run. It is longer
// than any call takes.
const replaceGrace = 15 * time.Second

// replaceClient replaces a node's gRPC channel with a new one, which takes the
// node's present route. Calls under way may finish; a caller that prefers to retry
// watches Client.Replaced. first, which may be nil, becomes the new channel's
// first connection.
func (m *Mesh) replaceClient(node string, first *PeerConn) {
	old, fresh := m.swapClient(node, first)
	if fresh == nil {
		if first != nil {
			_ = first.Close() // the node has no channel that could use it
		}
		return
	}
	fresh.Connect()
	old.replace()
	closing := m.background(func(ctx context.Context) {
		select {
		case <-ctx.Done():
		case <-time.After(m.timing.grace):
		}
		_ = old.Close() // may be closed already
	})
	if !closing {
		_ = old.Close()
	}
}

// swapClient returns nil if there is no channel to replace.
func (m *Mesh) swapClient(node string, first *PeerConn) (old, fresh *Client) {
	m.mu.Lock()
	defer m.mu.Unlock()
	old, ok := m.clients[node] // empty once the mesh is closed
	if !ok {
		return nil, nil
	}
	fresh, err := m.newClient(node, first)
	if err != nil {
		return nil, nil // the old channel stays, and takes the new route when it dials again
	}
	m.clients[node] = fresh
	return old, fresh
}

// SeedConn returns a gRPC channel to whichever node of the cluster listens at an
// address. The caller closes it.
func (m *Mesh) SeedConn(addr string) (*grpc.ClientConn, error) {
	return m.newClientConn(addr, func(ctx context.Context, _ string) (net.Conn, error) {
		conn, err := m.DialAddr(ctx, KindGRPC, addr)
		if err != nil {
			return nil, err // conn would be a non-nil interface that holds a nil *PeerConn
		}
		return conn, nil
	})
}

func (m *Mesh) newClientConn(target string, dial func(context.Context, string) (net.Conn, error)) (*grpc.ClientConn, error) {
	client, err := grpc.NewClient("passthrough:///"+target,
		grpc.WithContextDialer(dial),
		grpc.WithNoProxy(),
		grpc.WithTransportCredentials(peerCredentials{}),
		grpc.WithIdleTimeout(0), // stay connected when idle: a failover must not wait for a handshake
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: grpcBackoffMax},
			MinConnectTimeout: m.opts.DialTimeout,
		}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{
			Time: grpcPingInterval, Timeout: grpcPingTimeout, PermitWithoutStream: true,
		}),
		grpc.WithStaticStreamWindowSize(grpcStreamWindow),
		grpc.WithStaticConnWindowSize(grpcConnWindow),
	)
	if err != nil {
		return nil, fmt.Errorf("channel to %s: %w", target, err)
	}
	return client, nil
}

// Forget drops what the mesh holds about a node that is no longer a member: its
// gRPC channel and its route.
func (m *Mesh) Forget(node string) error {
	m.mu.Lock()
	client, ok := m.clients[node]
	delete(m.clients, node)
	m.mu.Unlock()
	m.routes.remove(node)
	if !ok {
		return nil
	}
	if err := client.Close(); err != nil {
		return fmt.Errorf("close channel to %s: %w", node, err)
	}
	return nil
}

// GRPCServerOptions are the options of a gRPC server on Listener(KindGRPC): its
// handlers can call PeerFromContext, and it accepts the peers' keepalive pings.
func (m *Mesh) GRPCServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.Creds(peerCredentials{}),
		grpc.ConnectionTimeout(handshakeTimeout),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{
			MinTime: grpcPingMinInterval, PermitWithoutStream: true,
		}),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: grpcPingInterval, Timeout: grpcPingTimeout}),
		grpc.StaticStreamWindowSize(grpcStreamWindow),
		grpc.StaticConnWindowSize(grpcConnWindow),
	}
}

// PeerFromContext returns the caller of a gRPC handler.
func PeerFromContext(ctx context.Context) (Identity, bool) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return Identity{}, false
	}
	info, ok := p.AuthInfo.(peerAuthInfo)
	return info.peer, ok
}

// MembershipFromContext is what the caller of a gRPC handler said of itself when it
// connected.
func MembershipFromContext(ctx context.Context) (Membership, bool) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return Membership{}, false
	}
	info, ok := p.AuthInfo.(peerAuthInfo)
	return info.theirs, ok
}

// peerAuthInfo carries a peer's identity through gRPC.
type peerAuthInfo struct {
	credentials.CommonAuthInfo
	peer   Identity
	theirs Membership
}

func (peerAuthInfo) AuthType() string { return "dsnode" }

// peerCredentials are gRPC's transport credentials for connections of the mesh,
// which have done TLS already. They refuse any other connection.
type peerCredentials struct{}

var errNotAPeer = errors.New("the connection does not come from the mesh")

func (peerCredentials) handshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	c, ok := conn.(*PeerConn)
	if !ok {
		return nil, nil, fmt.Errorf("%w: it is a %T", errNotAPeer, conn)
	}
	return c, peerAuthInfo{
		CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity},
		peer:           c.peer, theirs: c.theirs,
	}, nil
}

func (p peerCredentials) ClientHandshake(_ context.Context, _ string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return p.handshake(conn)
}

func (p peerCredentials) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return p.handshake(conn)
}

func (peerCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}

func (p peerCredentials) Clone() credentials.TransportCredentials { return p }

// OverrideServerName does nothing: the mesh checks names when it dials.
func (peerCredentials) OverrideServerName(string) error { return nil }
