// Package mesh makes every connection between this node and its peers. One TCP
// port (the rpc port) accepts all of them. Each connection is mutual TLS 1.3, then
// a preface in which both ends state the kind of the connection, their cluster and
// its generation. After that it carries Raft, gRPC or HTTP as is.
//
// The package owns the nodes' certificates (ca.go, identity.go, credentials.go),
// the handshake (preface.go, dial.go, accept.go), the list of open connections
// (conn.go) and what runs over them (raft.go, grpc.go, http.go). If the network
// between two nodes is cut, a common peer relays: tunnel.go dials through a relay,
// tunnel_relay.go relays for others, routes.go decides which route new connections
// take.
//
// Start reading at Mesh.Dial and Mesh.Serve.
package mesh

import (
	"cmp"
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
	"github.com/dsnode/dsnode/cluster/host"
	"github.com/dsnode/dsnode/cluster/throttle"
)

// Bounds of the rpc port.
const (
	defaultDialTimeout = 2 * time.Second
	handshakeTimeout   = 5 * time.Second // from accept until the kind's listener has the connection
	lingerTimeout      = time.Second     // for a refused peer to read the reason
	maxHandshakes      = 128             // accepted connections whose handshake has not ended
	maxPeerConns       = 8192            // open connections, dialled and accepted
	maxClientConns     = 1024            // nodes with a gRPC channel
)

// Options are what a Mesh needs of its node.
type Options struct {
	Credentials *Credentials
	// Membership is called at each handshake, because it changes when the node joins.
	Membership func() Membership
	// Address looks up a node's rpc address, host:port, where the host may be a DNS
	// name. It is called at each dial.
	Address    func(node string) (addr string, ok bool)
	Host       *host.Host // nil: this machine
	Logger     *slog.Logger
	Registerer prometheus.Registerer
	// DialTimeout bounds a whole dial: name lookup, TCP, TLS, preface and, if the
	// direct dial fails, the tunnel. 0: 2 s.
	DialTimeout time.Duration
	// MaxConns bounds the open connections, in both directions; MaxHandshakes those
	// accepted ones whose handshake has not ended. 0: 8192 and 128, which are the most.
	MaxConns, MaxHandshakes int
	// Relays lists the peers that recently reported that they hear a node, the best
	// first. They are asked for a tunnel when the node can't be reached directly.
	// Nil: this node opens no tunnels. It must not block.
	Relays func(node string) []string
	// Silent lists the nodes that have answered pings before and don't now.
	// MonitorRoutes calls it several times a second. It must not block.
	Silent func() []string
	// Admit returns an error for a site whose peers must be refused; nil admits all.
	// It is called at each dial and each accept, after the connection was added to
	// the list that CloseAll and CloseRefused search. So once Admit refuses a site
	// and its connections are then closed, none is left.
	Admit func(site string) error
	// Removed says that a peer was removed from the cluster, or is empty; admitted is from
	// the peer's Membership. It is called after Admit, under the same rules. Nil: no peer
	// was.
	Removed func(peer Identity, admitted uint64) string
	// Member reports whether a peer that shows this node's cluster id is a member. It is
	// called after Removed, under the same rules. A peer without a cluster id, which may
	// open only KindGRPC, is not asked about. Nil: all are.
	Member func(peer Identity, theirs Membership) bool
	// OnRemoved is called when a peer of the same cluster refuses this node because it was
	// removed. It must not block. May be nil.
	OnRemoved func(peer Identity, why string)
	// OnNewerGeneration is called when a peer of the same cluster has a higher
	// generation: the cluster was recovered without this node. It must not block.
	OnNewerGeneration func(peer Identity, theirs agreed.Generation)
}

