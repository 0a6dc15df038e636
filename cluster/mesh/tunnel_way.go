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

// Bounds of finding out which way to a node works.
const (
	// waySoft is how long a direct dial may take before a tunnel that stands
	// already takes over. It is longer than the retransmission of a lost first
	// packet, which comes after one second.
	waySoft = 1200 * time.Millisecond
	// wayEvery is the least time between two examinations of one node.
	wayEvery = time.Second
	// wayRecheck is how often the direct way is tried while it is known to be
	// cut, wayConfirm how soon again when it is not certain.
	wayRecheck = 3 * time.Second
	wayConfirm = 500 * time.Millisecond
	// wayCertain is how many direct dials in a row must fail, or come through,
	// until that is certain.
	wayCertain = 2
	// wayLeave is how long HTTP connections are made to leave a tunnel once the
	// direct way works again; those that are never idle may stay longer.
	wayLeave = 30 * time.Second
	// wayLook is the pace of KeepWays.
	wayLook = 125 * time.Millisecond
	// maxExamined bounds the nodes examined at once.
	maxExamined = 64
)

// wayTiming are the times that tests shorten.
type wayTiming struct {
	headStart, soft, every, recheck, confirm, grace time.Duration
}

func defaultWayTiming() wayTiming {
	return wayTiming{
		headStart: wayHeadStart, soft: waySoft, every: wayEvery, recheck: wayRecheck, confirm: wayConfirm, grace: replaceGrace,
	}
}

// ways is how nodes are reached. A node without an entry is reached directly,
// as far as anybody knows.
type ways struct {
	metrics *metrics

	mu        sync.Mutex // guards of, examining
	of        map[string]*way
	examining int
}

type way struct {
	via       string    // empty: direct
	since     time.Time // when via changed
	examining bool
	examined  time.Time // when the newest examination ended
	// failed and worked count the direct dials of examinations, in a row.
	failed, worked int
}

func newWays(metrics *metrics) ways {
	return ways{metrics: metrics, of: map[string]*way{}}
}

// via is the node through which this one is reached, empty for directly.
func (w *ways) via(node string) string {
	w.mu.Lock()
	defer w.mu.Unlock()
	if known, ok := w.of[node]; ok {
		return known.via
	}
	return ""
}

// begin takes the right to examine a node; end gives it back. There is none
// while it is being examined, shortly after, or when too many are.
func (w *ways) begin(node string, every time.Duration) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	known, ok := w.of[node]
	if !ok {
		if len(w.of) >= agreed.MaxNodes {
			return false
		}
		known = &way{}
		w.of[node] = known
	}
	if known.examining || w.examining >= maxExamined || time.Since(known.examined) < every {
		return false
	}
	known.examining = true
	w.examining++
	return true
}

func (w *ways) end(node string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.examining--
	if known, ok := w.of[node]; ok { // else forgotten meanwhile
		known.examining, known.examined = false, time.Now()
	}
}

// set says through whom a node is reached from now on. It gives what was, and
// how many direct dials have failed in a row.
func (w *ways) set(node, via string) (before string, failed int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	known, ok := w.of[node]
	if !ok {
		return via, 0 // forgotten meanwhile
	}
	before = known.via
	if before != via {
		known.via, known.since, known.worked = via, time.Now(), 0
	}
	w.metrics.detours.Set(float64(w.detoursLocked()))
	return before, known.failed
}

// left reports whether a node that was reached through another is reached
// directly now, and for how long.
func (w *ways) left(node string) (since time.Duration, direct bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	known, ok := w.of[node]
	switch {
	case !ok:
		return 0, false
	case known.since.IsZero():
		return wayLeave, known.via == "" && !known.examining
	}
	return time.Since(known.since), known.via == "" && !known.examining
}

// tried counts a direct dial of an examination. It gives how many have failed
// in a row, 0 when this one worked.
func (w *ways) tried(node string, worked bool) (failed int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	known, ok := w.of[node]
	switch {
	case !ok:
	case worked:
		known.failed = 0
		known.worked++
	default:
		known.worked = 0
		known.failed++
		return known.failed
	}
	return 0
}

