package mesh

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"time"
)

// A tunnel reaches a node through a peer of both when the direct way is cut:
//
//	here ──KindTunnel──▶ relay ──KindRelayed──▶ node
//	└──────── TLS, preface, the wished kind ────────┘
//
// Each half is a connection between peers like any other, with a handshake of
// its own, so a relay that does not admit one of the sites makes none. Inside
// both is an ordinary handshake from end to end: who is there, of which cluster
// and generation, and whether this node admits it, is found out there, and the
// relay carries ciphertext.

// Bounds of a dial that the direct way does not answer.
const (
	// wayHeadStart is what the direct way gets before a relay is asked too:
	// more than three round trips between far cities.
	wayHeadStart = 500 * time.Millisecond
	// maxRelaysAsked bounds the peers asked in one dial.
	maxRelaysAsked = 3
)

// errNoRelay: no common peer is known.
var errNoRelay = errors.New("no other node is known to reach it")

// detourError is a tunnel that didn't come about. It hides its cause from
// errors.Is and As: what a relay refuses says nothing of the node dialled.
type detourError struct {
	relay string
	err   error
}

func (e *detourError) Error() string { return fmt.Sprintf("through %s: %v", e.relay, e.err) }

// cutOff reports whether an error is the network's: another way may do better.
// A peer that refuses, or is not who it should be, was reached.
func cutOff(err error) bool {
	var refused *RefusedError
	var detour *detourError
	var network *net.OpError
	switch {
	case err == nil, errors.As(err, &refused), errors.Is(err, context.Canceled):
		return false
	case errors.As(err, &detour), errors.Is(err, errNoRelay):
		return true
	}
	switch handshakeReason(err) {
	case "timeout", "connection_refused", "name_lookup", "closed":
		return true
	}
	return errors.As(err, &network) && network.Op == "dial"
}

// dialled is how a dial ended.
type dialled struct {
	conn *PeerConn
	err  error
}

// dialling is a dial under way. One goroutine uses it.
type dialling struct {
	end   context.CancelFunc
	ended chan dialled // nil once its end was seen
}

func startDial(ctx context.Context, dial func(context.Context) (*PeerConn, error)) *dialling {
	ctx, end := context.WithCancel(ctx)
	ended := make(chan dialled, 1)
	go func() {
		conn, err := dial(ctx)
		ended <- dialled{conn, err}
	}()
	return &dialling{end: end, ended: ended}
}

// awaited is where its end arrives; nil when there is nothing to wait for.
func (d *dialling) awaited() <-chan dialled {
	if d == nil {
		return nil
	}
	return d.ended
}

// over says that its end was seen.
func (d *dialling) over() {
	d.ended = nil
	d.end()
}

// abandon ends it and waits for that: each step of a dial ends with its context.
func (d *dialling) abandon() {
	if d.awaited() == nil {
		return
	}
	d.end()
	if late := <-d.ended; late.conn != nil {
		_ = late.conn.Close() // nobody wants it any more
	}
	d.over()
}

// dialAnyWay reaches a node directly or through a common peer. The caller
// bounds ctx.
func (m *Mesh) dialAnyWay(ctx context.Context, kind Kind, node, addr string) (*PeerConn, error) {
	if m.opts.Relays == nil {
		return m.dial(ctx, greeting{kind: kind, node: node}, addr)
	}
	if m.ways.via(node) != "" {
		conn, err := m.dialDetour(ctx, kind, node)
		if !cutOff(err) {
			return conn, err
		}
		m.Doubt(node)
		conn, direct := m.dial(ctx, greeting{kind: kind, node: node}, addr)
		return conn, bothWays(direct, err)
	}
	return m.race(ctx, kind, node, addr)
}

// bothWays is the error of the direct way, with what became of the other one.
func bothWays(direct, detour error) error {
	if direct == nil || errors.Is(detour, errNoRelay) {
		return direct
	}
	return fmt.Errorf("%w; and %w", direct, detour)
}

