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

// testLink is a way to a node that can be cut: then what is on its way stays
// there, and new connections open and hear nothing, as behind a firewall that
// drops. Mended, it goes on where it was.
type testLink struct {
	addr string
	ln   net.Listener
	held atomic.Int64 // pieces of data that wait for the end of a cut

	mu   sync.Mutex // guards open
	open chan struct{}
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
	for _, way := range [][2]net.Conn{{near, far}, {far, near}} {
		both.Go(func() {
			defer func() { _ = way[0].Close(); _ = way[1].Close() }()
			b := make([]byte, 4096)
			for {
				n, err := way[0].Read(b)
				if err != nil {
					return
				}
				l.held.Add(1)
				if !l.pass(ctx) {
					return
				}
				l.held.Add(-1)
				if _, err := way[1].Write(b[:n]); err != nil {
					return
				}
			}
		})
	}
	both.Wait()
}

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

// refuse has the link answer new connections with a reset, for good.
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

// triangle is three sites of one node each: a, which dials b over a link that
// can be cut, and c, which both reach.
type triangle struct {
	a, b, c *testPeer
	stopC   func()    // from accepting
	link    *testLink // from a to b
	book    *testBook
	ca      tlsAuthority

	mu     sync.Mutex // guards all below
	relays []string   // that a may ask
	silent []string   // for a
	cutOff map[string]error
}

func (w *triangle) set(change func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	change()
}

// admit is every node's Admit: "c:a" is c's word about site a.
func (w *triangle) admit(self string) func(string) error {
	return func(site string) error {
		w.mu.Lock()
		defer w.mu.Unlock()
		return w.cutOff[self+":"+site]
	}
}

func newTriangle(t *testing.T) *triangle {
	t.Helper()
	w := &triangle{book: newTestBook(), ca: newTLSAuthority(t, "dev"), relays: []string{"c-1"}, cutOff: map[string]error{}}
	make := func(site string, change func(*Options)) *testPeer {
		return newTestPeer(t, w.ca, w.book, Identity{"dev", site, site + "-1"}, func(o *Options) {
			o.Admit = w.admit(site)
			if change != nil {
				change(o)
			}
		})
	}
	w.b, w.c = make("b", nil), make("c", nil)
	w.b.serve(t, w.book)
	w.stopC = w.c.serve(t, w.book)
	w.link = newTestLink(t, w.b.addr)
	w.a = make("a", func(o *Options) {
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
	w.a.timing = wayTiming{
		headStart: 20 * time.Millisecond, soft: 100 * time.Millisecond, every: 50 * time.Millisecond,
		recheck: 100 * time.Millisecond, confirm: 20 * time.Millisecond, grace: 50 * time.Millisecond,
	}
	return w
}

// echo answers what it reads on connections of a kind, and gives their peers.
func echo(t *testing.T, p *testPeer, kind Kind) (peers func() []*PeerConn) {
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

// through opens a connection from a to b that must be a tunnel through c.
func (w *triangle) through(t *testing.T, kind Kind) *PeerConn {
	t.Helper()
	conn, err := w.a.Dial(async.Context(t), kind, "b-1")
	if err != nil {
		t.Fatal(err)
	}
	c := conn.(*PeerConn)
	t.Cleanup(func() { _ = c.Close() })
	if c.Via() != "c-1" || c.Peer() != w.b.id {
		t.Fatalf("connected with %s via %q, want %s via c-1", c.Peer(), c.Via(), w.b.id)
	}
	return c
}

// goes tells which way a leads to b.
func (w *triangle) goes(via string) func() bool {
	return func() bool { return w.a.Way("b-1") == via }
}

// carries reports how many tunnels stand at a node.
func (p *testPeer) carries() int {
	p.relayed.mu.Lock()
	defer p.relayed.mu.Unlock()
	return p.relayed.all
}

func roundTrip(conn net.Conn) error {
	if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		return err
	}
	if _, err := conn.Write([]byte("over")); err != nil {
		return err
	}
	var back [4]byte
	if _, err := io.ReadFull(conn, back[:]); err != nil {
		return err
	}
	if string(back[:]) != "over" {
		return errors.New("other bytes came back")
	}
	return conn.SetDeadline(time.Time{})
}

func appendTo(from *raft.NetworkTransport, node string) error {
	var answer raft.AppendEntriesResponse
	return from.AppendEntries(raft.ServerID(node), raft.ServerAddress(node), &raft.AppendEntriesRequest{Term: 7}, &answer)
}