// Mesh is the rpc port: all connections between this node and its peers, in both
// directions.
type Mesh struct {
	opts      Options
	metrics   *metrics
	acceptLog *throttle.Lines
	serverTLS *tls.Config
	dialTCP   func(ctx context.Context, network, addr string) (net.Conn, error)
	transport *http.Transport

	conns      peerConns
	handshakes handshakeLimiter
	routes     routeTable
	relayed    relayLimiter
	timing     routeTiming

	tasksCtx  context.Context // of route probes and of closing replaced channels; ends in Close
	stopTasks context.CancelFunc
	tasks     sync.WaitGroup // everything that runs under tasksCtx

	mu        sync.Mutex // guards listeners, clients, closed
	listeners map[Kind]*kindListener
	clients   map[string]*Client
	closed    bool
}

// New makes a mesh. It accepts nothing before Serve, and dials only on request.
// Close it after everything that uses it has ended.
func New(o Options) *Mesh {
	if o.DialTimeout <= 0 {
		o.DialTimeout = defaultDialTimeout
	}
	o.MaxConns = min(cmp.Or(o.MaxConns, maxPeerConns), maxPeerConns)
	o.MaxHandshakes = min(cmp.Or(o.MaxHandshakes, maxHandshakes), maxHandshakes)
	metrics := newMetrics(o.Registerer)
	m := &Mesh{
		opts:       o,
		metrics:    metrics,
		acceptLog:  throttle.NewLines(),
		serverTLS:  o.Credentials.ServerTLS(),
		dialTCP:    o.Host.Dialer(&net.Dialer{KeepAliveConfig: peerKeepAlive, Control: setUserTimeout}),
		conns:      peerConns{all: map[*PeerConn]struct{}{}, limit: o.MaxConns, metrics: metrics},
		handshakes: newHandshakeLimiter(o.MaxHandshakes, handshakeTimeout),
		listeners:  map[Kind]*kindListener{},
		clients:    map[string]*Client{},
		routes:     newRouteTable(metrics),
		timing: routeTiming{
			tunnelDelay: defaultTunnelDelay, softTimeout: defaultSoftTimeout, minProbe: minProbeInterval,
			recheck: recheckInterval, confirm: confirmInterval, grace: replaceGrace,
		},
		relayed: relayLimiter{limit: maxRelayed, limitPerPeer: maxRelayedPerPeer, perPeer: map[string]int{}},
	}
	m.tasksCtx, m.stopTasks = context.WithCancel(context.Background())
	m.transport = m.newHTTPTransport()
	return m
}

// CloseKind aborts every open connection of a kind, dialled or accepted. It does
// not prevent new ones: for that, close the kind's listener or the Raft layer.
func (m *Mesh) CloseKind(kind Kind) {
	m.conns.abortWhere(func(c *PeerConn) bool { return c.kind == kind })
}

// CloseAll aborts every connection with the peers of a site.
func (m *Mesh) CloseAll(site string) {
	m.conns.abortWhere(func(c *PeerConn) bool { return c.peer.Site == site })
}

// CloseOutsiders aborts every accepted connection with a peer that had not joined a cluster
// when it was made.
func (m *Mesh) CloseOutsiders() {
	m.conns.abortWhere(func(c *PeerConn) bool { return c.direction == "accepted" && c.theirs.ClusterID == "" })
}

// CloseRefused aborts every connection with a site that Admit refuses now, or with a
// peer that was removed or is no member.
func (m *Mesh) CloseRefused() {
	m.conns.abortWhere(func(c *PeerConn) bool { return m.refuses(c) != nil })
}

// Close ends the gRPC channels, the listeners of all kinds and every connection,
// and waits for the route probes under way. Later dials fail with net.ErrClosed.
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
	m.stopTasks()
	m.tasks.Wait()
	return errors.Join(errs...)
}

// background runs a task that Close cancels and waits for. It reports false,
// without running it, if the mesh is closed.
func (m *Mesh) background(run func(ctx context.Context)) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return false
	}
	m.tasks.Go(func() { run(m.tasksCtx) })
	return true
}