// race dials directly and, when that fails or takes long, through a peer too.
// The first to come through wins.
func (m *Mesh) race(ctx context.Context, kind Kind, node, addr string) (*PeerConn, error) {
	direct := startDial(ctx, func(ctx context.Context) (*PeerConn, error) {
		return m.dial(ctx, greeting{kind: kind, node: node}, addr)
	})
	var detour *dialling
	defer func() {
		direct.abandon()
		detour.abandon()
	}()
	ahead := time.NewTimer(m.timing.headStart)
	defer ahead.Stop()
	var directErr, detourErr error
	for {
		select {
		case <-ahead.C:
		case r := <-direct.awaited():
			direct.over()
			if !cutOff(r.err) {
				return r.conn, r.err
			}
			directErr = r.err
		case r := <-detour.awaited():
			detour.over()
			if r.err == nil {
				m.Doubt(node) // the next dial should not have to wait
			}
			if !cutOff(r.err) {
				return r.conn, r.err
			}
			detourErr = r.err
		}
		switch {
		case directErr != nil && detourErr != nil:
			return nil, bothWays(directErr, detourErr)
		case detour == nil:
			detour = startDial(ctx, func(ctx context.Context) (*PeerConn, error) {
				return m.dialDetour(ctx, kind, node)
			})
		}
	}
}

// dialDetour reaches a node through one of the peers that say they hear it.
func (m *Mesh) dialDetour(ctx context.Context, kind Kind, node string) (*PeerConn, error) {
	failed := errNoRelay
	relays := m.relaysFor(node)
	for i, relay := range relays {
		// One that hangs leaves time for the next; the last may take all of it.
		limit := m.opts.DialTimeout
		if i < len(relays)-1 {
			limit /= 2
		}
		conn, err := m.dialThrough(ctx, kind, node, relay, limit)
		m.metrics.tunnels.WithLabelValues("dialled", tunnelResult(err)).Inc()
		if !cutOff(err) || ctx.Err() != nil {
			return conn, err
		}
		failed = err
	}
	return nil, failed
}

// relaysFor is who may be asked, the present relay first.
func (m *Mesh) relaysFor(node string) []string {
	relays := slices.DeleteFunc(slices.Clone(m.opts.Relays(node)), func(relay string) bool {
		return m.ways.via(relay) != "" // one hop: it is cut off itself
	})
	if via := m.ways.via(node); via != "" {
		if i := slices.Index(relays, via); i > 0 {
			copy(relays[1:i+1], relays[:i])
			relays[0] = via
		}
	}
	return relays[:min(len(relays), maxRelaysAsked)]
}

// dialThrough reaches a node through a certain peer.
func (m *Mesh) dialThrough(ctx context.Context, kind Kind, node, relay string, limit time.Duration) (*PeerConn, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	addr, ok := m.opts.Address(relay)
	if !ok {
		return nil, &detourError{relay, ErrNoAddress}
	}
	half, err := m.dial(ctx, greeting{kind: KindTunnel, node: relay, target: node}, addr)
	if err != nil {
		return nil, &detourError{relay, err}
	}
	conn, err := m.greetThrough(ctx, half, greeting{kind: kind, node: node})
	if err != nil {
		half.forget()
		half.cut()
		return nil, err
	}
	return conn, nil
}

func (m *Mesh) greetThrough(ctx context.Context, half *PeerConn, to greeting) (*PeerConn, error) {
	stop := context.AfterFunc(ctx, func() { _ = half.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	text, err := readPreface(half)
	if err != nil {
		return nil, &detourError{half.peer.Node, err}
	}
	if _, refused := decodeReply(text); refused != nil {
		return nil, &detourError{half.peer.Node, refused}
	}
	conn, err := m.greet(ctx, half, to)
	if err == nil {
		return conn, nil
	}
	err = explainHandshake(err)
	m.countFailure("dialled", err)
	if cutOff(err) {
		return nil, &detourError{half.peer.Node, err}
	}
	return nil, err // its own word, though it came through another
}

// tunnelResult names how a tunnel came about, or why not.
func tunnelResult(err error) string {
	var detour *detourError
	var refused *RefusedError
	switch {
	case err == nil:
		return "ok"
	case errors.As(err, &detour):
		err = detour.err
	}
	if !errors.As(err, &refused) {
		return handshakeReason(err)
	}
	switch refused.Code {
	case CodeNoTunnel, CodeUnreached, CodeIsolated:
		return refused.Code
	}
	return "refused"
}
