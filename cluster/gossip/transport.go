package gossip

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/memberlist"
)

const (
	gossipStreamsMax  = 64      // accepted at once; a push/pull takes a few round trips
	gossipPacketBytes = 1 << 16 // the largest UDP datagram
	gossipReadBuffer  = 1 << 20
	gossipBindTries   = 10
)

// transport is memberlist's way to the network. Memberlist's own one
// takes any number of streams at once and allocates 64 KiB for every packet.
type transport struct {
	metrics  *metrics
	listener *net.TCPListener
	udp      *net.UDPConn
	packets  chan *memberlist.Packet
	streams  chan net.Conn
	done     chan struct{}
	stop     sync.Once
	loops    sync.WaitGroup

	advertise atomic.Pointer[netip.AddrPort]

	mu      sync.Mutex // guards open, halted
	open    map[*stream]struct{}
	halted  bool
	dialCtx context.Context //nolint:containedctx // memberlist's interface passes none
	halt    context.CancelFunc

	faults faults
	// admits is asked for each packet and stream; anyPort when the remote port
	// is not the one that the other listens on.
	admits func(remote netip.AddrPort, anyPort bool) bool
}

// errGossipRefused is why nothing is sent to a site that is cut off.
var errRefused = errors.New("gossip with this address is cut off")

// faults are what tests do to the network; nil does nothing.
type faults struct {
	losePacket   func() bool // on its way in
	refuseStream func() bool // in either direction
}

// newGossipTransport binds TCP and UDP to the same port.
func newTransport(bind string, metrics *metrics, faults faults, admits func(netip.AddrPort, bool) bool) (*transport, error) {
	t := &transport{
		metrics: metrics,
		faults:  faults,
		admits:  admits,
		packets: make(chan *memberlist.Packet),
		streams: make(chan net.Conn),
		done:    make(chan struct{}),
		open:    map[*stream]struct{}{},
	}
	t.dialCtx, t.halt = context.WithCancel(context.Background())
	var err error
	for range gossipBindTries {
		if err = t.bind(bind); err == nil {
			break
		}
		// Only a port of the kernel's choice can be free for one and not the other.
		if _, port, split := net.SplitHostPort(bind); split != nil || port != "0" {
			break
		}
	}
	if err != nil {
		t.halt()
		return nil, err
	}
	t.loops.Go(t.acceptStreams)
	t.loops.Go(t.readPackets)
	return t, nil
}

func (t *transport) bind(bind string) error {
	tcp, err := net.Listen("tcp", bind)
	if err != nil {
		return err
	}
	listener := tcp.(*net.TCPListener) // what "tcp" gives
	at := listener.Addr().(*net.TCPAddr)
	udp, err := net.ListenUDP("udp", &net.UDPAddr{IP: at.IP, Port: at.Port, Zone: at.Zone})
	if err != nil {
		_ = listener.Close() // the reason is err
		return err
	}
	_ = udp.SetReadBuffer(gossipReadBuffer) // bursts fare worse with the kernel's own size, no more
	t.listener, t.udp = listener, udp
	return nil
}

func (t *transport) addr() string { return t.listener.Addr().String() }

func (t *transport) setAdvertise(a netip.AddrPort) {
	a = netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
	t.advertise.Store(&a)
}

// FinalAdvertiseAddr is where the others reach this node.
func (t *transport) FinalAdvertiseAddr(string, int) (net.IP, int, error) {
	a := t.advertise.Load()
	if a == nil {
		return nil, 0, errors.New("no address to advertise")
	}
	return a.Addr().AsSlice(), int(a.Port()), nil
}

func (t *transport) acceptStreams() {
	for {
		raw, err := t.listener.Accept()
		if err != nil {
			select {
			case <-t.done:
				return
			case <-time.After(100 * time.Millisecond): // out of file descriptors, mostly
				continue
			}
		}
		stream, ok := t.track(raw, true)
		if !ok {
			_ = raw.Close() // refused
			t.metrics.streamsRefused.Inc()
			continue
		}
		select {
		case t.streams <- stream:
		case <-t.done:
			_ = stream.Close() // never used
			return
		}
	}
}

func (t *transport) readPackets() {
	buf := make([]byte, gossipPacketBytes)
	for {
		n, from, err := t.udp.ReadFromUDPAddrPort(buf)
		at := time.Now()
		if err != nil {
			select {
			case <-t.done:
				return
			case <-time.After(10 * time.Millisecond):
				continue
			}
		}
		if n == 0 || t.faults.losePacket != nil && t.faults.losePacket() {
			continue
		}
		from = netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
		if !t.admits(from, false) {
			continue
		}
		t.metrics.packetsIn.Inc()
		packet := &memberlist.Packet{
			Buf:       append([]byte(nil), buf[:n]...),
			From:      net.UDPAddrFromAddrPort(from),
			Timestamp: at,
		}
		select {
		case t.packets <- packet:
		case <-t.done:
			return
		}
	}
}

// PacketCh gives memberlist the datagrams.
func (t *transport) PacketCh() <-chan *memberlist.Packet { return t.packets }

