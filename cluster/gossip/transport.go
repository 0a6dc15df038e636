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

	"github.com/dsnode/dsnode/cluster/host"
)

const (
	maxStreams   = 64      // accepted and open at once; a push/pull takes a few round trips
	maxPacket    = 1 << 16 // the largest UDP datagram
	readBuffer   = 1 << 20
	bindAttempts = 10
)

// transport implements memberlist.NodeAwareTransport. memberlist's own transport
// accepts any number of streams at once and allocates 64 KiB for every packet.
type transport struct {
	host     *host.Host
	metrics  *metrics
	listener net.Listener
	udp      host.PacketConn
	packets  chan *memberlist.Packet
	streams  chan net.Conn
	done     chan struct{}
	stop     sync.Once
	loops    sync.WaitGroup

	advertise atomic.Pointer[netip.AddrPort]

	mu          sync.Mutex // guards open, stopped
	open        map[*stream]struct{}
	stopped     bool
	dialCtx     context.Context // memberlist's interface passes none
	cancelDials context.CancelFunc

	faults faults
	// admits is called for each packet and stream. anyPort means that the remote port
	// is not the one on which that node listens.
	admits func(remote netip.AddrPort, anyPort bool) bool
}

var errRefused = errors.New("gossip with this address is not admitted")

// faults are network faults that tests inject; a nil function injects none.
type faults struct {
	dropPacket   func() bool // a received one
	refuseStream func() bool // in either direction
}

// newTransport binds TCP and UDP to the same port.
func newTransport(bind string, host *host.Host, metrics *metrics, faults faults, admits func(netip.AddrPort, bool) bool) (*transport, error) {
	t := &transport{
		host:    host,
		metrics: metrics,
		faults:  faults,
		admits:  admits,
		packets: make(chan *memberlist.Packet),
		streams: make(chan net.Conn),
		done:    make(chan struct{}),
		open:    map[*stream]struct{}{},
	}
	t.dialCtx, t.cancelDials = context.WithCancel(context.Background())
	var err error
	for range bindAttempts {
		if err = t.bind(bind); err == nil {
			break
		}
		// Only with port 0 does a retry help: the port that the kernel chose for TCP may
		// be in use for UDP.
		if _, port, split := net.SplitHostPort(bind); split != nil || port != "0" {
			break
		}
	}
	if err != nil {
		t.cancelDials()
		return nil, err
	}
	t.loops.Go(t.acceptStreams)
	t.loops.Go(t.readPackets)
	return t, nil
}

func (t *transport) bind(bind string) error {
	tcp, err := t.host.Listen(bind)
	if err != nil {
		return err
	}
	bound := tcp.Addr().(*net.TCPAddr) // of every TCP listener
	udp, err := t.host.ListenPacket(bound.AddrPort())
	if err != nil {
		_ = tcp.Close() // the reason is err
		return err
	}
	_ = udp.SetReadBuffer(readBuffer) // on an error the kernel's default size is used, which loses more of a burst
	t.listener, t.udp = tcp, udp
	return nil
}

func (t *transport) addr() string { return t.listener.Addr().String() }

func (t *transport) setAdvertise(a netip.AddrPort) {
	a = netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
	t.advertise.Store(&a)
}

// FinalAdvertiseAddr is the address at which other members reach this node.
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
			case <-time.After(100 * time.Millisecond): // mostly a lack of file descriptors
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
			_ = stream.Close() // memberlist has stopped
			return
		}
	}
}

func (t *transport) readPackets() {
	buf := make([]byte, maxPacket)
	for {
		n, from, err := t.udp.ReadFromUDPAddrPort(buf)
		received := time.Now()
		if err != nil {
			select {
			case <-t.done:
				return
			case <-time.After(10 * time.Millisecond):
				continue
			}
		}
		if n == 0 || t.faults.dropPacket != nil && t.faults.dropPacket() {
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
			Timestamp: received,
		}
		select {
		case t.packets <- packet:
		case <-t.done:
			return
		}
	}
}

// PacketCh delivers the received packets to memberlist.
func (t *transport) PacketCh() <-chan *memberlist.Packet { return t.packets }

// StreamCh delivers the accepted streams to memberlist.
func (t *transport) StreamCh() <-chan net.Conn { return t.streams }

