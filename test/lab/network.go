//go:build linux

package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// mtu of the links between sites, as on the internet.
const mtu = 1500

// Network is a few sites that reach each other only through it.
type Network struct {
	places []*place
	pipes  [][]*pipe // [from][to], nil on the diagonal
	done   chan struct{}
	wg     sync.WaitGroup
	close  sync.Once
	tap    atomic.Pointer[func(packet []byte)]
}

// place is one site: a network namespace, a thread that stays in it, and this
// process's end of its TUN device. The namespace is anonymous, so it disappears with
// its last process.
type place struct {
	addr  net.IP
	tun   *os.File
	calls chan func() // for the thread in the namespace
	ns    int         // file descriptor of the namespace
}

// Reachable returns the reason why this machine can't have a Network, if any.
func Reachable() error {
	if os.Geteuid() != 0 {
		return errors.New("network namespaces need root")
	}
	f, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("no TUN devices here: %w", err)
	}
	return f.Close()
}

// NewNetwork makes n sites; their links have no delay and no loss. The seed decides
// which packets are lost later on, and the jitter. The caller closes the network.
func NewNetwork(n int, seed uint64) (*Network, error) {
	w := &Network{done: make(chan struct{})}
	for i := range n {
		p, err := newPlace(i)
		if err != nil {
			w.Close()
			return nil, fmt.Errorf("make the namespace of site %d: %w", i, err)
		}
		w.places = append(w.places, p)
	}
	for from := range n {
		row := make([]*pipe, n)
		for to := range n {
			if from == to {
				continue
			}
			row[to] = newPipe(seed+uint64(from*n+to), w.places[to].write)
			w.wg.Go(func() { row[to].run(w.done) })
		}
		w.pipes = append(w.pipes, row)
	}
	for from, p := range w.places {
		w.wg.Go(func() { w.route(from, p) })
	}
	return w, nil
}

// Addr returns the site's address, which all sites can reach.
func (w *Network) Addr(site int) string { return w.places[site].addr.String() }

// Set changes the link from one site to another, in that direction only.
func (w *Network) Set(from, to int, l Link) { w.pipes[from][to].set(l) }

// SetAll gives every link the same settings.
func (w *Network) SetAll(l Link) {
	w.each(func(from, to int) { w.Set(from, to, l) })
}

// Link returns the state and the counters of the link from one site to another.
func (w *Network) Link(from, to int) (Link, LinkCount) { return w.pipes[from][to].get() }

// Cut drops all packets from one site to another, in that direction only.
func (w *Network) Cut(from, to int) { w.cut(from, to, true) }

// Mend ends a Cut. The link is as before it.
func (w *Network) Mend(from, to int) { w.cut(from, to, false) }

// Shrink drops all packets of more than largest bytes between a site and the others, in
// both directions; 0 ends that.
func (w *Network) Shrink(site, largest int) {
	w.around(site, func(l *Link) { l.Largest = largest })
}

// BlockUDP drops all UDP packets between a site and the others, in both directions, or
// lets them pass again.
func (w *Network) BlockUDP(site int, blocked bool) {
	w.around(site, func(l *Link) { l.NoUDP = blocked })
}

// around changes all links of a site.
func (w *Network) around(site int, change func(*Link)) {
	w.each(func(from, to int) {
		if from == site || to == site {
			l, _ := w.Link(from, to)
			change(&l)
			w.Set(from, to, l)
		}
	})
}

// Isolate cuts all links of a site, in both directions.
func (w *Network) Isolate(site int) {
	w.each(func(from, to int) {
		if from == site || to == site {
			w.Cut(from, to)
		}
	})
}

// MendAll ends all cuts.
func (w *Network) MendAll() { w.each(w.Mend) }

func (w *Network) cut(from, to int, cut bool) {
	l, _ := w.Link(from, to)
	l.Cut = cut
	w.Set(from, to, l)
}

func (w *Network) each(f func(from, to int)) {
	for from := range w.places {
		for to := range w.places {
			if from != to {
				f(from, to)
			}
		}
	}
}

// Listen opens a TCP listener in a site, on its address.
func (w *Network) Listen(site, port int) (net.Listener, error) {
	var l net.Listener
	err := w.places[site].do(func() (err error) {
		l, err = net.Listen("tcp4", fmt.Sprintf("%s:%d", w.Addr(site), port))
		return err
	})
	return l, err
}

// ListenPacket opens a UDP socket in a site, on its address.
func (w *Network) ListenPacket(site, port int) (net.PacketConn, error) {
	var c net.PacketConn
	err := w.places[site].do(func() (err error) {
		c, err = net.ListenPacket("udp4", fmt.Sprintf("%s:%d", w.Addr(site), port))
		return err
	})
	return c, err
}

// Start starts a process in a site. The kernel kills it when this process ends.
func (w *Network) Start(site int, cmd *exec.Cmd) error {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	// The kernel sends it when the starting thread ends, which is the site's thread
	// and lasts as long as the Network.
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	cmd.SysProcAttr.Setpgid = true
	return w.places[site].do(cmd.Start)
}

