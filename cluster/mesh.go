package cluster

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
)

// ErrNoAddress means that no address of the dialled node is known.
var ErrNoAddress = errors.New("no address of the node is known")

// Bounds of the rpc port.
const (
	defaultDialTimeout = 2 * time.Second
	defaultAcceptTime  = 5 * time.Second // TLS, preface and hand-over of an accepted connection
	lingerTimeout      = time.Second     // for a peer to read why it was refused
	maxHandshakes      = 128             // accepted connections that are not yet known peers
	maxPeerConns       = 8192            // connections that stand, dialled and accepted
	maxClientConns     = 1024            // nodes with a gRPC channel
)

// MeshOptions are what a Mesh needs of its node.
type MeshOptions struct {
	Credentials *Credentials
	// Membership is asked at each handshake; it changes when the node joins.
	Membership func() Membership
	// Address is the address book, asked at each dial: host:port, where the
	// host may be a DNS name.
	Address    func(node string) (addr string, ok bool)
	Logger     *slog.Logger
	Registerer prometheus.Registerer
	// DialTimeout bounds name lookup, TCP, TLS and preface together. 0: 2 s.
	DialTimeout time.Duration
	// Admit refuses a site's peers with an error; nil admits all. It is asked at
	// each dial and each accept, when the peer is known and the connection can
	// already be found by CloseAll: a site that is first refused here and then
	// closed there has no connection left.
	Admit func(site string) error
	// OnNewerGeneration hears that a peer of the same cluster is of a higher
	// generation, so this node was left behind by a recovery. It must not block.
	OnNewerGeneration func(peer Identity, theirs Generation)
}

// Mesh is the rpc port: every connection between this node and its peers, in
// both directions. Each is mutual TLS, then a preface that says what it is for
// and to which cluster and generation its ends belong. Start at Serve and Dial.
type Mesh struct {
	opts      MeshOptions
	metrics   *meshMetrics
	acceptLog *lineThrottle
	serverTLS *tls.Config
	dialer    net.Dialer
	transport *http.Transport

	conns    peerConns
	arrivals arrivals

	mu        sync.Mutex // guards listeners, clients, closed
	listeners map[Kind]*kindListener
	clients   map[string]*grpc.ClientConn
	closed    bool
}

// NewMesh makes a mesh. Nothing listens before Serve, nothing is dialled before
// somebody asks for it. Close it after everything that uses it has ended.
func NewMesh(o MeshOptions) *Mesh {
	if o.DialTimeout <= 0 {
		o.DialTimeout = defaultDialTimeout
	}
	metrics := newMeshMetrics(o.Registerer)
	m := &Mesh{
		opts:      o,
		metrics:   metrics,
		acceptLog: newLineThrottle(),
		serverTLS: o.Credentials.ServerTLS(),
		dialer:    net.Dialer{KeepAliveConfig: peerKeepAlive, Control: setUserTimeout},
		conns:     peerConns{all: map[*PeerConn]struct{}{}, metrics: metrics},
		arrivals:  newArrivals(maxHandshakes, defaultAcceptTime),
		listeners: map[Kind]*kindListener{},
		clients:   map[string]*grpc.ClientConn{},
	}
	m.transport = m.newHTTPTransport()
	return m
}

// Dial opens a connection to a node by its name. The peer's certificate must
// say that name, whatever the address. The error wraps ErrNoAddress,
// ErrWrongNode, ErrForeignCluster, ErrCertificateRefused or is a *RefusedError
// where one of these is the reason.
func (m *Mesh) Dial(ctx context.Context, kind Kind, node string) (net.Conn, error) {
	addr, ok := m.opts.Address(node)
	if !ok {
		return nil, fmt.Errorf("dial node %s: %w", node, ErrNoAddress)
	}
	conn, err := m.dial(ctx, kind, node, addr)
	if err != nil {
		return nil, fmt.Errorf("dial node %s at %s: %w", node, addr, err)
	}
	return conn, nil
}

// DialAddr opens a connection to whatever node of the cluster is at an address:
// a seed, whose name is not known beforehand. Peer tells who it was.
func (m *Mesh) DialAddr(ctx context.Context, kind Kind, addr string) (*PeerConn, error) {
	conn, err := m.dial(ctx, kind, "", addr)
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", addr, err)
	}
	return conn, nil
}

func (m *Mesh) dial(ctx context.Context, kind Kind, node, addr string) (*PeerConn, error) {
	ctx, cancel := context.WithTimeout(ctx, m.opts.DialTimeout)
	defer cancel()
	raw, err := m.dialer.DialContext(ctx, "tcp", addr)
	if err != nil {
		m.metrics.failures.WithLabelValues("dialled", handshakeReason(err)).Inc()
		return nil, err
	}
	conn, err := m.greet(ctx, raw, kind, node)
	if err != nil {
		_ = raw.Close() // the reason is err
		err = explainHandshake(err)
		m.countFailure("dialled", err)
		return nil, err
	}
	return conn, nil
}

