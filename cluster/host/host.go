// Package host is the machine that a node runs on: its clocks, its network and its
// disk. All other packages read clocks that other nodes depend on, listen, dial and
// announce writes to the disk through a Host, so that a simulation can run many nodes in
// one process, in virtual time. Start reading at Host.
package host

import (
	"context"
	"net"
	"net/netip"
	"time"

	"github.com/dsnode/dsnode/cluster/clock"
)

// Host is a machine. What is nil is that of this process's machine, and so is all of a
// nil *Host.
type Host struct {
	Clocks  Clocks
	Network Network
	Disk    Disk
}

// Clocks are the clocks of a machine.
type Clocks interface {
	// Boottime never goes back, and runs during suspend. Leases are counted on it.
	Boottime() time.Duration
	// Now is the wall clock. It may be wrong, and differs from that of other nodes.
	Now() time.Time
}

// Network opens connections and ports. Addresses are host:port.
type Network interface {
	// Dial gets a context that may have a Traffic.
	Dial(ctx context.Context, addr string) (net.Conn, error)
	Listen(addr string) (net.Listener, error)
	ListenPacket(addr netip.AddrPort) (PacketConn, error)
}

type trafficKey struct{}

// WithTraffic notes in a dial's context what the connection is for. Only a simulated network
// reads it: it may cut one kind of traffic between two nodes.
func WithTraffic(ctx context.Context, kind string) context.Context {
	return context.WithValue(ctx, trafficKey{}, kind)
}

// Traffic is what WithTraffic noted, empty for nothing.
func Traffic(ctx context.Context) string {
	kind, _ := ctx.Value(trafficKey{}).(string)
	return kind
}

// PacketConn is the part of *net.UDPConn that gossip uses.
type PacketConn interface {
	ReadFromUDPAddrPort(b []byte) (int, netip.AddrPort, error)
	WriteToUDPAddrPort(b []byte, to netip.AddrPort) (int, error)
	SetReadBuffer(bytes int) error
	Close() error
}

// Disk is asked before a node writes to its disk. No lock is held meanwhile, so a disk
// that hangs blocks nobody but the writer.
type Disk interface {
	// Before returns when the write may be done, or the error that it fails with.
	Before(w Write) error
	// Free is how many bytes may still be written to the file system of a directory.
	Free(dir string) (int64, error)
}

// Write is a write to the disk, named after what is written.
type Write string

// The writes.
const (
	WriteJournal  Write = "journal"   // a batch of records, or a new stream
	WriteRaft     Write = "raft"      // entries, a vote, a snapshot
	WriteJobTable Write = "job table" // a commit
	WriteProbe    Write = "probe"     // of the watchdog
)

// Boottime is CLOCK_BOOTTIME.
func (h *Host) Boottime() time.Duration {
	if h == nil || h.Clocks == nil {
		return clock.Boottime()
	}
	return h.Clocks.Boottime()
}

// Now is the wall clock.
func (h *Host) Now() time.Time {
	if h == nil || h.Clocks == nil {
		return time.Now()
	}
	return h.Clocks.Now()
}

// Dialer returns a function that dials as d does. On a simulated network only the
// timeout of d counts.
func (h *Host) Dialer(d *net.Dialer) func(ctx context.Context, network, addr string) (net.Conn, error) {
	if h == nil || h.Network == nil {
		return d.DialContext
	}
	return func(ctx context.Context, _, addr string) (net.Conn, error) {
		if d.Timeout > 0 {
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeout(ctx, d.Timeout)
			defer cancel()
		}
		return h.Network.Dial(ctx, addr)
	}
}

// Listen opens a TCP port.
func (h *Host) Listen(addr string) (net.Listener, error) {
	if h == nil || h.Network == nil {
		return net.Listen("tcp", addr)
	}
	return h.Network.Listen(addr)
}

// ListenPacket opens a UDP port.
func (h *Host) ListenPacket(addr netip.AddrPort) (PacketConn, error) {
	if h == nil || h.Network == nil {
		return net.ListenUDP("udp", net.UDPAddrFromAddrPort(addr))
	}
	return h.Network.ListenPacket(addr)
}

// BeforeWrite returns a function to call before each write of one kind; nil if there is
// nothing to ask.
func (h *Host) BeforeWrite(w Write) func() error {
	if h == nil || h.Disk == nil {
		return nil
	}
	return func() error { return h.Disk.Before(w) }
}

// FreeBytes returns a function that has the free bytes of a directory's file system; nil
// for that of the operating system.
func (h *Host) FreeBytes() func(dir string) (int64, error) {
	if h == nil || h.Disk == nil {
		return nil
	}
	return h.Disk.Free
}
