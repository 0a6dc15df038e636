package sim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/cluster/host"
	"github.com/dsnode/dsnode/node"
)

// Ports of every machine.
const (
	portAPI      = 8080
	portAdmin    = 8081
	portGossip   = 7956
	portRPC      = 7957
	portUpstream = 8000
)

// Kinds of traffic besides those of the mesh (raft, grpc, http, tunnel).
const (
	GossipTCP   = "gossip-tcp"
	GossipUDP   = "gossip-udp"
	TrafficAPI  = "api"
	TrafficPeer = "rpc" // a connection to the rpc port whose kind is not noted
	TrafficAI   = "upstream"
)

func kindOf(port uint16) string {
	switch port {
	case portGossip:
		return GossipTCP
	case portRPC:
		return TrafficPeer
	case portUpstream:
		return TrafficAI
	}
	return TrafficAPI
}

// clocks are those of one machine. Boottime runs as virtual time does.
type clocks struct {
	began  time.Time
	booted time.Duration // at began
	ahead  time.Duration // of the wall clock
}

func (c *clocks) Boottime() time.Duration { return c.booted + time.Since(c.began) }
func (c *clocks) Now() time.Time          { return time.Now().Add(c.ahead) }

// trouble is the state of a machine's disk. Its zero value is a fast disk with much space.
type trouble struct {
	mu      sync.Mutex    // guards all below
	hung    chan struct{} // closes when the disk responds again; nil: it does
	failing error
	full    bool
	free    int64         // bytes of a full disk
	every   time.Duration // of a slow disk: between two writes
	next    time.Time     // when a slow disk is free
}

func (t *trouble) set(change func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	change()
}

func (t *trouble) hang() (end func()) {
	hung := make(chan struct{})
	t.set(func() {
		if t.hung == nil {
			t.hung = hung
		}
	})
	return func() {
		t.set(func() {
			if t.hung == hung {
				close(hung)
				t.hung = nil
			}
		})
	}
}

// disk is the disk for one process. No write begins after stopped has closed.
type disk struct {
	*trouble
	stopped, ended chan struct{} // the process has crashed; its directory was copied
	// fatal: a write of Raft has failed. Raft panics then, which would end the simulation, so
	// the write waits until the run has ended the process.
	fatal atomic.Bool
}

const writeTime = time.Millisecond

// Before implements host.Disk.
func (d *disk) Before(w host.Write) error {
	d.mu.Lock()
	wait := writeTime
	if d.every > 0 {
		now := time.Now()
		if d.next.Before(now) {
			d.next = now
		}
		d.next = d.next.Add(d.every)
		wait = d.next.Sub(now)
	}
	d.mu.Unlock()
	time.Sleep(wait)
	for {
		d.mu.Lock()
		hung, err := d.hung, d.failing
		if d.full && d.free == 0 && w != host.WriteRaft { // Raft's file has space that was allocated before
			err = syscall.ENOSPC
		}
		d.mu.Unlock()
		select {
		case <-d.stopped:
			// Nobody sees what the rest of the process still writes: its directory was copied,
			// and its network is off. So it may end in order.
			<-d.ended
			return nil
		default:
		}
		switch {
		case hung != nil:
		case err != nil && w == host.WriteRaft:
			d.fatal.Store(true)
			<-d.stopped
			continue
		default:
			return err
		}
		select {
		case <-hung:
		case <-d.stopped:
		}
	}
}

// Free implements host.Disk.
func (d *disk) Free(string) (int64, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.full {
		return d.free, nil
	}
	return 100 << 30, nil
}

// Machine is a computer with one node.
type Machine struct {
	Name, Site string
	Addr       netip.Addr

	w        *World
	endpoint *Endpoint
	clocks   *clocks
	disk     trouble
	life     int // counts the data directories
	process  atomic.Pointer[process]
}

// process is one run of a node.
type process struct {
	node   *node.Node
	dir    string
	disk   *disk
	cancel context.CancelFunc
	done   chan struct{}
	err    error
	// stopping: its end was asked for.
	stopping atomic.Bool
}

func (m *Machine) at(port int) string { return netip.AddrPortFrom(m.Addr, uint16(port)).String() }

