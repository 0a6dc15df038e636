package sim

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/dsnode/dsnode/cluster/host"
)

// Times of TCP, as the nodes' sockets have them.
const (
	userTimeout = 10 * time.Second // unacknowledged bytes end a connection
	keepAlive   = 11 * time.Second // an idle connection whose peer does not answer probes
	kernelEvery = 500 * time.Millisecond
	retransmit  = 400 * time.Millisecond // after the first loss of a segment, doubled with each further one
	sendBuffer  = 1 << 20                // bytes that wait for the receiver before Write blocks
)

// Rule is a fault of the network, for packets from one place to another. The zero Rule
// changes nothing.
type Rule struct {
	From, To string  // a site or a node; empty: any
	Traffic  string  // see kinds; empty: all
	Over     int     // only packets of more bytes; 0: all
	Cut      bool    // no packet passes
	Loss     float64 // probability
	Delay    time.Duration
	Jitter   time.Duration
}

func (r *Rule) String() string {
	s := fmt.Sprintf("%s→%s", cmp.Or(r.From, "*"), cmp.Or(r.To, "*"))
	if r.Traffic != "" {
		s += " " + r.Traffic
	}
	if r.Over > 0 {
		s += fmt.Sprintf(" over %d bytes", r.Over)
	}
	switch {
	case r.Cut:
		s += " cut"
	case r.Loss > 0:
		s += fmt.Sprintf(" loses %.0f %%", 100*r.Loss)
	}
	if r.Delay+r.Jitter > 0 {
		s += fmt.Sprintf(" delay %s jitter %s", r.Delay, r.Jitter)
	}
	return s
}

// Place is an end of a connection.
type Place struct{ Site, Node string }

func (r *Rule) concerns(from, to Place, traffic string) bool {
	is := func(name string, p Place) bool { return name == "" || name == p.Site || name == p.Node }
	return is(r.From, from) && is(r.To, to) && (r.Traffic == "" || r.Traffic == traffic)
}

// Network carries all packets of a simulation. Packets within a site arrive at once.
type Network struct {
	base time.Duration // one way between two sites

	mu        sync.Mutex // guards all below, and the state of all connections
	random    *rand.Rand
	rules     map[*Rule]struct{}
	changed   chan struct{} // closes at the next change of rules
	listeners map[netip.AddrPort]*listener
	packets   map[netip.AddrPort]*packetConn
	conns     map[*conn]struct{} // dialled ends
	ports     map[netip.Addr]uint16
	places    map[netip.Addr]Place
	watching  bool   // the kernel's loop runs
	clear     string // a secret that was seen between two nodes: from where, to where, and what
}

// NewNetwork makes a network whose sites are base apart. It must be called in the bubble.
func NewNetwork(base time.Duration, random *rand.Rand) *Network {
	return &Network{
		base: base, random: random, rules: map[*Rule]struct{}{}, changed: make(chan struct{}),
		listeners: map[netip.AddrPort]*listener{}, packets: map[netip.AddrPort]*packetConn{}, conns: map[*conn]struct{}{},
		ports: map[netip.Addr]uint16{}, places: map[netip.Addr]Place{},
	}
}

// Name tells where an address is.
func (n *Network) Name(a netip.Addr, p Place) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.places[a] = p
}

// Set begins a fault. The result ends it.
func (n *Network) Set(r Rule) (end func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.rules[&r] = struct{}{}
	n.ruleChanged()
	if !n.watching {
		n.watching = true
		go n.kernel()
	}
	return func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		delete(n.rules, &r)
		n.ruleChanged()
	}
}

func (n *Network) ruleChanged() {
	close(n.changed)
	n.changed = make(chan struct{})
	for c := range n.conns {
		for _, h := range []*half{c.in, c.out} {
			n.release(h)
		}
	}
}

// link is the state of the way from one place to another for packets of a size.
type link struct {
	cut           bool
	loss          float64
	delay, jitter time.Duration
}

