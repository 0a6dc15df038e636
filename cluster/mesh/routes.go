package mesh

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/clock"
)

// The route to a node is direct or through a relay. A probe finds out which one
// works: it dials the node directly and, if that takes long, through a relay too.

const (
	// defaultTunnelDelay is how long a direct dial runs before a relay is tried as
	// well: more than three round trips between distant cities.
	defaultTunnelDelay = 500 * time.Millisecond
	// defaultSoftTimeout is how long a probe's direct dial may take before an open
	// tunnel becomes the route. It is longer than TCP's first retransmission, which
	// comes after one second.
	defaultSoftTimeout = 1200 * time.Millisecond
	// minProbeInterval is the shortest time between two probes of one node.
	minProbeInterval = time.Second
	// recheckInterval is how often the direct route is tried while it is confirmed to
	// be cut; confirmInterval is the same while that is not confirmed.
	recheckInterval = 3 * time.Second
	confirmInterval = 500 * time.Millisecond
	// confirmDials is how many of a node's direct dials in a row must fail, or
	// succeed, to confirm that the direct route is cut, or works again.
	confirmDials = 2
	// httpDrainTime is for how long idle HTTP connections are closed after the direct
	// route works again, so that HTTP leaves the tunnel. Connections that are never
	// idle may stay in it longer.
	httpDrainTime = 30 * time.Second
	// monitorInterval is the tick of MonitorRoutes.
	monitorInterval = 125 * time.Millisecond
	// maxProbes bounds the probes at once, over all nodes.
	maxProbes = 64
)

// routeTiming are the times that tests shorten.
type routeTiming struct {
	tunnelDelay, softTimeout, minProbe, recheck, confirm, grace time.Duration
}

// routeTable holds the routes to nodes. A node that is not in it is assumed to be
// reached directly.
type routeTable struct {
	metrics *metrics

	mu     sync.Mutex // guards byNode, probes
	byNode map[string]*route
	probes int // under way
}

type route struct {
	relay     string    // "": direct
	since     time.Time // when relay changed
	probing   bool
	lastProbe time.Time // when it ended
	// failures and successes count the probes' direct dials in a row.
	failures, successes int
}

func newRouteTable(metrics *metrics) routeTable {
	return routeTable{metrics: metrics, byNode: map[string]*route{}}
}

// via is the relay to a node; "" if the node is reached directly.
func (t *routeTable) via(node string) string {
	t.mu.Lock()
	defer t.mu.Unlock()
	if r, ok := t.byNode[node]; ok {
		return r.relay
	}
	return ""
}

// beginProbe reports whether a node may be probed now; endProbe must follow. It is
// false while a probe of the node is under way, for the given time after one, and
// while too many nodes are probed.
func (t *routeTable) beginProbe(node string, after time.Duration) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	r, ok := t.byNode[node]
	if !ok {
		if len(t.byNode) >= agreed.MaxNodes {
			return false
		}
		r = &route{}
		t.byNode[node] = r
	}
	if r.probing || t.probes >= maxProbes || time.Since(r.lastProbe) < after {
		return false
	}
	r.probing = true
	t.probes++
	return true
}

func (t *routeTable) endProbe(node string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.probes--
	if r, ok := t.byNode[node]; ok { // it may have been removed during the probe
		r.probing, r.lastProbe = false, time.Now()
	}
}

// setRelay changes the route to a node; "" is the direct one. It returns the relay
// before, and how many direct dials in a row have failed.
func (t *routeTable) setRelay(node, relay string) (before string, failures int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	r, ok := t.byNode[node]
	if !ok {
		return relay, 0 // removed during the probe
	}
	before = r.relay
	if before != relay {
		r.relay, r.since, r.successes = relay, time.Now(), 0
	}
	t.metrics.viaRelay.Set(float64(t.viaRelayLocked()))
	return before, r.failures
}

// directFor reports whether a node is reached directly and not being probed, and
// for how long its route has been the direct one.
func (t *routeTable) directFor(node string) (age time.Duration, direct bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	r, ok := t.byNode[node]
	switch {
	case !ok:
		return 0, false
	case r.since.IsZero():
		return httpDrainTime, r.relay == "" && !r.probing
	}
	return time.Since(r.since), r.relay == "" && !r.probing
}

// countDirect counts a probe's direct dial. It returns how many have failed in a
// row, 0 if this one succeeded.
func (t *routeTable) countDirect(node string, ok bool) (failures int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	r, known := t.byNode[node]
	switch {
	case !known:
	case ok:
		r.failures = 0
		r.successes++
	default:
		r.successes = 0
		r.failures++
		return r.failures
	}
	return 0
}

