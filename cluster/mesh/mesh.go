package mesh

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

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/throttle"
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
type Options struct {
	Credentials *Credentials
	// Membership is asked at each handshake; it changes when the node joins.
	Membership func() Membership
	// Address is the address book, asked at each dial: host:port, where the
	// host may be a DNS name.
	Address    func(node string) (addr string, ok bool)
	Logger     *slog.Logger
	Registerer prometheus.Registerer
	// DialTimeout bounds name lookup, TCP, TLS and preface together, and the
	// detour when that fails. 0: 2 s.
	DialTimeout time.Duration
	// Relays names the peers that lately said that they hear a node, the best
	// first: when the node is not reached directly they are asked for a tunnel.
	// Nil: there are no tunnels from here. It must not block.
	Relays func(node string) []string
	// Silent names the nodes that answered once and don't now. KeepWays asks
	// several times a second. It must not block.
	Silent func() []string
	// Admit refuses a site's peers with an error; nil admits all. It is asked at
	// each dial and each accept, when the peer is known and the connection can
	// already be found by CloseAll: a site that is first refused here and then
	// closed there has no connection left.
	Admit func(site string) error
	// OnNewerGeneration hears that a peer of the same cluster is of a higher
	// generation, so this node was left behind by a recovery. It must not block.
	OnNewerGeneration func(peer Identity, theirs agreed.Generation)
}

// Mesh is the rpc port: every connection between this node and its peers, in
// both directions. Each is mutual TLS, then a preface that says what it is for
// and to which cluster and generation its ends belong. Start at Serve and Dial.
type Mesh struct {
	opts      Options
	metrics   *metrics
	acceptLog *throttle.Lines
	serverTLS *tls.Config
	dialer    net.Dialer
	transport *http.Transport

	conns    peerConns
	arrivals arrivals
	ways     ways
	relayed  relayed
	timing   wayTiming

	living context.Context // of examinations and replaced channels, until Close
	die    context.CancelFunc
	tasks  sync.WaitGroup // all that runs under living

	mu        sync.Mutex // guards listeners, clients, closed
	listeners map[Kind]*kindListener
	clients   map[string]*Client
	closed    bool
}

// NewMesh makes a mesh. Nothing listens before Serve, nothing is dialled before
// somebody asks for it. Close it after everything that uses it has ended.
func New(o Options) *Mesh {
	if o.DialTimeout <= 0 {
		o.DialTimeout = defaultDialTimeout
	}
	metrics := newMetrics(o.Registerer)
	m := &Mesh{
		opts:      o,
		metrics:   metrics,
		acceptLog: throttle.NewLines(),
		serverTLS: o.Credentials.ServerTLS(),
		dialer:    net.Dialer{KeepAliveConfig: peerKeepAlive, Control: setUserTimeout},
		conns:     peerConns{all: map[*PeerConn]struct{}{}, metrics: metrics},
		arrivals:  newArrivals(maxHandshakes, defaultAcceptTime),
		listeners: map[Kind]*kindListener{},
		clients:   map[string]*Client{},
		ways:      newWays(metrics),
		timing:    defaultWayTiming(),
		relayed:   relayed{most: maxRelayed, each: maxRelayedEach, of: map[string]int{}},
	}
	m.living, m.die = context.WithCancel(context.Background())
	m.transport = m.newHTTPTransport()
	return m
}

// Dial opens a connection to a node by its name. The peer's certificate must
// say that name, whatever the address. The error wraps ErrNoAddress,
// ErrWrongNode, ErrForeignCluster, ErrCertificateRefused or is a *RefusedError
// where one of these is the reason.
//
// Where the network is the reason a tunnel through a common peer takes the
// place of the direct way, for this dial and, once it is certain, for those
// that follow.
func (m *Mesh) Dial(ctx context.Context, kind Kind, node string) (net.Conn, error) {
	addr, ok := m.opts.Address(node)
	if !ok {
		return nil, fmt.Errorf("dial node %s: %w", node, ErrNoAddress)
	}
	ctx, cancel := context.WithTimeout(ctx, m.opts.DialTimeout)
	defer cancel()
	conn, err := m.dialAnyWay(ctx, kind, node, addr)
	if err != nil {
		return nil, fmt.Errorf("dial node %s at %s: %w", node, addr, err)
	}
	return conn, nil
}

// DialAddr opens a connection to whatever node of the cluster is at an address:
// a seed, whose name is not known beforehand. Peer tells who it was. It is
// always direct: who could be asked for a tunnel is not known either.
func (m *Mesh) DialAddr(ctx context.Context, kind Kind, addr string) (*PeerConn, error) {
	ctx, cancel := context.WithTimeout(ctx, m.opts.DialTimeout)
	defer cancel()
	conn, err := m.dial(ctx, greeting{kind: kind}, addr)
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", addr, err)
	}
	return conn, nil
}

// greeting is what a dialler wants: a kind of connection with a node, by name
// unless any will do. A tunnel has a target beyond that node.
type greeting struct {
	kind         Kind
	node, target string
}

// dial is the direct way, and one half of a tunnel. The caller bounds ctx.
func (m *Mesh) dial(ctx context.Context, to greeting, addr string) (*PeerConn, error) {
	raw, err := m.dialer.DialContext(ctx, "tcp", addr)
	if err != nil {
		m.metrics.failures.WithLabelValues("dialled", handshakeReason(err)).Inc()
		return nil, err
	}
	conn, err := m.greet(ctx, raw, to)
	if err != nil {
		_ = raw.Close() // the reason is err
		err = explainHandshake(err)
		m.countFailure("dialled", err)
		return nil, err
	}
	return conn, nil
}

// greet is the dialler's side of a handshake. The caller closes raw on an error.
func (m *Mesh) greet(ctx context.Context, raw net.Conn, to greeting) (*PeerConn, error) {
	// Reads and writes of the preface know no context: a deadline in the past
	// ends them.
	stop := context.AfterFunc(ctx, func() { _ = raw.SetDeadline(time.Unix(1, 0)) })
	defer stop()

	secure := tls.Client(raw, m.opts.Credentials.ClientTLS(to.node))
	if err := secure.HandshakeContext(ctx); err != nil {
		return nil, err
	}
	peer, err := ParseIdentity(secure.ConnectionState().PeerCertificates[0])
	if err != nil {
		return nil, err
	}
	self, me := m.opts.Membership(), m.opts.Credentials.Identity()
	request, err := appendPreface(nil, prefaceRequest{
		Format: prefaceFormat, Kind: to.kind, ClusterID: self.ClusterID, Generation: self.Generation,
		Node: me.Node, Site: me.Site, Target: to.target,
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
		refused = judge(self, theirs, to.kind)
	}
	if refused != nil {
		return nil, refused
	}
	conn := newPeerConn(secure, raw, m, "dialled")
	conn.peer, conn.membership, conn.kind = peer, theirs, to.kind
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
// connection, and waits for the examinations under way. Later dials fail with
// net.ErrClosed.
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
	m.die()
	m.tasks.Wait()
	return errors.Join(errs...)
}

// background runs something until it ends or the mesh is closed, which waits
// for it. It reports whether it was begun.
func (m *Mesh) background(run func(ctx context.Context)) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return false
	}
	m.tasks.Go(func() { run(m.living) })
	return true
}