func (n *Network) link(from, to Place, traffic string, size int) link {
	l := link{}
	if from.Site != to.Site {
		l.delay = n.base
	}
	// The clients and the model server of a site are beside its nodes.
	if from == to || from.Site == to.Site && (from.Node == "" || to.Node == "") {
		return l
	}
	for r := range n.rules {
		if !r.concerns(from, to, traffic) || size <= r.Over && r.Over > 0 {
			continue
		}
		l.cut = l.cut || r.Cut
		l.loss = max(l.loss, r.Loss)
		l.delay += r.Delay
		l.jitter += r.Jitter
	}
	return l
}

// way is how long a packet takes.
func (n *Network) way(l link) time.Duration {
	if l.jitter == 0 {
		return l.delay
	}
	return l.delay + time.Duration(n.random.Int64N(int64(l.jitter)))
}

// kernel ends connections whose packets don't pass, until no fault is left.
func (n *Network) kernel() {
	tick := time.NewTicker(kernelEvery)
	defer tick.Stop()
	for range tick.C {
		n.mu.Lock()
		if len(n.rules) == 0 {
			for c := range n.conns {
				c.silent = time.Time{}
			}
			n.watching = false
			n.mu.Unlock()
			return
		}
		now := time.Now()
		for c := range n.conns {
			there := n.link(c.from, c.to, c.traffic, 0).cut
			back := n.link(c.to, c.from, c.traffic, 0).cut
			switch {
			case !there && !back:
				c.silent = time.Time{}
			case c.silent.IsZero():
				c.silent = now
			}
			held := c.out.heldSince()
			if other := c.in.heldSince(); held.IsZero() || !other.IsZero() && other.Before(held) {
				held = other
			}
			if !held.IsZero() && now.Sub(held) >= userTimeout || !c.silent.IsZero() && now.Sub(c.silent) >= keepAlive {
				n.breakConn(c, syscall.ETIMEDOUT)
			}
		}
		n.mu.Unlock()
	}
}

// segment is what one Write sent. Without a held time it arrives at its time.
type segment struct {
	b       []byte
	arrives time.Time
	held    time.Time // when it was first lost; it is sent again when the way is free
	size    int
	fin     bool
}

// half is one direction of a connection.
type half struct {
	net      *Network
	from, to Place
	back     *half // the other direction
	traffic  string
	cond     sync.Cond // on Network.mu
	segments []segment
	bytes    int
	last     time.Time // arrival of the newest segment
	timer    *time.Timer
	err      error // both ends
	closedBy struct{ reader, writer bool }
	reading  deadline
	writing  deadline
}

type deadline struct {
	at    time.Time
	timer *time.Timer
}

func (d *deadline) passed() bool { return !d.at.IsZero() && !time.Now().Before(d.at) }

func (h *half) setDeadline(d *deadline, at time.Time) {
	d.at = at
	if d.timer != nil {
		d.timer.Stop()
	}
	h.cond.Broadcast()
	if left := time.Until(at); !at.IsZero() && left > 0 {
		if d.timer == nil {
			d.timer = time.AfterFunc(left, h.wake)
		} else {
			d.timer.Reset(left)
		}
	}
}

func (h *half) wake() {
	h.net.mu.Lock()
	defer h.net.mu.Unlock()
	h.cond.Broadcast()
}

func (h *half) heldSince() time.Time {
	for i := range h.segments {
		if !h.segments[i].held.IsZero() {
			return h.segments[i].held
		}
	}
	return time.Time{}
}

// send puts a segment on the way; the caller holds mu.
func (n *Network) send(h *half, s segment) {
	n.read(h.from, h.to, h.traffic, s.b)
	now := time.Now()
	l := n.link(h.from, h.to, h.traffic, s.size)
	s.arrives = now.Add(n.way(l))
	for backoff := retransmit; l.loss > 0 && n.random.Float64() < l.loss && backoff < 4*retransmit; backoff *= 2 {
		s.arrives = s.arrives.Add(backoff)
	}
	if l.cut || !h.heldSince().IsZero() {
		s.held = now
	}
	if s.arrives.Before(h.last) {
		s.arrives = h.last
	}
	h.last = s.arrives
	h.segments = append(h.segments, s)
	h.bytes += len(s.b)
	h.refuse(&s)
	h.cond.Broadcast()
}