// worked is how many direct dials of examinations have worked in a row.
func (w *ways) worked(node string) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	if known, ok := w.of[node]; ok {
		return known.worked
	}
	return 0
}

// due are the nodes with a detour whose direct way should be tried again.
func (w *ways) due(t wayTiming) []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	var nodes []string
	for node, known := range w.of {
		wait := t.confirm
		if known.failed >= wayCertain {
			wait = t.recheck
		}
		if known.via != "" && !known.examining && time.Since(known.examined) >= wait {
			nodes = append(nodes, node)
		}
	}
	return nodes
}

func (w *ways) forget(node string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.of, node)
	w.metrics.detours.Set(float64(w.detoursLocked()))
}

func (w *ways) detoursLocked() int {
	n := 0
	for _, known := range w.of {
		if known.via != "" {
			n++
		}
	}
	return n
}

// Way is the node through which this one is reached at present, empty when it
// is reached directly, or not at all.
func (m *Mesh) Way(node string) (via string) { return m.ways.via(node) }

// KeepWays finds out, until ctx ends, which nodes are cut off and whether they
// are reached through another, and goes back to the direct way when it works.
func (m *Mesh) KeepWays(ctx context.Context) error {
	beat := time.NewTimer(wayLook)
	defer beat.Stop()
	var swept time.Time
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-beat.C:
		}
		beat.Reset(clock.UntilTick(clock.Boottime(), wayLook))
		if m.opts.Silent != nil {
			for _, node := range m.opts.Silent() {
				m.Doubt(node)
			}
		}
		for _, node := range m.ways.due(m.timing) {
			m.examineInBackground(node, 0, m.tryDirect)
		}
		if time.Since(swept) >= m.timing.recheck {
			swept = time.Now()
			m.leaveTunnels()
		}
	}
}

// Doubt has the way to a node examined: it does not answer, though it may be
// well. It does not block, and does nothing when no peer hears the node.
func (m *Mesh) Doubt(node string) {
	if m.opts.Relays == nil || len(m.opts.Relays(node)) == 0 {
		return
	}
	m.examineInBackground(node, m.timing.every, m.examine)
}

func (m *Mesh) examineInBackground(node string, every time.Duration, examine func(ctx context.Context, node, addr string)) {
	addr, ok := m.opts.Address(node)
	if !ok || !m.ways.begin(node, every) {
		return
	}
	if !m.background(func(ctx context.Context) {
		defer m.ways.end(node)
		ctx, cancel := context.WithTimeout(ctx, m.opts.DialTimeout)
		defer cancel()
		examine(ctx, node, addr)
	}) {
		m.ways.end(node)
	}
}

// examine tries the direct way and then a tunnel as well. The direct way wins
// when it works in time; that it is cut is believed only of a node that was
// reached through another at the same moment.
func (m *Mesh) examine(ctx context.Context, node, addr string) {
	direct := startDial(ctx, func(ctx context.Context) (*PeerConn, error) {
		return m.dial(ctx, greeting{kind: KindGRPC, node: node}, addr)
	})
	var detour *dialling
	var tunnel *PeerConn // it stands, and nobody uses it yet
	defer func() {
		direct.abandon()
		detour.abandon()
		if tunnel != nil {
			_ = tunnel.Close() // the direct way is better
		}
	}()
	ahead, soft := time.NewTimer(m.timing.headStart), time.NewTimer(m.timing.soft)
	defer ahead.Stop()
	defer soft.Stop()
	var directErr, detourErr error
	late := false
	for directErr == nil || detour.awaited() != nil {
		select {
		case <-ahead.C:
		case <-soft.C:
			late = true
		case r := <-direct.awaited():
			direct.over()
			if known, works := m.judgeDirect(ctx, node, r); !known || works {
				if works {
					m.goDirect(node)
				}
				return
			}
			directErr = r.err
		case r := <-detour.awaited():
			detour.over()
			tunnel, detourErr = r.conn, r.err
		}
		if detour == nil {
			detour = startDial(ctx, func(ctx context.Context) (*PeerConn, error) {
				return m.dialDetour(ctx, KindGRPC, node)
			})
		}
		if tunnel != nil && (directErr != nil || late) {
			m.goThrough(node, tunnel, directErr)
			tunnel = nil
		}
	}
	if cutOff(detourErr) {
		m.giveUp(node, bothWays(directErr, detourErr))
	}
}

