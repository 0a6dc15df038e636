package mesh

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"time"
)

// A tunnel connects two nodes through a common peer when the network between them
// is cut:
//
//	dialler ──KindTunnel──▶ relay ──KindRelayed──▶ target
//	   └───── TLS, preface, the requested kind ─────┘
//
// Each of the two legs is an ordinary connection between peers with its own
// handshake, so a relay that refuses one of the sites makes no tunnel. Inside the
// legs dialler and target do an ordinary handshake with each other: there they
// check identity, cluster and generation, and there Admit is asked. The relay sees
// only ciphertext.

// maxRelaysAsked bounds the relays that one dial asks.
const maxRelaysAsked = 3

// errNoRelay means that no peer is known to hear the dialled node.
var errNoRelay = errors.New("no other node is known to reach it")

// tunnelError is a tunnel that could not be opened. It hides its cause from
// errors.Is and errors.As, because a relay's refusal is not the target's.
type tunnelError struct {
	relay string
	err   error
}

func (e *tunnelError) Error() string { return fmt.Sprintf("through %s: %v", e.relay, e.err) }

// isNetworkError reports whether the network caused a failed dial, so that another
// route may succeed. It is false for a refusal and for a wrong certificate: then
// the peer was reached.
func isNetworkError(err error) bool {
	var refused *RefusedError
	var tunnel *tunnelError
	var network *net.OpError
	switch {
	case err == nil, errors.As(err, &refused), errors.Is(err, context.Canceled):
		return false
	case errors.As(err, &tunnel), errors.Is(err, errNoRelay):
		return true
	}
	switch failureReason(err) {
	case "timeout", "connection_refused", "name_lookup", "closed":
		return true
	}
	return errors.As(err, &network) && network.Op == "dial"
}

type dialResult struct {
	conn *PeerConn
	err  error
}

// pendingDial is a dial in a goroutine of its own. It is not safe for concurrent
// use. A nil *pendingDial is a dial that was not started.
type pendingDial struct {
	cancel context.CancelFunc
	done   chan dialResult // nil after finish
}

func startDial(ctx context.Context, dial func(context.Context) (*PeerConn, error)) *pendingDial {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan dialResult, 1)
	go func() {
		conn, err := dial(ctx)
		done <- dialResult{conn, err}
	}()
	return &pendingDial{cancel: cancel, done: done}
}

// result is where the dial's result arrives; nil if the dial was not started or is
// finished.
func (d *pendingDial) result() <-chan dialResult {
	if d == nil {
		return nil
	}
	return d.done
}

// finish must be called after the result was received.
func (d *pendingDial) finish() {
	d.done = nil
	d.cancel()
}

// abandon cancels a dial under way, waits for its end and closes its connection.
// The wait is short: each step of a dial ends with its context.
func (d *pendingDial) abandon() {
	if d.result() == nil {
		return
	}
	d.cancel()
	if late := <-d.done; late.conn != nil {
		_ = late.conn.Close() // not used
	}
	d.finish()
}

// dialNode dials a node directly or through a relay. The caller bounds ctx.
func (m *Mesh) dialNode(ctx context.Context, kind Kind, node, addr string) (*PeerConn, error) {
	if m.opts.Relays == nil {
		return m.dial(ctx, dialRequest{kind: kind, node: node}, addr)
	}
	if m.routes.via(node) != "" {
		conn, err := m.dialTunnel(ctx, kind, node)
		if !isNetworkError(err) {
			return conn, err
		}
		m.probeRoute(node)
		conn, direct := m.dial(ctx, dialRequest{kind: kind, node: node}, addr)
		return conn, joinDialErrors(direct, err)
	}
	return m.dialBoth(ctx, kind, node, addr)
}

// joinDialErrors adds the tunnel's error to the direct dial's. Only the direct one
// is wrapped for errors.Is and errors.As, since a tunnelError hides its cause.
func joinDialErrors(direct, tunnel error) error {
	if direct == nil || errors.Is(tunnel, errNoRelay) {
		return direct
	}
	return fmt.Errorf("%w; and %w", direct, tunnel)
}