// refuse answers a segment that reaches a closed reader, as TCP does: with a reset, which
// fails the sender's reads and writes at the same time. (A write that failed before the
// read did would make gRPC repeat a call at once and without end, in no virtual time.)
func (h *half) refuse(s *segment) {
	if !h.closedBy.reader || !s.held.IsZero() || s.fin {
		return
	}
	l := h.net.link(h.back.from, h.back.to, h.traffic, 0)
	if l.cut {
		return // the sender's user timeout ends it
	}
	time.AfterFunc(time.Until(s.arrives)+h.net.way(l), func() {
		h.net.mu.Lock()
		defer h.net.mu.Unlock()
		for _, h := range []*half{h, h.back} {
			if h.err == nil {
				h.err = syscall.ECONNRESET
			}
			h.cond.Broadcast()
		}
	})
}

// read reads along, as somebody between two nodes could.
func (n *Network) read(from, to Place, traffic string, b []byte) {
	if from.Node == "" || to.Node == "" || n.clear != "" {
		return
	}
	for _, s := range secrets {
		if bytes.Contains(b, []byte(s)) {
			n.clear = fmt.Sprintf("%q from %s to %s by %s", s, from.Node, to.Node, traffic)
		}
	}
}

// faulty reports whether the network has a fault.
func (n *Network) faulty() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.rules) > 0
}

// release sends the held segments whose way is free again.
func (n *Network) release(h *half) {
	now := time.Now()
	for i := range h.segments {
		s := &h.segments[i]
		if s.held.IsZero() {
			continue
		}
		l := n.link(h.from, h.to, h.traffic, s.size)
		if l.cut {
			return // what follows waits for it
		}
		// The sender waits about as long again as it has waited so far.
		wait := min(now.Sub(s.held), userTimeout)
		s.arrives = now.Add(n.way(l))
		if wait > 0 {
			s.arrives = s.arrives.Add(time.Duration(n.random.Int64N(int64(wait))))
		}
		if s.arrives.Before(h.last) && i > 0 {
			s.arrives = h.last
		}
		h.last = s.arrives
		s.held = time.Time{}
		h.refuse(s)
	}
	h.cond.Broadcast()
}

func (n *Network) breakConn(c *conn, err error) {
	delete(n.conns, c)
	for _, h := range []*half{c.in, c.out} {
		if h.err == nil {
			h.err = err
		}
		h.cond.Broadcast()
	}
}

// conn is one end of a connection.
type conn struct {
	net           *Network
	in, out       *half
	from, to      Place // of this end, and of the other
	traffic       string
	local, remote *net.TCPAddr
	silent        time.Time // since when the way is cut; of the dialled end
	closed        bool
	peer          *conn
	dialled       bool
}

func (c *conn) LocalAddr() net.Addr  { return c.local }
func (c *conn) RemoteAddr() net.Addr { return c.remote }

func (c *conn) opError(op string, err error) error {
	return &net.OpError{Op: op, Net: "tcp", Source: c.local, Addr: c.remote, Err: err}
}

// Read implements net.Conn.
func (c *conn) Read(b []byte) (int, error) {
	h := c.in
	h.net.mu.Lock()
	defer h.net.mu.Unlock()
	for {
		switch {
		case c.closed:
			return 0, c.opError("read", net.ErrClosed)
		case h.reading.passed():
			return 0, c.opError("read", os.ErrDeadlineExceeded)
		}
		if len(h.segments) > 0 && h.segments[0].held.IsZero() {
			s := &h.segments[0]
			if wait := time.Until(s.arrives); wait <= 0 {
				if s.fin {
					return 0, io.EOF
				}
				k := copy(b, s.b)
				s.b = s.b[k:]
				h.bytes -= k
				if len(s.b) == 0 {
					h.segments[0] = segment{}
					h.segments = h.segments[1:]
				}
				h.cond.Broadcast()
				return k, nil
			} else if h.timer == nil {
				h.timer = time.AfterFunc(wait, h.wake)
			} else {
				h.timer.Reset(wait)
			}
		}
		if h.err != nil {
			return 0, c.opError("read", h.err)
		}
		if len(b) == 0 {
			return 0, nil
		}
		h.cond.Wait()
	}
}