// successes is how many direct dials of probes have succeeded in a row.
func (t *routeTable) successes(node string) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	if r, ok := t.byNode[node]; ok {
		return r.successes
	}
	return 0
}

// due lists the nodes behind a relay whose direct route should be tried again.
func (t *routeTable) due(timing routeTiming) []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	var nodes []string
	for node, r := range t.byNode {
		wait := timing.confirm
		if r.failures >= confirmDials {
			wait = timing.recheck
		}
		if r.relay != "" && !r.probing && time.Since(r.lastProbe) >= wait {
			nodes = append(nodes, node)
		}
	}
	return nodes
}

func (t *routeTable) remove(node string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.byNode, node)
	t.metrics.viaRelay.Set(float64(t.viaRelayLocked()))
}

func (t *routeTable) viaRelayLocked() int {
	n := 0
	for _, r := range t.byNode {
		if r.relay != "" {
			n++
		}
	}
	return n
}

// Via is the relay through which a node is reached at present; "" if it is reached
// directly, or not at all.
func (m *Mesh) Via(node string) (relay string) { return m.routes.via(node) }

// MonitorRoutes keeps the routes up to date until ctx ends. It probes nodes that
// Options.Silent reports, and tries the direct route again to nodes behind a relay.
// When the direct route works it moves their connections back to it.
func (m *Mesh) MonitorRoutes(ctx context.Context) error {
	tick := time.NewTimer(monitorInterval)
	defer tick.Stop()
	var lastDrain time.Time
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		tick.Reset(clock.UntilTick(m.opts.Host.Boottime(), monitorInterval))
		if m.opts.Silent != nil {
			for _, node := range m.opts.Silent() {
				m.probeRoute(node)
			}
		}
		for _, node := range m.routes.due(m.timing) {
			m.startProbe(node, 0, m.retryDirect)
		}
		if time.Since(lastDrain) >= m.timing.recheck {
			lastDrain = time.Now()
			m.drainTunnels()
		}
	}
}

// probeRoute starts a probe of a node that does not answer. It does not block, and
// does nothing if no peer hears the node: then the node itself is down.
func (m *Mesh) probeRoute(node string) {
	if m.opts.Relays == nil || len(m.opts.Relays(node)) == 0 {
		return
	}
	m.startProbe(node, m.timing.minProbe, m.probe)
}

func (m *Mesh) startProbe(node string, after time.Duration, probe func(ctx context.Context, node, addr string)) {
	addr, ok := m.opts.Address(node)
	if !ok || !m.routes.beginProbe(node, after) {
		return
	}
	if !m.background(func(ctx context.Context) {
		defer m.routes.endProbe(node)
		ctx, cancel := context.WithTimeout(ctx, m.opts.DialTimeout)
		defer cancel()
		probe(ctx, node, addr)
	}) {
		m.routes.endProbe(node)
	}
}

// probe dials a node directly and, once that has failed or has run for tunnelDelay,
// through a relay as well. The direct route is used if its dial succeeds. A relay
// becomes the route only if a tunnel through it is open and the direct dial has
// failed or has run for softTimeout: without a tunnel nothing proves that the node
// is up and the network is the cause.
func (m *Mesh) probe(ctx context.Context, node, addr string) {
	direct := startDial(ctx, func(ctx context.Context) (*PeerConn, error) {
		return m.dial(ctx, dialRequest{kind: KindGRPC, node: node}, addr)
	})
	var tunnel *pendingDial
	var unused *PeerConn // an open tunnel that useRelay has not been given
	defer func() {
		direct.abandon()
		tunnel.abandon()
		if unused != nil {
			_ = unused.Close() // the direct route works
		}
	}()
	delay, soft := time.NewTimer(m.timing.tunnelDelay), time.NewTimer(m.timing.softTimeout)
	defer delay.Stop()
	defer soft.Stop()
	var directErr, tunnelErr error
	late := false
	for directErr == nil || tunnel.result() != nil {
		select {
		case <-delay.C:
		case <-soft.C:
			late = true
		case r := <-direct.result():
			direct.finish()
			if known, works := m.recordDirect(ctx, node, r); !known || works {
				if works {
					m.useDirect(node)
				}
				return
			}
			directErr = r.err
		case r := <-tunnel.result():
			tunnel.finish()
			unused, tunnelErr = r.conn, r.err
		}
		if tunnel == nil {
			tunnel = startDial(ctx, func(ctx context.Context) (*PeerConn, error) {
				return m.dialTunnel(ctx, KindGRPC, node)
			})
		}
		if unused != nil && (directErr != nil || late) {
			m.useRelay(node, unused, directErr)
			unused = nil
		}
	}
	if isNetworkError(tunnelErr) {
		m.clearRelay(node, joinDialErrors(directErr, tunnelErr))
	}
}