// tryDirect looks whether a node with a detour is reached directly again.
func (m *Mesh) tryDirect(ctx context.Context, node, addr string) {
	conn, err := m.dial(ctx, greeting{kind: KindGRPC, node: node}, addr)
	switch known, works := m.judgeDirect(ctx, node, dialled{conn, err}); {
	case works && m.ways.worked(node) >= wayCertain:
		m.goDirect(node)
	case known && !works && len(m.opts.Relays(node)) == 0:
		m.giveUp(node, err)
	}
}

// judgeDirect takes down how a direct dial of an examination went. Nothing is
// known when the mesh was closed meanwhile.
func (m *Mesh) judgeDirect(ctx context.Context, node string, r dialled) (known, works bool) {
	if r.conn != nil {
		_ = r.conn.Close() // it was to see whether it opens
	}
	if errors.Is(ctx.Err(), context.Canceled) {
		return false, false
	}
	works = !cutOff(r.err)
	if m.ways.tried(node, works) == wayCertain && m.ways.via(node) != "" {
		m.dropDirect(node)
	}
	return true, works
}

// goThrough makes a relay the way to a node. The tunnel is the first one; a
// node that was not heard for a moment is heard again at once.
func (m *Mesh) goThrough(node string, tunnel *PeerConn, directErr error) {
	before, failed := m.ways.set(node, tunnel.via)
	if before != tunnel.via {
		if directErr == nil {
			directErr = fmt.Errorf("not connected after %v", m.timing.soft)
		}
		m.opts.Logger.Warn("a node is not reached directly, going through another", "peer", node, "through", tunnel.via, "error", directErr)
	}
	m.rechannel(node, tunnel)
	m.transport.CloseIdleConnections() // a request would find out by its timer that they are dead
	switch {
	case before != "" && before != tunnel.via:
		m.conns.drop(func(c *PeerConn) bool { return c.dials(node) && c.via == before })
	case failed >= wayCertain:
		m.dropDirect(node)
	}
}

// goDirect makes the direct way the one to take again, for all but the HTTP
// requests under way.
func (m *Mesh) goDirect(node string) {
	before, _ := m.ways.set(node, "")
	if before == "" {
		return
	}
	m.opts.Logger.Info("a node is reached directly again", "peer", node, "before_through", before)
	m.rechannel(node, nil)
	m.transport.CloseIdleConnections()
	m.conns.drop(func(c *PeerConn) bool { return c.dials(node) && c.via != "" && c.kind == KindRaft })
}

// giveUp says that no way is known: the next dial tries both.
func (m *Mesh) giveUp(node string, err error) {
	if before, _ := m.ways.set(node, ""); before != "" {
		m.opts.Logger.Warn("a node is reached neither directly nor through another any more", "peer", node, "before_through", before, "error", err)
	}
}

// dropDirect ends connections that the network has left hanging, so that what
// waits for them asks again. It takes more certainty than a detour for what is
// new: some of them may live, on a bad link.
func (m *Mesh) dropDirect(node string) {
	m.conns.drop(func(c *PeerConn) bool { return c.dials(node) && c.via == "" })
}

// leaveTunnels has what still goes through a tunnel, though the direct way
// works, go directly, without breaking off a call or a request.
func (m *Mesh) leaveTunnels() {
	channels := map[string]bool{}
	requests := false
	m.conns.drop(func(c *PeerConn) bool {
		if c.direction != "dialled" || c.via == "" || time.Since(c.opened) < m.timing.recheck {
			return false
		}
		since, direct := m.ways.left(c.peer.Node)
		if !direct {
			return false
		}
		switch c.kind {
		case KindGRPC:
			channels[c.peer.Node] = true
		case KindHTTP:
			requests = requests || since < wayLeave
		case KindRaft:
			return true // raft dials again at once
		}
		return false
	})
	for node := range channels {
		if client, err := m.Client(node); err == nil && client.tunnelled() {
			m.rechannel(node, nil)
		}
	}
	if requests {
		m.transport.CloseIdleConnections()
	}
}