// Write implements net.Conn.
func (c *conn) Write(b []byte) (int, error) {
	h := c.out
	h.net.mu.Lock()
	defer h.net.mu.Unlock()
	for {
		switch {
		case c.closed || h.closedBy.writer:
			return 0, c.opError("write", net.ErrClosed)
		case h.writing.passed():
			return 0, c.opError("write", os.ErrDeadlineExceeded)
		case h.err != nil:
			return 0, c.opError("write", h.err)
		case h.bytes <= sendBuffer:
			h.net.send(h, segment{b: slices.Clone(b), size: len(b)})
			return len(b), nil
		}
		h.cond.Wait()
	}
}

// CloseWrite ends this direction.
func (c *conn) CloseWrite() error {
	c.net.mu.Lock()
	defer c.net.mu.Unlock()
	c.closeWrite()
	return nil
}

func (c *conn) closeWrite() {
	if !c.out.closedBy.writer {
		c.out.closedBy.writer = true
		if c.out.err == nil {
			c.net.send(c.out, segment{fin: true})
		}
	}
}

// Close implements net.Conn.
func (c *conn) Close() error {
	c.net.mu.Lock()
	defer c.net.mu.Unlock()
	if c.closed {
		return c.opError("close", net.ErrClosed)
	}
	c.closed = true
	c.closeWrite()
	c.in.closedBy.reader = true
	c.in.cond.Broadcast()
	c.out.cond.Broadcast()
	for _, h := range []*half{c.in, c.out} {
		for _, t := range []*time.Timer{h.reading.timer, h.writing.timer} {
			if t != nil && (h == c.in) == (t == h.reading.timer) {
				t.Stop()
			}
		}
	}
	if c.peer.closed {
		delete(c.net.conns, c)
		delete(c.net.conns, c.peer)
	}
	return nil
}

// SetDeadline implements net.Conn.
func (c *conn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

// SetReadDeadline implements net.Conn.
func (c *conn) SetReadDeadline(t time.Time) error {
	c.net.mu.Lock()
	defer c.net.mu.Unlock()
	if c.closed {
		return c.opError("set", net.ErrClosed)
	}
	c.in.setDeadline(&c.in.reading, t)
	return nil
}

// SetWriteDeadline implements net.Conn.
func (c *conn) SetWriteDeadline(t time.Time) error {
	c.net.mu.Lock()
	defer c.net.mu.Unlock()
	if c.closed {
		return c.opError("set", net.ErrClosed)
	}
	c.out.setDeadline(&c.out.writing, t)
	return nil
}

// listener is an open TCP port.
type listener struct {
	net    *Network
	addr   *net.TCPAddr
	accept chan *conn
	done   chan struct{}
	once   sync.Once
}

func (l *listener) Accept() (net.Conn, error) {
	select {
	case <-l.done:
		return nil, &net.OpError{Op: "accept", Net: "tcp", Addr: l.addr, Err: net.ErrClosed}
	default:
	}
	select {
	case c := <-l.accept:
		return c, nil
	case <-l.done:
		return nil, &net.OpError{Op: "accept", Net: "tcp", Addr: l.addr, Err: net.ErrClosed}
	}
}

func (l *listener) Close() error {
	err := error(&net.OpError{Op: "close", Net: "tcp", Addr: l.addr, Err: net.ErrClosed})
	l.once.Do(func() {
		l.net.mu.Lock()
		defer l.net.mu.Unlock()
		delete(l.net.listeners, l.addr.AddrPort())
		close(l.done)
		err = nil
	})
	return err
}

func (l *listener) Addr() net.Addr { return l.addr }

// Endpoint is the network as one machine sees it. It implements host.Network.
type Endpoint struct {
	net  *Network
	addr netip.Addr

	mu    sync.Mutex // guards down
	down  bool
	conns map[*conn]struct{}
}

// Endpoint makes a machine's endpoint.
func (n *Network) Endpoint(a netip.Addr) *Endpoint {
	return &Endpoint{net: n, addr: a, conns: map[*conn]struct{}{}}
}

var _ host.Network = (*Endpoint)(nil)

var errDown = errors.New("the machine is off")

// Off ends all that the machine's processes had open, and lets them open nothing more. With
// resets, peers learn of it.
func (e *Endpoint) Off(resets bool) {
	e.mu.Lock()
	e.down = true
	e.mu.Unlock()
	n := e.net
	n.mu.Lock()
	var close []*listener
	for a, l := range n.listeners {
		if a.Addr() == e.addr {
			close = append(close, l)
		}
	}
	for a, p := range n.packets {
		if a.Addr() == e.addr {
			p.closeLocked()
		}
	}
	for c := range n.conns {
		if c.local.AddrPort().Addr() != e.addr && c.remote.AddrPort().Addr() != e.addr {
			continue
		}
		if resets {
			n.breakConn(c, syscall.ECONNRESET)
			continue
		}
		// This end is gone; the other one finds out when its bytes are not acknowledged.
		n.vanish(c, e.addr)
	}
	n.mu.Unlock()
	for _, l := range close {
		_ = l.Close() // closing twice is harmless
	}
}

// vanish ends the connection at one end now, and at the other after the user timeout.
func (n *Network) vanish(c *conn, at netip.Addr) {
	delete(n.conns, c)
	gone, left := c, c.peer
	if c.local.AddrPort().Addr() != at {
		gone, left = c.peer, c
	}
	gone.closed = true
	gone.in.cond.Broadcast()
	gone.out.cond.Broadcast()
	time.AfterFunc(userTimeout, func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		n.breakConn(left, syscall.ETIMEDOUT)
	})
}

