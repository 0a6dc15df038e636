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

// Serve accepts peers until ctx ends or the listener fails, and hands each to
// the listener of its kind. It closes the listener, ends the tunnels that this
// node relays, and waits for them and for the handshakes under way;
// connections that were handed over stay.
func (m *Mesh) Serve(ctx context.Context, ln net.Listener) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = ln.Close() }) // Accept then fails
	defer stop()

	var handshakes sync.WaitGroup
	defer handshakes.Wait()
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
			// Out of file descriptors, mostly: peers retry, and so do we.
			pause = min(max(2*pause, 5*time.Millisecond), time.Second)
			m.opts.Logger.Warn("accepting peers failed, trying again", "error", err, "pause", pause)
			select {
			case <-ctx.Done():
			case <-time.After(pause):
			}
			continue
		}
		arrival := m.arrivals.enter(ctx)
		handshakes.Go(func() {
			if tunnel := m.accept(arrival, raw); tunnel != nil {
				m.relay(ctx, tunnel)
			}
		})
	}
}

// accept takes one connection from TCP to its kind's listener, or closes it. A
// peer that wants a tunnel is given to the caller.
func (m *Mesh) accept(arrival *arrival, tcp net.Conn) (tunnel *PeerConn) {
	m.metrics.handshakes.Inc()
	defer m.metrics.handshakes.Dec()
	defer m.arrivals.leave(arrival)
	ctx := arrival.ctx
	stop := context.AfterFunc(ctx, func() { _ = tcp.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	tunePeerConn(tcp)

	raw := tcp
	conn, err := m.receive(ctx, raw)
	if err == nil && conn.kind == KindRelayed {
		// The node that the tunnel is for now shakes hands inside it, within the
		// same bounds, and is then a peer like any other.
		raw = conn
		conn, err = m.receive(ctx, raw)
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
		conn.forget()
	}
	if ctx.Err() != nil {
		err = fmt.Errorf("%w: %w", context.Cause(ctx), err)
	} else {
		linger(raw)
	}
	_ = raw.Close() // the reason is err
	err = explainHandshake(err)
	m.reportUnaccepted(tcp.RemoteAddr(), m.countFailure("accepted", err), err)
	return nil
}

func (m *Mesh) reportUnaccepted(remote net.Addr, reason string, err error) {
	switch reason {
	case "closed", "cancelled":
		// A load balancer's look at the port, a dialler that gave up, or our own end.
		m.opts.Logger.Debug("a peer's connection ended before it was accepted", "remote", remote.String(), "error", err)
		return
	}
	if unreported, ok := m.acceptLog.Allow(reason); ok {
		m.opts.Logger.Warn("a peer's connection was not accepted", "remote", remote.String(),
			"reason", reason, "error", err, "unreported", unreported)
	}
}

// linger lets a peer read the alert or the refusal that it was sent: closing a
// socket that still holds unread bytes resets it, and the reason is lost.
func linger(raw net.Conn) {
	half, ok := raw.(interface{ CloseWrite() error })
	if !ok || half.CloseWrite() != nil || raw.SetDeadline(time.Now().Add(lingerTimeout)) != nil {
		return
	}
	_, _ = io.CopyN(io.Discard, raw, prefaceMax) // whatever it is
}

// receive is the acceptor's side of a handshake, in a tunnel too: then raw is
// the tunnel's half here. The caller closes raw on an error.
func (m *Mesh) receive(ctx context.Context, raw net.Conn) (*PeerConn, error) {
	secure := tls.Server(raw, m.serverTLS)
	if err := secure.HandshakeContext(ctx); err != nil {
		return nil, err
	}
	peer, err := ParseIdentity(secure.ConnectionState().PeerCertificates[0])
	if err != nil {
		return nil, err
	}
	text, err := readPreface(secure)
	if err != nil {
		return nil, err
	}
	self := m.opts.Membership()
	request, refused := decodeRequest(text, peer)
	theirs := Membership{ClusterID: request.ClusterID, Generation: request.Generation}
	if refused == nil {
		m.noticeGeneration(self, theirs, peer)
		refused = judge(self, theirs, request.Kind)
	}
	conn := newPeerConn(secure, raw, m, "accepted")
	conn.peer, conn.membership, conn.kind, conn.target = peer, theirs, request.Kind, request.Target
	switch {
	case refused != nil:
	case request.Kind.ofTunnel() && conn.via != "":
		refused = &RefusedError{Code: CodeNoTunnel, Message: "a tunnel leads to a node and not into another tunnel"}
	case !request.Kind.ofTunnel() && !m.listening(request.Kind):
		refused = &RefusedError{Code: CodeKindClosed, Message: fmt.Sprintf("this node takes no %s connections now", request.Kind)}
	}
	if refused == nil {
		err := m.settle(conn)
		if err != nil && !errors.As(err, &refused) {
			return nil, err
		}
	}
	// The answer goes out before the refusal, so that both sides learn why.
	reply := prefaceReply{Format: prefaceFormat, ClusterID: self.ClusterID, Generation: self.Generation}
	if refused != nil {
		// "this node" is the other one to whoever reads it there.
		reply.Code, reply.Message = refused.Code, m.opts.Credentials.Identity().Node+" says: "+refused.Message
	}
	answer, err := appendPreface(nil, reply)
	if err == nil {
		_, err = secure.Write(answer)
	}
	if refused != nil {
		_ = secure.CloseWrite() // so that the answer is not lost to a reset
		return nil, refused
	}
	if err != nil {
		conn.forget()
		return nil, fmt.Errorf("answer preface: %w", err)
	}
	return conn, nil
}

// arrivals bounds the accepted connections that are not yet known peers. When
// it is full the oldest one goes: a peer is through in a few round trips, so
// what has waited longest is a scanner that says nothing.
type arrivals struct {
	slots chan struct{}
	limit time.Duration // from accept to hand-over
	mu    *sync.Mutex   // guards order
	order *list.List    // of *arrival, oldest first
}

type arrival struct {
	ctx    context.Context
	cancel context.CancelCauseFunc
	place  *list.Element
}

var errCrowded = errors.New("too many connections are shaking hands, the oldest was dropped")

func newArrivals(count int, limit time.Duration) arrivals {
	return arrivals{slots: make(chan struct{}, count), limit: limit, mu: new(sync.Mutex), order: list.New()}
}

// enter waits for a slot, which the oldest arrival gives up if need be. The
// arrival's context ends with ctx, at its deadline, or when it is pushed out.
func (a arrivals) enter(ctx context.Context) *arrival {
	select {
	case a.slots <- struct{}{}:
	default:
		a.mu.Lock()
		if oldest := a.order.Front(); oldest != nil {
			oldest.Value.(*arrival).cancel(errCrowded)
			a.order.Remove(oldest)
		}
		a.mu.Unlock()
		a.slots <- struct{}{} // the one pushed out, or another, is on its way
	}
	ctx, cancel := context.WithCancelCause(ctx)
	timer := time.AfterFunc(a.limit, func() { cancel(context.DeadlineExceeded) })
	one := &arrival{ctx: ctx, cancel: func(cause error) { timer.Stop(); cancel(cause) }}
	a.mu.Lock()
	one.place = a.order.PushBack(one)
	a.mu.Unlock()
	return one
}

func (a arrivals) leave(one *arrival) {
	one.cancel(context.Canceled)
	a.mu.Lock()
	a.order.Remove(one.place) // does nothing when it was pushed out
	a.mu.Unlock()
	<-a.slots
}