func (m *Machine) dataDir() string {
	return filepath.Join(m.w.dir, fmt.Sprintf("%s-%d", m.Name, m.life))
}

// current is the process that runs, nil for none.
func (m *Machine) current() *process {
	p := m.process.Load()
	if p == nil {
		return nil
	}
	select {
	case <-p.done:
		return nil
	default:
		return p
	}
}

// ended is why the node's process ended by itself, empty if it did not.
func (m *Machine) ended() string {
	p := m.process.Load()
	switch {
	case p != nil && p.disk.fatal.Load():
		return "a write of Raft has failed"
	case p == nil || m.current() != nil || p.stopping.Load():
		return ""
	case p.err != nil:
		return p.err.Error()
	}
	return "it ended without an error"
}

// Start runs the node with what is on the disk.
func (m *Machine) Start() error {
	if m.current() != nil {
		return nil
	}
	d := &disk{trouble: &m.disk, stopped: make(chan struct{}), ended: make(chan struct{})}
	m.endpoint = m.w.net.Endpoint(m.Addr)
	c := m.w.nodeConfig(m)
	c.DataDir = m.dataDir()
	n, err := node.New(c, node.Options{
		Logger: slog.New(m.w.logs.handler(m.Name)), Version: "sim",
		Host: &host.Host{Clocks: m.clocks, Network: m.endpoint, Disk: d},
	})
	if err != nil {
		return fmt.Errorf("start %s: %w", m.Name, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	p := &process{node: n, dir: c.DataDir, disk: d, cancel: cancel, done: make(chan struct{})}
	m.process.Store(p)
	m.w.processes.Go(func() {
		p.err = n.Run(ctx)
		close(p.done)
	})
	return nil
}

// Stop ends the node in order.
func (m *Machine) Stop() {
	p := m.process.Load()
	if p == nil {
		return
	}
	p.stopping.Store(true)
	p.cancel()
	<-p.done
	m.process.CompareAndSwap(p, nil) // unless it crashed meanwhile
}

// Crash ends the node now: what was not written is lost. With resets the operating system
// lives and ends the connections; otherwise the machine has lost power. The disk stays. The
// caller is the only one that calls synctest.Wait.
func (m *Machine) Crash(resets bool) error {
	p := m.process.Swap(nil)
	if p == nil {
		return nil
	}
	close(p.disk.stopped)
	m.w.settle()
	m.endpoint.Off(resets)
	old := p.dir
	m.life++
	err := copyDir(m.dataDir(), old)
	p.cancel()
	close(p.disk.ended)
	m.w.processes.Go(func() {
		<-p.done
		if errors.Is(p.err, cluster.ErrDiskStalled) {
			// Then Run does not wait for those that write, and leaves the rest to the end of the
			// process. They end now; this is the rest.
			time.Sleep(time.Minute)
			_ = p.node.Close() // what it can't write is lost in a crash
		}
		_ = os.RemoveAll(old) // the simulation's own directory is removed at the end
	})
	return err
}

// Wipe empties the disk of a node that does not run.
func (m *Machine) Wipe() { m.life++ }

// Image copies the disk as it is now. Restore puts it back.
func (m *Machine) Image() (dir string, err error) {
	m.w.settle()
	m.w.images++
	dir = filepath.Join(m.w.dir, fmt.Sprintf("image-%d", m.w.images))
	return dir, copyDir(dir, m.dataDir())
}

// Restore replaces the disk of a node that does not run.
func (m *Machine) Restore(image string) error {
	m.life++
	return copyDir(m.dataDir(), image)
}

// copyDir copies files. Nothing writes to them meanwhile.
func copyDir(to, from string) error {
	return filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) && path == from {
			return nil
		}
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		at := filepath.Join(to, rel)
		if d.IsDir() {
			return os.MkdirAll(at, 0o700)
		}
		src, err := os.Open(path)
		if err != nil {
			return err
		}
		defer func() { _ = src.Close() }() // only read
		dst, err := os.OpenFile(at, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
		if err != nil {
			return err
		}
		_, err = io.Copy(dst, src)
		return errors.Join(err, dst.Close())
	})
}
