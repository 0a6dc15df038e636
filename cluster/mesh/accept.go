package mesh

import (
	"container/list"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// Serve accepts peers until ctx ends or the listener fails, and hands each
// connection to the listener of its kind. Before it returns it closes ln and the
// tunnels that this node relays, and waits for those and for the handshakes under
// way. Connections that were handed over stay open.
func (m *Mesh) Serve(ctx context.Context, ln net.Listener) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = ln.Close() }) // Accept then fails
	defer stop()

	var running sync.WaitGroup // handshakes and relayed tunnels
	defer running.Wait()
	defer cancel() // before the wait
	var pause time.Duration
	for {
		raw, err := ln.Accept()
		switch {
		case err == nil:
			pause = 0
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("accept peers: %w", err)
		default:
			// Mostly a lack of file descriptors. Peers retry, so this does too.
			pause = min(max(2*pause, 5*time.Millisecond), time.Second)
			m.opts.Logger.Warn("could not accept a peer's connection, retrying", "err", err, "pause", pause)
			select {
			case <-ctx.Done():
			case <-time.After(pause):
			}
			continue
		}
		slot := m.handshakes.acquire(ctx)
		running.Go(func() {
			if tunnel := m.accept(slot, raw); tunnel != nil {
				m.relay(ctx, tunnel)
			}
		})
	}
}

