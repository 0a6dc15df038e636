package mesh

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"github.com/dsnode/dsnode/test/async"
)

// testLink is a TCP proxy to a node that can be cut. While it is cut it holds all
// data back and new connections open but get no answer, as behind a firewall that
// drops packets. After mend it forwards the held data.
type testLink struct {
	addr string
	ln   net.Listener
	held atomic.Int64 // reads whose data the cut holds back

	mu   sync.Mutex    // guards open
	open chan struct{} // closed while data may pass
}

func newTestLink(t testing.TB, to string) *testLink {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := &testLink{addr: ln.Addr().String(), ln: ln, open: make(chan struct{})}
	close(l.open)
	async.Run(t, func(ctx context.Context) error {
		defer context.AfterFunc(ctx, func() { _ = ln.Close() })()
		var all sync.WaitGroup
		defer all.Wait()
		for {
			near, err := ln.Accept()
			if err != nil {
				return nil
			}
			all.Go(func() { l.carry(ctx, near, to) })
		}
	})
	return l
}

func (l *testLink) carry(ctx context.Context, near net.Conn, to string) {
	defer func() { _ = near.Close() }()
	if !l.pass(ctx) {
		return
	}
	far, err := net.Dial("tcp", to)
	if err != nil {
		return
	}
	defer func() { _ = far.Close() }()
	defer context.AfterFunc(ctx, func() { _ = near.Close(); _ = far.Close() })()
	var both sync.WaitGroup
	for _, pair := range [][2]net.Conn{{near, far}, {far, near}} {
		both.Go(func() {
			defer func() { _ = pair[0].Close(); _ = pair[1].Close() }()
			b := make([]byte, 4096)
			for {
				n, err := pair[0].Read(b)
				if err != nil {
					return
				}
				l.held.Add(1)
				if !l.pass(ctx) {
					return
				}
				l.held.Add(-1)
				if _, err := pair[1].Write(b[:n]); err != nil {
					return
				}
			}
		})
	}
	both.Wait()
}

// pass waits until the link is not cut. It is false if the test ended first.
func (l *testLink) pass(ctx context.Context) bool {
	l.mu.Lock()
	open := l.open
	l.mu.Unlock()
	select {
	case <-open:
		return true
	case <-ctx.Done():
		return false
	}
}

func (l *testLink) cut() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.open = make(chan struct{})
}

// refuse makes the link refuse new connections from now on.
func (l *testLink) refuse() error { return l.ln.Close() }

func (l *testLink) mend() {
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case <-l.open:
	default:
		close(l.open)
	}
}

// triangle is three sites with one node each: a dials b over a link that can be
// cut, and both reach c.
type triangle struct {
	a, b, c *testPeer
	stopC   func()    // ends c's Serve
	link    *testLink // from a to b
	book    *testBook
	ca      tlsAuthority

	mu     sync.Mutex       // guards all below
	relays []string         // a's Options.Relays for b
	silent []string         // a's Options.Silent
	refuse map[string]error // "c:a": what c's Options.Admit returns for site a
}

func (w *triangle) set(change func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	change()
}

// admit is the Options.Admit of the node of site self.
func (w *triangle) admit(self string) func(string) error {
	return func(site string) error {
		w.mu.Lock()
		defer w.mu.Unlock()
		return w.refuse[self+":"+site]
	}
}

func newTriangle(t *testing.T) *triangle {
	t.Helper()
	w := &triangle{book: newTestBook(), ca: newTLSAuthority(t, "dev"), relays: []string{"c-1"}, refuse: map[string]error{}}
	newPeer := func(site string, change func(*Options)) *testPeer {
		return newTestPeer(t, w.ca, w.book, Identity{"dev", site, site + "-1"}, func(o *Options) {
			o.Admit = w.admit(site)
			if change != nil {
				change(o)
			}
		})
	}
	w.b, w.c = newPeer("b", nil), newPeer("c", nil)
	w.b.serve(t, w.book)
	w.stopC = w.c.serve(t, w.book)
	w.link = newTestLink(t, w.b.addr)
	w.a = newPeer("a", func(o *Options) {
		o.Address = func(node string) (string, bool) {
			if node == "b-1" {
				return w.link.addr, true
			}
			return w.book.address(node)
		}
		o.Relays = func(node string) []string {
			w.mu.Lock()
			defer w.mu.Unlock()
			if node != "b-1" {
				return nil
			}
			return append([]string(nil), w.relays...)
		}
		o.Silent = func() []string {
			w.mu.Lock()
			defer w.mu.Unlock()
			return append([]string(nil), w.silent...)
		}
	})
	w.a.serve(t, w.book)
	w.a.timing = routeTiming{
		tunnelDelay: 20 * time.Millisecond, softTimeout: 100 * time.Millisecond, minProbe: 50 * time.Millisecond,
		recheck: 100 * time.Millisecond, confirm: 20 * time.Millisecond, grace: 50 * time.Millisecond,
	}
	return w
}

// echo accepts connections of a kind and sends back what it reads on them. It
// returns the connections accepted so far.
func echo(t *testing.T, p *testPeer, kind Kind) (accepted func() []*PeerConn) {
	t.Helper()
	var mu sync.Mutex
	var seen []*PeerConn
	ln := p.Listener(kind)
	async.Run(t, func(ctx context.Context) error {
		defer context.AfterFunc(ctx, func() { _ = ln.Close() })()
		var all sync.WaitGroup
		defer all.Wait()
		for {
			conn, err := ln.Accept()
			if err != nil {
				return nil
			}
			mu.Lock()
			seen = append(seen, conn.(*PeerConn))
			mu.Unlock()
			all.Go(func() {
				defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
				_, _ = io.Copy(conn, conn) // until either side ends
				_ = conn.Close()
			})
		}
	})
	return func() []*PeerConn {
		mu.Lock()
		defer mu.Unlock()
		return append([]*PeerConn(nil), seen...)
	}
}

// dialViaC opens a connection from a to b and fails unless it is a tunnel through c.
func (w *triangle) dialViaC(t *testing.T, kind Kind) *PeerConn {
	t.Helper()
	conn, err := w.a.Dial(async.Context(t), kind, "b-1")
	if err != nil {
		t.Fatal(err)
	}
	c := conn.(*PeerConn)
	t.Cleanup(func() { _ = c.Close() })
	if c.via != "c-1" || c.peer != w.b.id {
		t.Fatalf("connected with %s via %q, want %s via c-1", c.peer, c.via, w.b.id)
	}
	return c
}

// routed reports whether a reaches b through that relay; "" is directly.
func (w *triangle) routed(via string) func() bool {
	return func() bool { return w.a.Via("b-1") == via }
}

// relaying is how many tunnels the node relays.
func (p *testPeer) relaying() int {
	p.relayed.mu.Lock()
	defer p.relayed.mu.Unlock()
	return p.relayed.total
}

func roundTrip(conn net.Conn) error {
	if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		return err
	}
	if _, err := conn.Write([]byte("ping")); err != nil {
		return err
	}
	var back [4]byte
	if _, err := io.ReadFull(conn, back[:]); err != nil {
		return err
	}
	if string(back[:]) != "ping" {
		return errors.New("the answer differs from what was sent")
	}
	return conn.SetDeadline(time.Time{})
}

func appendTo(from *raft.NetworkTransport, node string) error {
	var answer raft.AppendEntriesResponse
	return from.AppendEntries(raft.ServerID(node), raft.ServerAddress(node), &raft.AppendEntriesRequest{Term: 7}, &answer)
}