// On undoes Off, for the next process.
func (e *Endpoint) On() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.down = false
}

func (e *Endpoint) isDown() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.down
}

// Dial implements host.Network.
func (e *Endpoint) Dial(ctx context.Context, addr string) (net.Conn, error) {
	to, err := netip.ParseAddrPort(addr)
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", addr, err)
	}
	fail := func(err error) (net.Conn, error) {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Addr: net.TCPAddrFromAddrPort(to), Err: err}
	}
	traffic := cmp.Or(host.Traffic(ctx), kindOf(to.Port()))
	n := e.net
	for backoff := time.Second; ; backoff *= 2 {
		if e.isDown() {
			return fail(errDown)
		}
		n.mu.Lock()
		from, at := n.places[e.addr], n.places[to.Addr()]
		there, back := n.link(from, at, traffic, 60), n.link(at, from, traffic, 60)
		changed := n.changed
		lost := there.loss > 0 && n.random.Float64() < there.loss || back.loss > 0 && n.random.Float64() < back.loss
		way := n.way(there) + n.way(back)
		n.mu.Unlock()
		if there.cut || back.cut || lost {
			wait := time.NewTimer(backoff)
			select {
			case <-ctx.Done():
				wait.Stop()
				return fail(timeoutOf(ctx.Err()))
			case <-changed: // the next SYN passes a little later
				wait.Stop()
				if err := sleep(ctx, backoff/4); err != nil {
					return fail(timeoutOf(err))
				}
			case <-wait.C:
			}
			continue
		}
		if err := sleep(ctx, way); err != nil {
			return fail(timeoutOf(err))
		}
		c, err := n.connect(e.addr, to, traffic)
		if err != nil {
			return fail(err)
		}
		return c, nil
	}
}

func timeoutOf(err error) error {
	if errors.Is(err, context.DeadlineExceeded) {
		return os.ErrDeadlineExceeded
	}
	return err
}

func sleep(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return ctx.Err()
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

// connect makes both ends. A connection waits for its Accept in the listener's backlog.
func (n *Network) connect(from netip.Addr, to netip.AddrPort, traffic string) (*conn, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	l := n.listeners[to]
	if l == nil {
		l = n.listeners[netip.AddrPortFrom(netip.IPv4Unspecified(), to.Port())]
	}
	if l == nil {
		return nil, syscall.ECONNREFUSED
	}
	n.ports[from]++
	port := 32768 + n.ports[from]%28000
	a := &conn{
		net: n, from: n.places[from], to: n.places[to.Addr()], traffic: traffic, dialled: true,
		local: net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, port)), remote: net.TCPAddrFromAddrPort(to),
	}
	out, in := n.newHalf(a.from, a.to, traffic), n.newHalf(a.to, a.from, traffic)
	in.back, out.back = out, in
	a.in, a.out = in, out
	b := &conn{net: n, from: a.to, to: a.from, traffic: traffic, local: a.remote, remote: a.local, in: out, out: in, peer: a}
	a.peer = b
	select {
	case l.accept <- b:
	default:
		return nil, syscall.ECONNREFUSED // the backlog is full
	}
	n.conns[a] = struct{}{}
	return a, nil
}

