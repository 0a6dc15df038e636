package mesh

import (
	"context"
	"errors"
	"io"
	"strings"
	"sync"
	"time"
)

// Bounds of the tunnels that a node relays for others.
const (
	maxRelayed        = 1024 // tunnels through this node
	maxRelayedPerPeer = 512  // of those, asked for by one peer

	relayBuffer = 16 << 10 // bytes for each direction: one TLS record
	// relayHalfOpen is how long one direction stays open after the other has ended.
	relayHalfOpen = 2 * time.Second
	// relayErrorMax bounds the error that a refusal quotes, in bytes.
	relayErrorMax = 512
)

// relayLimiter counts the tunnels through this node, by the peer that asked.
type relayLimiter struct {
	limit, limitPerPeer int

	mu      sync.Mutex // guards total, perPeer
	total   int
	perPeer map[string]int
}

func (r *relayLimiter) acquire(node string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.total >= r.limit || r.perPeer[node] >= r.limitPerPeer {
		return false
	}
	r.total++
	r.perPeer[node]++
	return true
}

func (r *relayLimiter) release(node string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.total--
	if r.perPeer[node]--; r.perPeer[node] == 0 {
		delete(r.perPeer, node)
	}
}

// relay carries a tunnel for a peer until one of the legs or ctx ends. Both legs
// are in the list of open connections with their sites, so CloseAll and
// CloseRefused on the relay end the tunnels from and to a site.
func (m *Mesh) relay(ctx context.Context, from *PeerConn) {
	defer func() { _ = from.Close() }() // nothing is left to send
	stop := context.AfterFunc(ctx, from.abort)
	defer stop()

	if !m.relayed.acquire(from.peer.Node) {
		m.answerTunnel(from, refuse(CodeNoTunnel, "this node relays too many tunnels"))
		return
	}
	defer m.relayed.release(from.peer.Node)
	to, refused := m.dialTarget(ctx, from)
	if refused != nil {
		m.answerTunnel(from, refused)
		return
	}
	defer func() { _ = to.Close() }()
	if m.answerTunnel(from, nil) {
		splice(ctx, from, to)
	}
}

// dialTarget dials a tunnel's target, and only directly: with two relays, neither
// would know the node at the far side of the other and could not refuse its site.
func (m *Mesh) dialTarget(ctx context.Context, from *PeerConn) (*PeerConn, *RefusedError) {
	target := from.target
	if target == from.peer.Node || target == m.opts.Credentials.Identity().Node {
		return nil, refuse(CodeNoTunnel, "the target of a tunnel must be a third node")
	}
	addr, ok := m.opts.Address(target)
	if !ok {
		return nil, refuse(CodeUnreached, "this node knows no address of %s", target)
	}
	if via := m.routes.via(target); via != "" {
		return nil, refuse(CodeUnreached, "this node reaches %s only through %s", target, via)
	}
	ctx, cancel := context.WithTimeout(ctx, m.opts.DialTimeout) // the asking node waits no longer
	defer cancel()
	to, err := m.dial(ctx, dialRequest{kind: KindRelayed, node: target}, addr)
	if err != nil {
		reason := err.Error()
		return nil, refuse(CodeUnreached, "%s", strings.ToValidUTF8(reason[:min(len(reason), relayErrorMax)], ""))
	}
	return to, nil
}

// answerTunnel sends the second reply of a KindTunnel connection. It returns true
// if the tunnel was accepted and the peer was told so.
func (m *Mesh) answerTunnel(from *PeerConn, refused *RefusedError) bool {
	result := "ok"
	if refused != nil {
		result = refused.Code
	}
	m.metrics.tunnels.WithLabelValues("relayed", result).Inc()
	answer, err := m.encodeReply(m.opts.Membership(), from.theirs.ClusterID, refused)
	if err == nil {
		err = errors.Join(from.SetWriteDeadline(time.Now().Add(m.opts.DialTimeout)), writeAll(from, answer), from.SetWriteDeadline(time.Time{}))
	}
	return err == nil && refused == nil
}

func writeAll(to io.Writer, b []byte) error {
	_, err := to.Write(b)
	return err
}

// splice copies bytes in both directions until both have ended, one has failed, or
// ctx ends.
func splice(ctx context.Context, a, b *PeerConn) {
	abort := func() { a.abort(); b.abort() }
	stop := context.AfterFunc(ctx, abort)
	defer stop()
	done := make(chan struct{})
	go func() {
		defer close(done)
		copyDirection(a, b, abort)
	}()
	copyDirection(b, a, abort)
	<-done
}

// copyDirection copies one direction of a tunnel. It passes TLS's close_notify on,
// so that bytes under way in the other direction still arrive; any error aborts
// both directions.
func copyDirection(to, from *PeerConn, abort func()) {
	_, err := io.CopyBuffer(to, from, make([]byte, relayBuffer))
	if err == nil {
		err = errors.Join(to.CloseWrite(), to.SetReadDeadline(time.Now().Add(relayHalfOpen)))
	}
	if err != nil {
		abort()
	}
}