// Dial opens a TCP connection as a client in the site does.
func (w *Network) Dial(ctx context.Context, site int, addr string) (net.Conn, error) {
	type result struct {
		conn net.Conn
		err  error
	}
	got := make(chan result, 1)
	// Connecting blocks, so it must not happen on the site's thread. A thread that
	// can't return to the namespace of this process ends with its goroutine, which then
	// does not unlock it.
	go func() {
		runtime.LockOSThread()
		home, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			got <- result{err: err}
			return
		}
		defer func() { _ = unix.Close(home) }() // nothing is written to it
		if err := unix.Setns(w.places[site].ns, unix.CLONE_NEWNET); err != nil {
			got <- result{err: fmt.Errorf("enter the site's namespace: %w", err)}
			return
		}
		var d net.Dialer
		conn, err := d.DialContext(ctx, "tcp4", addr)
		if back := unix.Setns(home, unix.CLONE_NEWNET); back == nil {
			runtime.UnlockOSThread()
		}
		got <- result{conn, err}
	}()
	r := <-got
	return r.conn, r.err
}

// Close ends the links and the sites' threads. With its thread, the processes of a
// site are killed.
func (w *Network) Close() {
	w.close.Do(func() {
		close(w.done)
		for _, p := range w.places {
			_ = p.tun.Close() // ends the read of route
			close(p.calls)
			_ = unix.Close(p.ns)
		}
		w.wg.Wait()
	})
}

// route hands each packet that a site sends to the pipe to its destination.
func (w *Network) route(from int, p *place) {
	buf := make([]byte, mtu+64)
	for {
		n, err := p.tun.Read(buf)
		if err != nil {
			return // closed
		}
		to, ok := w.destination(buf[:n])
		if !ok || to == from {
			continue
		}
		packet := append([]byte(nil), buf[:n]...)
		if see := w.tap.Load(); see != nil {
			(*see)(packet)
		}
		w.pipes[from][to].send(packet)
	}
}

// Tap calls a function with every packet between sites, possibly from several
// goroutines at once. Nil ends that.
func (w *Network) Tap(see func(packet []byte)) {
	if see == nil {
		w.tap.Store(nil)
		return
	}
	w.tap.Store(&see)
}

// destination returns the site that an IPv4 packet is for. Site s has the addresses
// 10.99.<s+1>.x.
func (w *Network) destination(packet []byte) (int, bool) {
	if len(packet) < 20 || packet[0]>>4 != 4 || packet[16] != 10 || packet[17] != 99 {
		return 0, false
	}
	to := int(packet[18]) - 1
	return to, to >= 0 && to < len(w.places)
}

func newPlace(index int) (*place, error) {
	p := &place{addr: net.IPv4(10, 99, byte(index+1), 1).To4(), calls: make(chan func())}
	ready := make(chan error, 1)
	go p.live(ready)
	if err := <-ready; err != nil {
		return nil, err
	}
	return p, nil
}

// live is the site's thread: it sets up a new namespace and then runs the calls. It
// never unlocks the thread, so the thread ends with it.
func (p *place) live(ready chan<- error) {
	runtime.LockOSThread()
	err := p.enter()
	ready <- err
	if err != nil {
		return
	}
	for call := range p.calls {
		call()
	}
}

func (p *place) enter() error {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	ns, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open the namespace: %w", err)
	}
	p.ns = ns
	if err := up("lo"); err != nil {
		return err
	}
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("open a TUN device: %w", err)
	}
	req, err := unix.NewIfreq("wan0")
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
		return fmt.Errorf("make the TUN device: %w", err)
	}
	p.tun = os.NewFile(uintptr(fd), "tun")
	if err := setAddr("wan0", unix.SIOCSIFADDR, p.addr); err != nil {
		return err
	}
	if err := setAddr("wan0", unix.SIOCSIFNETMASK, net.IPv4(255, 255, 0, 0)); err != nil {
		return err
	}
	return up("wan0")
}

func (p *place) write(packet []byte) {
	// A packet for a full or closed device is lost.
	_, _ = p.tun.Write(packet)
}

// do runs f on the site's thread.
func (p *place) do(f func() error) error {
	done := make(chan error, 1)
	p.calls <- func() { done <- f() }
	return <-done
}

func setAddr(device string, what uint, ip net.IP) error {
	return withSocket(func(fd int) error {
		req, err := unix.NewIfreq(device)
		if err != nil {
			return err
		}
		if err := req.SetInet4Addr(ip.To4()); err != nil {
			return err
		}
		if err := unix.IoctlIfreq(fd, what, req); err != nil {
			return fmt.Errorf("set %s of %s: %w", ip, device, err)
		}
		return nil
	})
}

func up(device string) error {
	return withSocket(func(fd int) error {
		req, err := unix.NewIfreq(device)
		if err != nil {
			return err
		}
		if err := unix.IoctlIfreq(fd, unix.SIOCGIFFLAGS, req); err != nil {
			return fmt.Errorf("read the flags of %s: %w", device, err)
		}
		req.SetUint16(req.Uint16() | unix.IFF_UP | unix.IFF_RUNNING)
		if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, req); err != nil {
			return fmt.Errorf("bring %s up: %w", device, err)
		}
		return nil
	})
}

func withSocket(f func(fd int) error) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open a socket: %w", err)
	}
	return errors.Join(f(fd), unix.Close(fd))
}
