package mesh

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"time"

	"github.com/dsnode/dsnode/cluster/host"
)

// Dial opens a connection to the node of that name. The peer's certificate must
// carry that name, whatever the address. The error wraps ErrNoAddress,
// ErrWrongNode, ErrForeignCluster or ErrCertificateRefused, or it is a
// *RefusedError, if one of these is the reason.
//
// If the network fails the direct dial, a tunnel through a common peer is used
// instead. Once the direct route is known to be cut, later dials start with a
// tunnel.
func (m *Mesh) Dial(ctx context.Context, kind Kind, node string) (net.Conn, error) {
	addr, ok := m.opts.Address(node)
	if !ok {
		return nil, fmt.Errorf("dial node %s: %w", node, ErrNoAddress)
	}
	ctx, cancel := context.WithTimeout(ctx, m.opts.DialTimeout)
	defer cancel()
	conn, err := m.dialNode(ctx, kind, node, addr)
	if err != nil {
		return nil, fmt.Errorf("dial node %s at %s: %w", node, addr, err)
	}
	return conn, nil
}

// DialAddr opens a connection to whichever node of the cluster listens at an
// address: a seed, whose name is not known beforehand. It never uses a tunnel,
// because a relay can be asked only for a node's name.
func (m *Mesh) DialAddr(ctx context.Context, kind Kind, addr string) (*PeerConn, error) {
	ctx, cancel := context.WithTimeout(ctx, m.opts.DialTimeout)
	defer cancel()
	conn, err := m.dial(ctx, dialRequest{kind: kind}, addr)
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", addr, err)
	}
	return conn, nil
}

// dialRequest is what a dialler asks of the acceptor.
type dialRequest struct {
	kind   Kind
	node   string // the name that the acceptor must have; "" accepts any node
	target string // of KindTunnel: the node at the far end
}

// dial opens a TCP connection to an address and does the handshake. The caller
// bounds ctx.
func (m *Mesh) dial(ctx context.Context, request dialRequest, addr string) (*PeerConn, error) {
	raw, err := m.dialTCP(host.WithTraffic(ctx, string(request.kind)), "tcp", addr)
	if err != nil {
		m.metrics.failures.WithLabelValues("dialled", failureReason(err)).Inc()
		return nil, err
	}
	conn, err := m.clientHandshake(ctx, raw, request)
	if err != nil {
		_ = raw.Close() // the reason is err
		err = explainHandshake(err)
		m.countFailure("dialled", err)
		return nil, err
	}
	return conn, nil
}

// clientHandshake is the dialler's side of a handshake, over TCP or inside a
// tunnel. The caller closes raw on an error.
func (m *Mesh) clientHandshake(ctx context.Context, raw net.Conn, request dialRequest) (*PeerConn, error) {
	// Reads and writes of the preface take no context, so a deadline in the past
	// ends them.
	stop := context.AfterFunc(ctx, func() { _ = raw.SetDeadline(time.Unix(1, 0)) })
	defer stop()

	secure := tls.Client(raw, m.opts.Credentials.ClientTLS(request.node))
	if err := secure.HandshakeContext(ctx); err != nil {
		return nil, err
	}
	peer, err := ParseIdentity(secure.ConnectionState().PeerCertificates[0])
	if err != nil {
		return nil, err
	}
	self, identity := m.opts.Membership(), m.opts.Credentials.Identity()
	preface, err := encodePreface(prefaceRequest{
		Format: prefaceFormat, Kind: request.kind, ClusterID: self.ClusterID, Generation: self.Generation,
		Node: identity.Node, Site: identity.Site, Target: request.target, Admitted: self.Admitted, Ticket: self.Ticket,
	})
	if err != nil {
		return nil, err
	}
	if _, err := secure.Write(preface); err != nil {
		return nil, fmt.Errorf("write preface: %w", err)
	}
	answer, err := readPreface(secure)
	if err != nil {
		return nil, err
	}
	reply, refused := decodeReply(answer)
	theirs := reply.membership()
	m.reportNewerGeneration(self, theirs, peer)
	if refused == nil {
		refused = checkMembership(self, theirs, request.kind)
	}
	if refused != nil {
		if refused.ByPeer && refused.Code == CodeRemoved && m.opts.OnRemoved != nil && self.ClusterID != "" {
			m.opts.OnRemoved(peer, refused.Message)
		}
		return nil, refused
	}
	conn := newPeerConn(m, secure, raw, "dialled", peer, request.kind)
	conn.theirs, conn.founded = theirs, reply.Founded || theirs.ClusterID != ""
	if err := m.register(conn); err != nil {
		return nil, err
	}
	if !stop() {
		conn.unregister()
		return nil, context.Cause(ctx)
	}
	if err := raw.SetDeadline(time.Time{}); err != nil {
		conn.unregister()
		return nil, err
	}
	return conn, nil
}

// register adds a connection to the list that CloseKind, CloseAll and
// CloseRefused search, and only then asks Admit about its site, and whether the peer
// is a member and was not removed: see Options.Admit for the order.
func (m *Mesh) register(conn *PeerConn) error {
	if err := m.conns.add(conn); err != nil {
		return err
	}
	if refused := m.refuses(conn); refused != nil {
		conn.unregister()
		return refused
	}
	return nil
}

// refuses returns why a connection must not be, nil if it may.
func (m *Mesh) refuses(conn *PeerConn) *RefusedError {
	if m.opts.Admit != nil {
		if err := m.opts.Admit(conn.peer.Site); err != nil {
			return refuse(CodeIsolated, "%s", err)
		}
	}
	// A node that has not joined yet has a new disk, also if its name was removed.
	if m.opts.Removed != nil && conn.theirs.ClusterID != "" && conn.theirs.ClusterID == m.opts.Membership().ClusterID {
		if why := m.opts.Removed(conn.peer, conn.theirs.Admitted); why != "" {
			return refuse(CodeRemoved, "%s", why)
		}
	}
	if m.opts.Member != nil && conn.theirs.ClusterID != "" && !m.opts.Member(conn.peer, conn.theirs) {
		return refuse(CodeNotAdmitted, "node %s of site %s is not a member of the cluster", conn.peer.Node, conn.peer.Site)
	}
	return nil
}

func (m *Mesh) reportNewerGeneration(self, theirs Membership, peer Identity) {
	if m.opts.OnNewerGeneration != nil && self.ClusterID != "" && theirs.ClusterID == self.ClusterID &&
		theirs.Generation.Number > self.Generation.Number {
		m.opts.OnNewerGeneration(peer, theirs.Generation)
	}
}