// greet is the dialler's side of a handshake. The caller closes raw on an error.
func (m *Mesh) greet(ctx context.Context, raw net.Conn, kind Kind, node string) (*PeerConn, error) {
	// Reads and writes of the preface know no context: a deadline in the past
	// ends them.
	stop := context.AfterFunc(ctx, func() { _ = raw.SetDeadline(time.Unix(1, 0)) })
	defer stop()

	secure := tls.Client(raw, m.opts.Credentials.ClientTLS(node))
	if err := secure.HandshakeContext(ctx); err != nil {
		return nil, err
	}
	peer, err := ParseIdentity(secure.ConnectionState().PeerCertificates[0])
	if err != nil {
		return nil, err
	}
	self, me := m.opts.Membership(), m.opts.Credentials.Identity()
	request, err := appendPreface(nil, prefaceRequest{
		Format: prefaceFormat, Kind: kind, ClusterID: self.ClusterID, Generation: self.Generation,
		Node: me.Node, Site: me.Site,
	})
	if err != nil {
		return nil, err
	}
	if _, err := secure.Write(request); err != nil {
		return nil, fmt.Errorf("write preface: %w", err)
	}
	text, err := readPreface(secure)
	if err != nil {
		return nil, err
	}
	reply, refused := decodeReply(text)
	theirs := Membership{ClusterID: reply.ClusterID, Generation: reply.Generation}
	m.noticeGeneration(self, theirs, peer)
	if refused == nil {
		refused = judge(self, theirs, kind)
	}
	if refused != nil {
		return nil, refused
	}
	conn := &PeerConn{Conn: secure, raw: raw, mesh: m, peer: peer, membership: theirs, kind: kind, direction: "dialled"}
	if err := m.settle(conn); err != nil {
		return nil, err
	}
	if !stop() {
		conn.forget()
		return nil, context.Cause(ctx)
	}
	if err := raw.SetDeadline(time.Time{}); err != nil {
		conn.forget()
		return nil, err
	}
	return conn, nil
}

// settle makes a connection one that CloseKind and CloseAll find, and only then
// asks whether its site may be talked to: see MeshOptions.Admit.
func (m *Mesh) settle(conn *PeerConn) error {
	if err := m.conns.add(conn); err != nil {
		return err
	}
	if m.opts.Admit == nil {
		return nil
	}
	if err := m.opts.Admit(conn.peer.Site); err != nil {
		conn.forget()
		return &RefusedError{Code: CodeIsolated, Message: err.Error()}
	}
	return nil
}

func (m *Mesh) noticeGeneration(self, theirs Membership, peer Identity) {
	if m.opts.OnNewerGeneration != nil && self.ClusterID != "" && theirs.ClusterID == self.ClusterID &&
		theirs.Generation.Number > self.Generation.Number {
		m.opts.OnNewerGeneration(peer, theirs.Generation)
	}
}

// CloseKind cuts every connection of a kind that stands, dialled or accepted,
// without a farewell. New ones are not prevented: close the kind's listener, or
// the raft layer, for that.
func (m *Mesh) CloseKind(kind Kind) {
	m.conns.drop(func(c *PeerConn) bool { return c.kind == kind })
}

// CloseAll cuts every connection with the peers of a site.
func (m *Mesh) CloseAll(site string) {
	m.conns.drop(func(c *PeerConn) bool { return c.peer.Site == site })
}

// CloseRefused cuts every connection with the peers of a site that Admit refuses
// now.
func (m *Mesh) CloseRefused() {
	if m.opts.Admit == nil {
		return
	}
	m.conns.drop(func(c *PeerConn) bool { return m.opts.Admit(c.peer.Site) != nil })
}

// Close ends the gRPC channels, the listeners of all kinds and every
// connection. Later dials fail with net.ErrClosed.
func (m *Mesh) Close() error {
	m.mu.Lock()
	m.closed = true
	clients, listeners := m.clients, m.listeners
	m.clients, m.listeners = nil, nil
	m.mu.Unlock()

	var errs []error
	for node, client := range clients {
		if err := client.Close(); err != nil {
			errs = append(errs, fmt.Errorf("close channel to %s: %w", node, err))
		}
	}
	for _, l := range listeners {
		_ = l.Close() // never fails
	}
	m.conns.close()
	m.transport.CloseIdleConnections()
	return errors.Join(errs...)
}
