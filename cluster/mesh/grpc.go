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

// Keepalive of both sides. The server forgives pings that come twice as fast
// as they are sent: its default, five minutes, would answer ours with
// ENHANCE_YOUR_CALM.
const (
	grpcPingEvery   = 10 * time.Second // the least that a gRPC client allows
	grpcPingTimeout = 5 * time.Second
	grpcPingMinimum = grpcPingEvery / 2
	grpcBackoffMax  = time.Second
)

// Windows of both sides: as large as gRPC would let them grow. Left to itself it
// finds out by a ping for nearly each message, so that an idle cluster sent
// twice as many frames.
const (
	grpcStreamWindow = 8 << 20
	grpcConnWindow   = 16 << 20
)

// meshClient is the gRPC channel to a node, until another takes its place
// because the way to the node has changed.
type Client struct {
	*grpc.ClientConn
	first atomic.Pointer[PeerConn] // to begin with, when there is one already
	via   atomic.Pointer[string]   // of the newest connection; nil before the first

	Replaced context.Context
	replace  context.CancelFunc
}

// ClientConn is the gRPC channel to a node, one for all callers, opened on
// first use. It dials by name each time it must, so it follows new addresses.
// Ask for it anew for each call: when the way to the node changes another
// channel takes its place, and this one is closed when replaceGrace has passed.
// The caller doesn't close it: Forget or Close does.
func (m *Mesh) ClientConn(node string) (*grpc.ClientConn, error) {
	client, err := m.Client(node)
	if err != nil {
		return nil, err
	}
	return client.ClientConn, nil
}

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
	client, err := m.newMeshClient(node, nil)
	if err != nil {
		return nil, err
	}
	m.clients[node] = client
	return client, nil
}

func (m *Mesh) newMeshClient(node string, first *PeerConn) (*Client, error) {
	c := &Client{}
	c.first.Store(first)
	c.Replaced, c.replace = context.WithCancel(context.Background())
	var err error
	c.ClientConn, err = m.newClient(node, func(ctx context.Context, _ string) (net.Conn, error) {
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

// tunnelled reports whether the channel goes through another node.
func (c *Client) tunnelled() bool {
	via := c.via.Load()
	return via != nil && *via != ""
}

// Close ends the channel, and calls under way with it.
func (c *Client) Close() error {
	c.replace()
	err := c.ClientConn.Close()
	if unused := c.first.Swap(nil); unused != nil {
		unused.forget()
		unused.cut()
	}
	return err
}

// replaceGrace is how long calls on a replaced channel may still take: longer
// than any of ours.
const replaceGrace = 15 * time.Second

// rechannel puts a new gRPC channel in the place of a node's present one, so
// that it goes the present way. Calls under way may finish; whoever would
// rather ask again sees meshClient.replaced. The connection to begin with may
// be nil.
func (m *Mesh) rechannel(node string, first *PeerConn) {
	old, fresh := m.exchange(node, first)
	if fresh == nil {
		if first != nil {
			_ = first.Close() // nobody ever asked for a channel
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
		_ = old.Close() // it is a closed one at worst
	})
	if !closing {
		_ = old.Close()
	}
}

// exchange gives nothing when there is no channel to replace.
func (m *Mesh) exchange(node string, first *PeerConn) (old, fresh *Client) {
	m.mu.Lock()
	defer m.mu.Unlock()
	old, ok := m.clients[node] // a closed mesh has none
	if !ok {
		return nil, nil
	}
	fresh, err := m.newMeshClient(node, first)
	if err != nil {
		return nil, nil // the old one finds the way by itself, later
	}
	m.clients[node] = fresh
	return old, fresh
}

// SeedConn is a gRPC channel to whatever node of the cluster is at an address.
// The caller closes it.
func (m *Mesh) SeedConn(addr string) (*grpc.ClientConn, error) {
	return m.newClient(addr, func(ctx context.Context, _ string) (net.Conn, error) {
		conn, err := m.DialAddr(ctx, KindGRPC, addr)
		if err != nil {
			return nil, err // not a nil *PeerConn in an interface
		}
		return conn, nil
	})
}

func (m *Mesh) newClient(target string, dial func(context.Context, string) (net.Conn, error)) (*grpc.ClientConn, error) {
	client, err := grpc.NewClient("passthrough:///"+target,
		grpc.WithContextDialer(dial),
		grpc.WithNoProxy(),
		grpc.WithTransportCredentials(peerCredentials{}),
		grpc.WithIdleTimeout(0), // a channel that was used stays open: failover must not wait for a handshake
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: grpcBackoffMax},
			MinConnectTimeout: m.opts.DialTimeout,
		}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{
			Time: grpcPingEvery, Timeout: grpcPingTimeout, PermitWithoutStream: true,
		}),
		grpc.WithStaticStreamWindowSize(grpcStreamWindow),
		grpc.WithStaticConnWindowSize(grpcConnWindow),
	)
	if err != nil {
		return nil, fmt.Errorf("channel to %s: %w", target, err)
	}
	return client, nil
}

// Forget closes the gRPC channel to a node that is no member any more.
func (m *Mesh) Forget(node string) error {
	m.mu.Lock()
	client, ok := m.clients[node]
	delete(m.clients, node)
	m.mu.Unlock()
	m.ways.forget(node)
	if !ok {
		return nil
	}
	if err := client.Close(); err != nil {
		return fmt.Errorf("close channel to %s: %w", node, err)
	}
	return nil
}

// GRPCServerOptions make a gRPC server fit for Listener(KindGRPC): it knows its
// peers (PeerFromContext) and bears their keepalive.
func (m *Mesh) GRPCServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.Creds(peerCredentials{}),
		grpc.ConnectionTimeout(defaultAcceptTime),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{
			MinTime: grpcPingMinimum, PermitWithoutStream: true,
		}),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: grpcPingEvery, Timeout: grpcPingTimeout}),
		grpc.StaticStreamWindowSize(grpcStreamWindow),
		grpc.StaticConnWindowSize(grpcConnWindow),
	}
}

// PeerFromContext is who called, in a gRPC handler.
func PeerFromContext(ctx context.Context) (Identity, bool) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return Identity{}, false
	}
	info, ok := p.AuthInfo.(peerAuthInfo)
	return info.peer, ok
}

// peerAuthInfo carries a peer's identity through gRPC.
type peerAuthInfo struct {
	credentials.CommonAuthInfo
	peer Identity
}

func (peerAuthInfo) AuthType() string { return "dsnode" }

// peerCredentials are gRPC's credentials over a connection that is secure
// already: they do nothing but refuse any other.
type peerCredentials struct{}

var errNotAPeer = errors.New("the connection does not come from the mesh")

func (peerCredentials) handshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	c, ok := conn.(*PeerConn)
	if !ok {
		return nil, nil, fmt.Errorf("%w: it is a %T", errNotAPeer, conn)
	}
	return c, peerAuthInfo{
		CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity},
		peer:           c.peer,
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

// OverrideServerName does nothing: names are checked where the mesh dials.
func (peerCredentials) OverrideServerName(string) error { return nil }