// dialBoth dials directly and, once that has failed or has run for tunnelDelay,
// through a relay as well. The first connection is used.
func (m *Mesh) dialBoth(ctx context.Context, kind Kind, node, addr string) (*PeerConn, error) {
	direct := startDial(ctx, func(ctx context.Context) (*PeerConn, error) {
		return m.dial(ctx, dialRequest{kind: kind, node: node}, addr)
	})
	var tunnel *pendingDial
	defer func() {
		direct.abandon()
		tunnel.abandon()
	}()
	delay := time.NewTimer(m.timing.tunnelDelay)
	defer delay.Stop()
	var directErr, tunnelErr error
	for {
		select {
		case <-delay.C:
		case r := <-direct.result():
			direct.finish()
			if !isNetworkError(r.err) {
				return r.conn, r.err
			}
			directErr = r.err
		case r := <-tunnel.result():
			tunnel.finish()
			if r.err == nil {
				m.probeRoute(node) // so that the next dial does not have to wait for tunnelDelay
			}
			if !isNetworkError(r.err) {
				return r.conn, r.err
			}
			tunnelErr = r.err
		}
		switch {
		case directErr != nil && tunnelErr != nil:
			return nil, joinDialErrors(directErr, tunnelErr)
		case tunnel == nil:
			tunnel = startDial(ctx, func(ctx context.Context) (*PeerConn, error) {
				return m.dialTunnel(ctx, kind, node)
			})
		}
	}
}

// dialTunnel dials a node through one of the peers that report hearing it.
func (m *Mesh) dialTunnel(ctx context.Context, kind Kind, node string) (*PeerConn, error) {
	lastErr := errNoRelay
	relays := m.relaysFor(node)
	for i, relay := range relays {
		// A relay that hangs must leave time for the next one.
		limit := m.opts.DialTimeout
		if i < len(relays)-1 {
			limit /= 2
		}
		conn, err := m.dialVia(ctx, kind, node, relay, limit)
		m.metrics.tunnels.WithLabelValues("dialled", tunnelResult(err)).Inc()
		if !isNetworkError(err) || ctx.Err() != nil {
			return conn, err
		}
		lastErr = err
	}
	return nil, lastErr
}

// relaysFor lists the relays to ask, the present one first.
func (m *Mesh) relaysFor(node string) []string {
	relays := slices.DeleteFunc(slices.Clone(m.opts.Relays(node)), func(relay string) bool {
		return m.routes.via(relay) != "" // only reached through a relay itself, and a tunnel has one hop
	})
	if via := m.routes.via(node); via != "" {
		if i := slices.Index(relays, via); i > 0 {
			copy(relays[1:i+1], relays[:i])
			relays[0] = via
		}
	}
	return relays[:min(len(relays), maxRelaysAsked)]
}

// dialVia dials a node through a certain relay.
func (m *Mesh) dialVia(ctx context.Context, kind Kind, node, relay string, limit time.Duration) (*PeerConn, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	addr, ok := m.opts.Address(relay)
	if !ok {
		return nil, &tunnelError{relay, ErrNoAddress}
	}
	leg, err := m.dial(ctx, dialRequest{kind: KindTunnel, node: relay, target: node}, addr)
	if err != nil {
		return nil, &tunnelError{relay, err}
	}
	conn, err := m.tunnelHandshake(ctx, leg, dialRequest{kind: kind, node: node})
	if err != nil {
		leg.unregister()
		leg.abort()
		return nil, err
	}
	return conn, nil
}

// tunnelHandshake waits until the relay has reached the target, then does the
// handshake with the target. leg is the connection with the relay.
func (m *Mesh) tunnelHandshake(ctx context.Context, leg *PeerConn, request dialRequest) (*PeerConn, error) {
	stop := context.AfterFunc(ctx, func() { _ = leg.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	answer, err := readPreface(leg)
	if err != nil {
		return nil, &tunnelError{leg.peer.Node, err}
	}
	if _, refused := decodeReply(answer); refused != nil {
		return nil, &tunnelError{leg.peer.Node, refused}
	}
	conn, err := m.clientHandshake(ctx, leg, request)
	if err == nil {
		return conn, nil
	}
	err = explainHandshake(err)
	m.countFailure("dialled", err)
	if isNetworkError(err) {
		return nil, &tunnelError{leg.peer.Node, err}
	}
	return nil, err // from the target, not from the relay
}

// tunnelResult maps the error of a tunnel dial to the metric's label "result".
func tunnelResult(err error) string {
	var tunnel *tunnelError
	var refused *RefusedError
	switch {
	case err == nil:
		return "ok"
	case errors.As(err, &tunnel):
		err = tunnel.err
	}
	if !errors.As(err, &refused) {
		return failureReason(err)
	}
	switch refused.Code {
	case CodeNoTunnel, CodeUnreached, CodeIsolated:
		return refused.Code
	}
	return "refused"
}
