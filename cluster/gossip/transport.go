package gossip

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/memberlist"

	"github.com/dsnode/dsnode/cluster/host"
	"github.com/dsnode/dsnode/cluster/throttle"
)

const (
	maxStreams   = 32      // of one pool, open at once; a push/pull takes a few round trips
	poolBytes    = 4 << 20 // of the messages of one pool; five of the longest
	maxPacket    = 1500    // bytes of a datagram; nodes send up to packetSize
	packetSize   = 1400
	readBuffer   = 1 << 20
	bindAttempts = 10
)

// transport implements memberlist.NodeAwareTransport. Everything that memberlist gets
// from it was sealed with the gossip key, is a message that nodes send, and comes once.
// memberlist's own transport accepts any number of streams at once and allocates 64 KiB
// for every packet.
type transport struct {
	host     *host.Host
	metrics  *metrics
	sealing  *sealing
	log      *slog.Logger
	throttle *throttle.Lines // of refusals
	listener net.Listener
	udp      host.PacketConn
	packets  chan *memberlist.Packet
	streams  chan net.Conn
	done     chan struct{}
	stop     sync.Once
	loops    sync.WaitGroup

	advertise atomic.Pointer[netip.AddrPort]

	// Accepted streams from addresses of members and from others, and dialled ones.
	members, strangers, dialled streamPool

	mu          sync.Mutex // guards open, stopped
	open        map[*stream]struct{}
	stopped     bool
	dialCtx     context.Context // memberlist's interface passes none
	cancelDials context.CancelFunc

	faults faults
	// admits is called for each packet and stream. anyPort means that the remote port
	// is not the one on which that node listens.
	admits func(remote netip.AddrPort, anyPort bool) bool
	// isMember reports whether an IP address is that of a member.
	isMember func(netip.Addr) bool
}

var errRefused = errors.New("gossip with this address is not admitted")

// faults are network faults that tests inject; a nil function injects none.
type faults struct {
	dropPacket   func() bool // a received one
	refuseStream func() bool // in either direction
}

// newTransport binds TCP and UDP to the same port.
func (g *Gossip) newTransport() (*transport, error) {
	sealing, err := newSealing([][]byte{g.opts.Key}, g.opts.Label, g.numbered)
	if err != nil {
		return nil, err
	}
	pool := func() streamPool { return streamPool{maxOpen: maxStreams, maxBytes: poolBytes} }
	t := &transport{
		host:     g.opts.Host,
		metrics:  g.metrics,
		sealing:  sealing,
		log:      g.opts.Logger,
		throttle: throttle.NewLines(),
		faults:   g.faults,
		admits:   g.admits,
		isMember: g.table.isMember,
		members:  pool(), strangers: pool(), dialled: pool(),
		packets: make(chan *memberlist.Packet),
		streams: make(chan net.Conn),
		done:    make(chan struct{}),
		open:    map[*stream]struct{}{},
	}
	t.dialCtx, t.cancelDials = context.WithCancel(context.Background())
	for range bindAttempts {
		if err = t.bind(g.opts.Bind); err == nil {
			break
		}
		// Only with port 0 does a retry help: the port that the kernel chose for TCP may
		// be in use for UDP.
		if _, port, split := net.SplitHostPort(g.opts.Bind); split != nil || port != "0" {
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
		stream, refused := t.track(raw, true)
		if refused != accepted {
			_ = raw.Close() // refused
			t.metrics.streamsRefused.Inc()
			t.refuse(refused, remoteOf(raw))
			continue
		}
		t.loops.Go(func() { t.receiveAccepted(stream) })
	}
}

func (t *transport) readPackets() {
	buf := make([]byte, maxPacket+1) // a longer datagram fills it
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
		message, refused := t.openPacket(buf[:n], from)
		if refused != accepted {
			t.refuse(refused, from)
			continue
		}
		t.metrics.packetsIn.Inc()
		packet := &memberlist.Packet{
			Buf:       message,
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

func (t *transport) openPacket(datagram []byte, from netip.AddrPort) ([]byte, refusal) {
	if !t.admits(from, false) {
		return nil, refusedSite
	}
	return t.sealing.openPacket(datagram)
}

// refuse counts a refusal. The log has one line for each reason every ten seconds.
func (t *transport) refuse(why refusal, from netip.AddrPort) {
	t.metrics.refused[why].Inc()
	if skipped, ok := t.throttle.Allow(string(why)); ok {
		t.log.Warn("gossip: refused what arrived at the gossip port", "reason", string(why), "from", from.String(), "unreported", skipped)
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
	_, err = t.udp.WriteToUDPAddrPort(t.sealing.sealPacket(b), to)
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
	stream, refused := t.track(raw, false)
	if refused != accepted {
		_ = raw.Close() // the transport has stopped, or the site is refused since
		return nil, net.ErrClosed
	}
	return stream, nil
}

// DialAddressTimeout is DialTimeout; the node's name is not needed.
func (t *transport) DialAddressTimeout(a memberlist.Address, timeout time.Duration) (net.Conn, error) {
	return t.DialTimeout(a.Addr, timeout)
}

// track adds a stream to the open ones, or refuses it: its pool has no place, or its site
// is not admitted.
func (t *transport) track(raw net.Conn, acceptedHere bool) (*stream, refusal) {
	pool := t.poolFor(remoteOf(raw), acceptedHere)
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.stopped || t.faults.refuseStream != nil && t.faults.refuseStream() || !t.admits(remoteOf(raw), acceptedHere) {
		return nil, refusedSite
	}
	if !pool.enter() {
		return nil, refusedCount
	}
	s := &stream{Conn: raw, transport: t, pool: pool, accepted: acceptedHere}
	t.open[s] = struct{}{}
	return s, accepted
}

func (t *transport) poolFor(remote netip.AddrPort, acceptedHere bool) *streamPool {
	switch {
	case !acceptedHere:
		return &t.dialled
	case t.isMember(remote.Addr()):
		return &t.members
	}
	return &t.strangers
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