// accept does the handshake on a TCP connection and hands the connection to its
// kind's listener, or closes it. A connection of KindTunnel is returned: the
// caller relays it.
func (m *Mesh) accept(slot *handshakeSlot, tcp net.Conn) (tunnel *PeerConn) {
	m.metrics.handshakes.Inc()
	defer m.metrics.handshakes.Dec()
	defer m.handshakes.release(slot)
	ctx := slot.ctx
	stop := context.AfterFunc(ctx, func() { _ = tcp.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	tunePeerConn(tcp)

	raw := tcp
	conn, err := m.serverHandshake(ctx, raw)
	if err == nil && conn.kind == KindRelayed {
		// A relay speaks for another node. That node now does its own handshake
		// inside the tunnel, under the same limits, and is then treated as any peer.
		raw = conn
		conn, err = m.serverHandshake(ctx, raw)
	}
	if err == nil {
		if stop() {
			err = tcp.SetDeadline(time.Time{})
		} else {
			err = context.Cause(ctx)
		}
		if err == nil {
			if conn.kind == KindTunnel {
				return conn
			}
			if err = m.deliver(ctx, conn); err == nil {
				return nil
			}
		}
		conn.unregister()
	}
	if ctx.Err() != nil {
		err = fmt.Errorf("%w: %w", context.Cause(ctx), err)
	} else {
		linger(raw)
	}
	_ = raw.Close() // the reason is err
	err = explainHandshake(err)
	reason := m.countFailure("accepted", err)
	m.countTurnedAway(reason)
	m.logNotAccepted(tcp.RemoteAddr(), reason, err)
	return nil
}

// endedByPeer reports whether nothing was refused: a load balancer's health check, a
// dialler that gave up, or this node's shutdown.
func endedByPeer(reason string) bool { return reason == "closed" || reason == "cancelled" }

func (m *Mesh) logNotAccepted(remote net.Addr, reason string, err error) {
	if endedByPeer(reason) {
		m.opts.Logger.Debug("a peer's connection ended during the handshake", "remote", remote.String(), "err", err)
		return
	}
	if unreported, ok := m.acceptLog.Allow(reason); ok {
		m.opts.Logger.Warn("a peer's connection was not accepted", "remote", remote.String(),
			"reason", reason, "err", err, "unreported", unreported)
	}
}

// linger gives the peer time to read the TLS alert or the refusal. Closing a
// socket that holds unread bytes resets the connection, and the peer would lose
// the reason.
func linger(raw net.Conn) {
	writer, ok := raw.(interface{ CloseWrite() error })
	if !ok || writer.CloseWrite() != nil || raw.SetDeadline(time.Now().Add(lingerTimeout)) != nil {
		return
	}
	_, _ = io.CopyN(io.Discard, raw, prefaceMax) // any end of it will do
}

// serverHandshake is the acceptor's side of a handshake, over TCP or inside a
// tunnel; in a tunnel raw is the connection from the relay. The caller closes raw
// on an error.
func (m *Mesh) serverHandshake(ctx context.Context, raw net.Conn) (*PeerConn, error) {
	secure := tls.Server(raw, m.serverTLS)
	if err := secure.HandshakeContext(ctx); err != nil {
		return nil, err
	}
	peer, err := ParseIdentity(secure.ConnectionState().PeerCertificates[0])
	if err != nil {
		return nil, err
	}
	preface, err := readPreface(secure)
	if err != nil {
		return nil, err
	}
	self := m.opts.Membership()
	request, refused := decodeRequest(preface, peer)
	if refused == nil {
		theirs := request.membership()
		m.reportNewerGeneration(self, theirs, peer)
		refused = checkMembership(self, theirs, request.Kind)
	}
	conn := newPeerConn(m, secure, raw, "accepted", peer, request.Kind)
	conn.target, conn.theirs = request.Target, request.membership()
	switch {
	case refused != nil:
	case request.Kind.ofTunnel() && conn.via != "":
		refused = refuse(CodeNoTunnel, "a tunnel must not run inside another tunnel")
	case !request.Kind.ofTunnel() && m.openListener(request.Kind) == nil:
		refused = refuse(CodeKindClosed, "this node accepts no %s connections now", request.Kind)
	}
	if refused == nil {
		err := m.register(conn)
		if err != nil && !errors.As(err, &refused) {
			return nil, err
		}
	}
	// The reply is sent on a refusal too, so that both sides know the reason.
	answer, err := m.encodeReply(self, request.ClusterID, refused)
	if err == nil {
		_, err = secure.Write(answer)
	}
	if refused != nil {
		_ = secure.CloseWrite() // a reset could destroy the reply
		return nil, refused
	}
	if err != nil {
		conn.unregister()
		return nil, fmt.Errorf("answer preface: %w", err)
	}
	return conn, nil
}

// handshakeLimiter bounds the number of accepted connections whose handshake has
// not ended. When all slots are taken, the oldest handshake is aborted: a peer
// needs only a few round trips, so the oldest is most likely a client that sends
// nothing.
type handshakeLimiter struct {
	slots chan struct{}
	limit time.Duration // from accept to hand-over
	mu    *sync.Mutex   // guards order
	order *list.List    // of *handshakeSlot, the oldest first
}

type handshakeSlot struct {
	ctx    context.Context
	cancel context.CancelCauseFunc
	place  *list.Element
}

var errTooManyHandshakes = errors.New("too many handshakes at once, the oldest was aborted")

func newHandshakeLimiter(count int, limit time.Duration) handshakeLimiter {
	return handshakeLimiter{slots: make(chan struct{}, count), limit: limit, mu: new(sync.Mutex), order: list.New()}
}

// acquire waits for a slot; if none is free it aborts the oldest handshake. The
// slot's context ends with ctx, after the time limit, or when the handshake is
// aborted in favour of a newer one.
func (h handshakeLimiter) acquire(ctx context.Context) *handshakeSlot {
	select {
	case h.slots <- struct{}{}:
	default:
		h.mu.Lock()
		if oldest := h.order.Front(); oldest != nil {
			oldest.Value.(*handshakeSlot).cancel(errTooManyHandshakes)
			h.order.Remove(oldest)
		}
		h.mu.Unlock()
		h.slots <- struct{}{} // the aborted handshake, or another one, frees a slot soon
	}
	ctx, cancel := context.WithCancelCause(ctx)
	timer := time.AfterFunc(h.limit, func() { cancel(context.DeadlineExceeded) })
	slot := &handshakeSlot{ctx: ctx, cancel: func(cause error) { timer.Stop(); cancel(cause) }}
	h.mu.Lock()
	slot.place = h.order.PushBack(slot)
	h.mu.Unlock()
	return slot
}

func (h handshakeLimiter) release(slot *handshakeSlot) {
	slot.cancel(context.Canceled)
	h.mu.Lock()
	h.order.Remove(slot.place) // a no-op if acquire has removed it
	h.mu.Unlock()
	<-h.slots
}