// StreamCh gives memberlist the accepted streams.
func (t *transport) StreamCh() <-chan net.Conn { return t.streams }

// WriteTo sends a datagram to an IP address and port.
func (t *transport) WriteTo(b []byte, addr string) (time.Time, error) {
	to, err := netip.ParseAddrPort(addr)
	if err != nil {
		return time.Time{}, fmt.Errorf("gossip address: %w", err)
	}
	if !t.admits(to, false) {
		return time.Now(), nil // lost on the way, as far as memberlist is concerned
	}
	t.metrics.packetsOut.Inc()
	_, err = t.udp.WriteToUDPAddrPort(b, to)
	return time.Now(), err
}

// WriteToAddress is WriteTo; the name is not needed.
func (t *transport) WriteToAddress(b []byte, a memberlist.Address) (time.Time, error) {
	return t.WriteTo(b, a.Addr)
}

// DialTimeout opens a stream.
func (t *transport) DialTimeout(addr string, timeout time.Duration) (net.Conn, error) {
	if to, err := netip.ParseAddrPort(addr); err == nil && !t.admits(to, false) {
		return nil, errRefused
	}
	dialer := net.Dialer{Timeout: timeout}
	raw, err := dialer.DialContext(t.dialCtx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	stream, ok := t.track(raw, false)
	if !ok {
		_ = raw.Close() // the transport has ended, or the site was cut off meanwhile
		return nil, net.ErrClosed
	}
	return stream, nil
}

// DialAddressTimeout is DialTimeout; the name is not needed.
func (t *transport) DialAddressTimeout(a memberlist.Address, timeout time.Duration) (net.Conn, error) {
	return t.DialTimeout(a.Addr, timeout)
}

// stream is a stream that the transport can end.
type stream struct {
	net.Conn
	transport *transport
	accepted  bool
}

func (s *stream) Close() error {
	s.transport.mu.Lock()
	delete(s.transport.open, s)
	s.transport.mu.Unlock()
	return s.Conn.Close()
}

// track refuses streams beyond the bound. Those that memberlist dials are as
// many as its loops and don't count.
func (t *transport) track(raw net.Conn, accepted bool) (*stream, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.halted || t.faults.refuseStream != nil && t.faults.refuseStream() || !t.admits(remoteOf(raw), accepted) {
		return nil, false
	}
	if accepted {
		n := 0
		for s := range t.open {
			if s.accepted {
				n++
			}
		}
		if n >= gossipStreamsMax {
			return nil, false
		}
	}
	s := &stream{Conn: raw, transport: t, accepted: accepted}
	t.open[s] = struct{}{}
	return s, true
}

// closeRefused ends the streams that are no longer admitted. One that is being
// opened is either listed here already or asks for admission after this.
func (t *transport) closeRefused() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for s := range t.open {
		if !t.admits(remoteOf(s.Conn), s.accepted) {
			_ = s.Conn.Close() // its user sees an error and closes it too
		}
	}
}

// remoteOf is the other end of a stream.
func remoteOf(c net.Conn) netip.AddrPort {
	a, ok := c.RemoteAddr().(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	p := a.AddrPort()
	return netip.AddrPortFrom(p.Addr().Unmap(), p.Port())
}

// stopStreams ends all streams and dials, and allows no more. Datagrams go on:
// a goodbye needs them.
func (t *transport) stopStreams() {
	t.halt()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.halted = true
	for s := range t.open {
		_ = s.Conn.Close() // its user sees an error and closes it too
	}
}

// Shutdown ends everything and waits for it. It may be called more than once.
func (t *transport) Shutdown() error {
	t.stop.Do(func() {
		close(t.done)
		t.stopStreams()
		_ = t.listener.Close() // nothing is lost with either
		_ = t.udp.Close()
	})
	t.loops.Wait()
	return nil
}

// lookUpTimeout bounds one question to the resolver.
const lookUpTimeout = 2 * time.Second

// resolveHostPort turns host:port into addresses, where host may be a DNS name.
// What is not host:port at all is a *net.AddrError.
func resolveHostPort(ctx context.Context, hostport string) ([]netip.AddrPort, error) {
	host, text, err := net.SplitHostPort(hostport)
	if err != nil {
		return nil, err
	}
	port, err := strconv.ParseUint(text, 10, 16)
	if err != nil {
		return nil, &net.AddrError{Err: "the port is no number", Addr: hostport}
	}
	if ip, err := netip.ParseAddr(host); err == nil {
		return []netip.AddrPort{netip.AddrPortFrom(ip.Unmap(), uint16(port))}, nil
	}
	ctx, cancel := context.WithTimeout(ctx, lookUpTimeout)
	defer cancel()
	ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, err
	}
	addrs := make([]netip.AddrPort, 0, len(ips))
	for _, ip := range ips {
		addrs = append(addrs, netip.AddrPortFrom(ip.Unmap(), uint16(port)))
	}
	if len(addrs) == 0 {
		return nil, &net.DNSError{Err: "no address", Name: host, IsNotFound: true}
	}
	return addrs, nil
}