func (n *Network) newHalf(from, to Place, traffic string) *half {
	h := &half{net: n, from: from, to: to, traffic: traffic}
	h.cond.L = &n.mu
	return h
}

// Listen implements host.Network.
func (e *Endpoint) Listen(addr string) (net.Listener, error) {
	at, err := netip.ParseAddrPort(addr)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", addr, err)
	}
	if e.isDown() {
		return nil, errDown
	}
	n := e.net
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.listeners[at] != nil {
		return nil, &net.OpError{Op: "listen", Net: "tcp", Addr: net.TCPAddrFromAddrPort(at), Err: syscall.EADDRINUSE}
	}
	l := &listener{net: n, addr: net.TCPAddrFromAddrPort(at), accept: make(chan *conn, 128), done: make(chan struct{})}
	n.listeners[at] = l
	return l, nil
}

// packetConn is an open UDP port.
type packetConn struct {
	net  *Network
	addr netip.AddrPort
	cond sync.Cond // on Network.mu
	got  []datagram
	shut bool
}

type datagram struct {
	b    []byte
	from netip.AddrPort
}

// maxDatagrams bounds a socket's receive buffer.
const maxDatagrams = 512

// ListenPacket implements host.Network.
func (e *Endpoint) ListenPacket(addr netip.AddrPort) (host.PacketConn, error) {
	if e.isDown() {
		return nil, errDown
	}
	n := e.net
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.packets[addr] != nil {
		return nil, &net.OpError{Op: "listen", Net: "udp", Addr: net.UDPAddrFromAddrPort(addr), Err: syscall.EADDRINUSE}
	}
	p := &packetConn{net: n, addr: addr}
	p.cond.L = &n.mu
	n.packets[addr] = p
	return p, nil
}

func (p *packetConn) ReadFromUDPAddrPort(b []byte) (int, netip.AddrPort, error) {
	p.net.mu.Lock()
	defer p.net.mu.Unlock()
	for len(p.got) == 0 && !p.shut {
		p.cond.Wait()
	}
	if p.shut {
		return 0, netip.AddrPort{}, net.ErrClosed
	}
	d := p.got[0]
	p.got = p.got[1:]
	return copy(b, d.b), d.from, nil
}

// WriteToUDPAddrPort loses the datagram where a rule says so. Datagrams overtake each other.
func (p *packetConn) WriteToUDPAddrPort(b []byte, to netip.AddrPort) (int, error) {
	n := p.net
	n.mu.Lock()
	defer n.mu.Unlock()
	if p.shut {
		return 0, net.ErrClosed
	}
	n.read(n.places[p.addr.Addr()], n.places[to.Addr()], GossipUDP, b)
	l := n.link(n.places[p.addr.Addr()], n.places[to.Addr()], GossipUDP, len(b))
	if l.cut || l.loss > 0 && n.random.Float64() < l.loss {
		return len(b), nil
	}
	d := datagram{slices.Clone(b), p.addr}
	time.AfterFunc(n.way(l), func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		if at := n.packets[to]; at != nil && len(at.got) < maxDatagrams {
			at.got = append(at.got, d)
			at.cond.Signal()
		}
	})
	return len(b), nil
}

func (p *packetConn) SetReadBuffer(int) error { return nil }

func (p *packetConn) Close() error {
	p.net.mu.Lock()
	defer p.net.mu.Unlock()
	p.closeLocked()
	return nil
}

func (p *packetConn) closeLocked() {
	if p.net.packets[p.addr] == p {
		delete(p.net.packets, p.addr)
	}
	p.shut = true
	p.cond.Broadcast()
}

func dialWith(e *Endpoint) func(ctx context.Context, network, addr string) (net.Conn, error) {
	return func(ctx context.Context, _, addr string) (net.Conn, error) { return e.Dial(ctx, addr) }
}