// WriteTo sends a packet to an IP address and port.
func (t *transport) WriteTo(b []byte, addr string) (time.Time, error) {
	to, err := netip.ParseAddrPort(addr)
	if err != nil {
		return time.Time{}, fmt.Errorf("gossip address: %w", err)
	}
	if !t.admits(to, false) {
		return time.Now(), nil // for memberlist the packet is lost
	}
	t.metrics.packetsOut.Inc()
	_, err = t.udp.WriteToUDPAddrPort(b, to)
	return time.Now(), err
}

// WriteToAddress is WriteTo; the node's name is not needed.
func (t *transport) WriteToAddress(b []byte, a memberlist.Address) (time.Time, error) {
	return t.WriteTo(b, a.Addr)
}

// DialTimeout opens a stream.
func (t *transport) DialTimeout(addr string, timeout time.Duration) (net.Conn, error) {
	if to, err := netip.ParseAddrPort(addr); err == nil && !t.admits(to, false) {
		return nil, errRefused
	}
	raw, err := t.host.Dialer(&net.Dialer{Timeout: timeout})(t.dialCtx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	stream, ok := t.track(raw, false)
	if !ok {
		_ = raw.Close() // the transport has stopped, or the site is refused since
		return nil, net.ErrClosed
	}
	return stream, nil
}

// DialAddressTimeout is DialTimeout; the node's name is not needed.
func (t *transport) DialAddressTimeout(a memberlist.Address, timeout time.Duration) (net.Conn, error) {
	return t.DialTimeout(a.Addr, timeout)
}

// stream is a TCP connection that the transport can close.
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

// track adds a stream to the open ones, or refuses it: more than maxStreams accepted
// ones are open, or its site is not admitted. Dialled streams don't count, because
// memberlist's loops open few of them.
func (t *transport) track(raw net.Conn, accepted bool) (*stream, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.stopped || t.faults.refuseStream != nil && t.faults.refuseStream() || !t.admits(remoteOf(raw), accepted) {
		return nil, false
	}
	if accepted {
		n := 0
		for s := range t.open {
			if s.accepted {
				n++
			}
		}
		if n >= maxStreams {
			return nil, false
		}
	}
	s := &stream{Conn: raw, transport: t, accepted: accepted}
	t.open[s] = struct{}{}
	return s, true
}

// closeRefused closes the streams that are no longer admitted. A stream that is being
// opened is either in the list already, or track calls admits after this.
func (t *transport) closeRefused() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for s := range t.open {
		if !t.admits(remoteOf(s.Conn), s.accepted) {
			_ = s.Conn.Close() // its user sees an error and closes it too
		}
	}
}

// remoteOf is the remote address of a stream.
func remoteOf(c net.Conn) netip.AddrPort {
	a, ok := c.RemoteAddr().(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	p := a.AddrPort()
	return netip.AddrPortFrom(p.Addr().Unmap(), p.Port())
}

// stopStreams ends all streams and dials, and allows no new ones. Packets are still
// sent: announcing a leave needs them.
func (t *transport) stopStreams() {
	t.cancelDials()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.stopped = true
	for s := range t.open {
		_ = s.Conn.Close() // its user sees an error and closes it too
	}
}

// Shutdown closes the port and all streams and waits for the loops. It may be called
// more than once.
func (t *transport) Shutdown() error {
	t.stop.Do(func() {
		close(t.done)
		t.stopStreams()
		_ = t.listener.Close() // an error of either close loses nothing
		_ = t.udp.Close()
	})
	t.loops.Wait()
	return nil
}

// lookUpTimeout bounds one DNS lookup.
const lookUpTimeout = 2 * time.Second

// resolveHostPort resolves host:port, where host may be a DNS name. The error is a
// *net.AddrError if the text is not host:port.
func resolveHostPort(ctx context.Context, hostport string) ([]netip.AddrPort, error) {
	host, portText, err := net.SplitHostPort(hostport)
	if err != nil {
		return nil, err
	}
	port, err := strconv.ParseUint(portText, 10, 16)
	if err != nil {
		return nil, &net.AddrError{Err: "the port is not a number", Addr: hostport}
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