// retryDirect is the probe of a node behind a relay: it only dials directly.
func (m *Mesh) retryDirect(ctx context.Context, node, addr string) {
	conn, err := m.dial(ctx, dialRequest{kind: KindGRPC, node: node}, addr)
	switch known, works := m.recordDirect(ctx, node, dialResult{conn, err}); {
	case works && m.routes.successes(node) >= confirmDials:
		m.useDirect(node)
	case known && !works && len(m.opts.Relays(node)) == 0:
		m.clearRelay(node, err)
	}
}

// recordDirect counts the result of a probe's direct dial. known is false if the
// mesh was closed during the dial.
func (m *Mesh) recordDirect(ctx context.Context, node string, r dialResult) (known, works bool) {
	if r.conn != nil {
		_ = r.conn.Close() // only opened as a test
	}
	if errors.Is(ctx.Err(), context.Canceled) {
		return false, false
	}
	works = !isNetworkError(r.err)
	if m.routes.countDirect(node, works) == confirmDials && m.routes.via(node) != "" {
		m.abortDirect(node)
	}
	return true, works
}

// useRelay makes tunnel's relay the route to a node. The tunnel itself becomes the
// first connection of the node's new gRPC channel, so pings are answered again at
// once.
func (m *Mesh) useRelay(node string, tunnel *PeerConn, directErr error) {
	before, failures := m.routes.setRelay(node, tunnel.via)
	if before != tunnel.via {
		if directErr == nil {
			directErr = fmt.Errorf("not connected after %v", m.timing.softTimeout)
		}
		m.opts.Logger.Warn("node can't be reached directly, using a relay", "peer", node, "relay", tunnel.via, "err", directErr)
	}
	m.replaceClient(node, tunnel)
	m.transport.CloseIdleConnections() // or the next request would wait for its timeout on a dead one
	switch {
	case before != "" && before != tunnel.via:
		m.conns.abortWhere(func(c *PeerConn) bool { return c.dialledTo(node) && c.via == before })
	case failures >= confirmDials:
		m.abortDirect(node)
	}
}

// useDirect makes the direct route the node's route again. HTTP requests under way
// stay in their tunnel.
func (m *Mesh) useDirect(node string) {
	before, _ := m.routes.setRelay(node, "")
	if before == "" {
		return
	}
	m.opts.Logger.Info("node can be reached directly again", "peer", node, "old_relay", before)
	m.replaceClient(node, nil)
	m.transport.CloseIdleConnections()
	m.conns.abortWhere(func(c *PeerConn) bool { return c.dialledTo(node) && c.via != "" && c.kind == KindRaft })
}

// clearRelay drops a relay that does not work. No working route is known then, so
// the next dial tries both.
func (m *Mesh) clearRelay(node string, err error) {
	if before, _ := m.routes.setRelay(node, ""); before != "" {
		m.opts.Logger.Warn("node can be reached neither directly nor through a relay", "peer", node, "old_relay", before, "err", err)
	}
}

// abortDirect aborts direct connections to a node that hang because the network is
// cut, so that their users retry. It needs more evidence than a new route for new
// connections (confirmDials), because on a lossy link some of them still work.
func (m *Mesh) abortDirect(node string) {
	m.conns.abortWhere(func(c *PeerConn) bool { return c.dialledTo(node) && c.via == "" })
}

// drainTunnels moves what still uses a tunnel to the direct route, if that works.
// It interrupts no gRPC call and no HTTP request.
func (m *Mesh) drainTunnels() {
	channels := map[string]bool{}
	closeIdle := false
	m.conns.abortWhere(func(c *PeerConn) bool {
		if c.direction != "dialled" || c.via == "" || time.Since(c.opened) < m.timing.recheck {
			return false
		}
		age, direct := m.routes.directFor(c.peer.Node)
		if !direct {
			return false
		}
		switch c.kind {
		case KindGRPC:
			channels[c.peer.Node] = true
		case KindHTTP:
			closeIdle = closeIdle || age < httpDrainTime
		case KindRaft:
			return true // Raft dials again at once
		}
		return false
	})
	for node := range channels {
		if client, err := m.Client(node); err == nil && client.tunnelled() {
			m.replaceClient(node, nil)
		}
	}
	if closeIdle {
		m.transport.CloseIdleConnections()
	}
}
