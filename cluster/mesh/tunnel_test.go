package mesh

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/dsnode/dsnode/test/async"
)

// With the direct way cut every user of the mesh gets through, and both ends
// know each other as if there were nobody between them.
func TestTunnelCarriesEveryKind(t *testing.T) {
	async.NoLeaks(t)
	w := newTriangle(t)
	callers := w.b.serveGRPC(t)
	w.b.serveHTTP(t)
	w.b.serveRaft(t)
	transport := w.a.serveRaft(t)
	w.link.cut()
	ctx := async.Context(t)

	if err := w.a.check(ctx, "b-1"); err != nil {
		t.Errorf("grpc: %v", err)
	}
	if got := callers(); len(got) == 0 || got[0] != w.a.id {
		t.Errorf("called by %v", got)
	}
	body := strings.Repeat("deepseek ", 100_000)
	if got, err := post(ctx, w.a.Mesh, "b-1", body); err != nil || got != "a-1 to b-1: "+body {
		t.Errorf("http: %d bytes, %v", len(got), err)
	}
	if err := appendTo(transport, "b-1"); err != nil {
		t.Errorf("raft: %v", err)
	}
	for _, kind := range []Kind{KindHTTP, KindRaft} {
		if n := testutil.ToFloat64(w.b.metrics.opened.WithLabelValues(string(kind), "accepted")); n == 0 {
			t.Errorf("b has accepted no connection of kind %s", kind)
		}
	}
	if n := testutil.ToFloat64(w.c.metrics.tunnels.WithLabelValues("relayed", "ok")); n < 3 {
		t.Errorf("c relayed %v tunnels, want 3 at least", n)
	}
	if n := testutil.ToFloat64(w.b.metrics.opened.WithLabelValues("relayed", "accepted")); n < 3 {
		t.Errorf("b accepted %v tunnels, want 3 at least", n)
	}
}

// A direct way that works is taken, also when it is slow.
func TestDirectWayComesFirst(t *testing.T) {
	async.NoLeaks(t)
	w := newTriangle(t)
	echo(t, w.b, KindHTTP)
	w.a.timing.headStart = time.Minute
	conn, err := w.a.Dial(async.Context(t), KindHTTP, "b-1")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if via := conn.(*PeerConn).Via(); via != "" {
		t.Errorf("it goes through %s", via)
	}
	if n := testutil.ToFloat64(w.c.metrics.tunnels.WithLabelValues("relayed", "ok")); n != 0 {
		t.Errorf("%v tunnels were asked for", n)
	}
}

// What is no fault of the network is no reason for a tunnel.
func TestNoTunnelAroundARefusal(t *testing.T) {
	async.NoLeaks(t)
	for _, tc := range []struct {
		name    string
		prepare func(*triangle)
		want    func(error) bool
	}{
		{"b does not admit a", func(w *triangle) { w.cutOff["b:a"] = errors.New("a is cut off") }, refusedAs(CodeIsolated)},
		{"a does not admit b", func(w *triangle) { w.cutOff["a:b"] = errors.New("b is cut off") }, refusedAs(CodeIsolated)},
		{"another generation", func(w *triangle) { w.b.is(recovered) }, refusedAs(CodeOlderGeneration)},
		{
			"another node at the address", func(w *triangle) { w.link.addr = w.c.addr },
			func(err error) bool { return errors.Is(err, ErrWrongNode) },
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newTriangle(t)
			for _, p := range []*testPeer{w.b, w.c} {
				p.Listener(KindHTTP)
			}
			w.a.timing.headStart = time.Minute
			w.set(func() { tc.prepare(w) })
			if _, err := w.a.Dial(async.Context(t), KindHTTP, "b-1"); !tc.want(err) {
				t.Errorf("got %v", err)
			}
			if n := testutil.CollectAndCount(w.a.metrics.tunnels); n != 0 {
				t.Error("a tunnel was asked for")
			}
		})
	}
}

func refusedAs(code string) func(error) bool {
	return func(err error) bool {
		var refused *RefusedError
		return errors.As(err, &refused) && refused.Code == code
	}
}

// A site that is cut off on purpose is cut off from tunnels too, whoever of the
// three is the one that knows.
func TestTunnelsRespectIsolation(t *testing.T) {
	async.NoLeaks(t)
	for _, tc := range []struct{ name, who, about string }{
		{"the relay does not admit the asker", "c", "a"},
		{"the relay does not admit the target", "c", "b"},
		{"the target does not admit the asker", "b", "a"},
		{"the target does not admit the relay", "b", "c"},
		{"the asker does not admit the target", "a", "b"},
		{"the asker does not admit the relay", "a", "c"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newTriangle(t)
			echo(t, w.b, KindHTTP)
			w.link.cut()
			w.a.opts.DialTimeout = 2 * time.Second // for the direct way, which fails
			standing := w.through(t, KindHTTP)
			if err := roundTrip(standing); err != nil {
				t.Fatal(err)
			}
			w.set(func() { w.cutOff[tc.who+":"+tc.about] = errors.New("a drill") })
			if conn, err := w.a.Dial(async.Context(t), KindHTTP, "b-1"); err == nil {
				_ = conn.Close()
				t.Error("a new tunnel was made")
			}
			if err := roundTrip(standing); err != nil {
				t.Fatalf("the standing one ended before it was severed: %v", err)
			}
			map[string]*testPeer{"a": w.a, "b": w.b, "c": w.c}[tc.who].CloseRefused()
			if err := standing.SetReadDeadline(time.Now().Add(20 * time.Second)); err == nil {
				_, err = standing.Read(make([]byte, 1))
				if err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
					t.Errorf("the standing tunnel goes on: %v", err)
				}
			}
			async.Await(t, "the relay to let go", func() bool { return w.c.carries() == 0 })
		})
	}
}

// The far end finds a tunnelled connection under its peer's site, and under the
// relay's.
func TestCloseAllFindsTunnels(t *testing.T) {
	async.NoLeaks(t)
	w := newTriangle(t)
	accepted := echo(t, w.b, KindHTTP)
	w.link.cut()
	for _, site := range []string{"a", "c"} {
		conn := w.through(t, KindHTTP)
		if err := roundTrip(conn); err != nil {
			t.Fatal(err)
		}
		all := accepted()
		if last := all[len(all)-1]; last.Peer() != w.a.id || last.Via() != "c-1" {
			t.Errorf("b takes it for one with %s via %q", last.Peer(), last.Via())
		}
		w.b.CloseAll(site)
		if err := roundTrip(conn); err == nil {
			t.Errorf("it outlives the end of all connections with site %s", site)
		}
	}
}

func TestRelayRefuses(t *testing.T) {
	async.NoLeaks(t)
	w := newTriangle(t)
	w.book.set("dead-1", "127.0.0.1:1")
	w.book.set("detoured-1", w.b.addr)
	if !w.c.ways.begin("detoured-1", 0) {
		t.Fatal("there is no place for a way")
	}
	w.c.ways.set("detoured-1", "b-1")
	w.c.relayed.mu.Lock()
	w.c.relayed.most = 3
	w.c.relayed.mu.Unlock()
	ask := func(target string) (*PeerConn, error) {
		half, err := w.a.dial(async.Context(t), greeting{kind: KindTunnel, node: "c-1", target: target}, w.c.addr)
		if err != nil {
			return nil, err
		}
		t.Cleanup(func() { _ = half.Close() })
		text, err := readPreface(half)
		if err != nil {
			return nil, err
		}
		if _, refused := decodeReply(text); refused != nil {
			return nil, refused
		}
		return half, nil
	}
	for _, tc := range []struct{ name, target, code string }{
		{"back to the asker", "a-1", CodeNoTunnel},
		{"to the relay itself", "c-1", CodeNoTunnel},
		{"to nobody", "nobody-1", CodeUnreached},
		{"to a dead node", "dead-1", CodeUnreached},
		{"through a second relay", "detoured-1", CodeUnreached},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if _, err := ask(tc.target); !refusedAs(tc.code)(err) {
				t.Errorf("got %v, want %s", err, tc.code)
			}
		})
	}
	t.Run("too many", func(t *testing.T) {
		var halves []*PeerConn
		for range 3 {
			half, err := ask("b-1")
			if err != nil {
				t.Fatal(err)
			}
			halves = append(halves, half)
		}
		if _, err := ask("b-1"); !refusedAs(CodeNoTunnel)(err) {
			t.Errorf("got %v", err)
		}
		_ = halves[0].Close()
		async.Await(t, "a place to be free", func() bool {
			half, err := ask("b-1")
			if half != nil {
				halves = append(halves, half)
			}
			return err == nil
		})
	})
	t.Run("too many of one", func(t *testing.T) {
		r := relayed{most: 10, each: 2, of: map[string]int{}}
		for i, tc := range []struct {
			node string
			want bool
		}{{"x", true}, {"x", true}, {"x", false}, {"y", true}} {
			if got := r.enter(tc.node); got != tc.want {
				t.Errorf("step %d: %s enters: %v", i, tc.node, got)
			}
		}
		r.leave("x")
		if !r.enter("x") {
			t.Error("a place that was left is not free")
		}
	})
}

// A relay that is one of us and malicious can refuse, no more.
func TestRelayCannotSpeakForAnother(t *testing.T) {
	async.NoLeaks(t)
	w := newTriangle(t)
	w.link.cut()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	async.Run(t, func(ctx context.Context) error {
		defer context.AfterFunc(ctx, func() { _ = ln.Close() })()
		for {
			raw, err := ln.Accept()
			if err != nil {
				return nil
			}
			_ = raw.SetDeadline(time.Now().Add(10 * time.Second))
			welcome, _ := appendPreface(nil, prefaceReply{Format: 1, ClusterID: first.ClusterID, Generation: first.Generation})
			half := tls.Server(raw, w.c.serverTLS)
			_, _ = readPreface(half)
			_, _ = half.Write(append(welcome, welcome...))
			inner := tls.Server(half, w.c.serverTLS) // as if it were b
			_, _ = readPreface(inner)
			_, _ = inner.Write(welcome)
			_, _ = io.Copy(io.Discard, raw)
			_ = raw.Close()
		}
	})
	w.book.set("c-1", ln.Addr().String())
	conn, err := w.a.Dial(async.Context(t), KindHTTP, "b-1")
	if !errors.Is(err, ErrWrongNode) {
		t.Errorf("got %v, %v, want ErrWrongNode", conn, err)
	}
}

// What a peer may say inside a tunnel, and no stranger before it.
func TestHostileInsideOfATunnel(t *testing.T) {
	async.NoLeaks(t)
	w := newTriangle(t)
	echo(t, w.b, KindHTTP)
	relayedHalf := func() *PeerConn {
		half, err := w.c.dial(async.Context(t), greeting{kind: KindRelayed, node: "b-1"}, w.b.addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = half.Close() })
		return half
	}
	for _, kind := range []Kind{KindTunnel, KindRelayed} {
		inside := greeting{kind: kind, node: "b-1"}
		if kind == KindTunnel {
			inside.target = "c-1"
		}
		if _, err := w.a.greet(async.Context(t), relayedHalf(), inside); !refusedAs(CodeNoTunnel)(err) {
			t.Errorf("%s inside of a tunnel: %v", kind, err)
		}
	}
	for reason, say := range map[string][]byte{
		"not_tls": []byte("GET / HTTP/1.1\r\n\r\n"),
		"closed":  {},
	} {
		before := testutil.ToFloat64(w.b.metrics.failures.WithLabelValues("accepted", reason))
		half := relayedHalf()
		_, _ = half.Write(say)
		_ = half.Close()
		async.Await(t, "it to be counted as "+reason, func() bool {
			return testutil.ToFloat64(w.b.metrics.failures.WithLabelValues("accepted", reason)) == before+1
		})
	}
	// Silence is dropped as soon as a stranger's.
	strict := newTestPeer(t, w.ca, w.book, Identity{"dev", "d", "d-1"}, nil)
	strict.arrivals.limit = 300 * time.Millisecond
	strict.serve(t, w.book)
	var half *PeerConn
	async.Await(t, "a half that is in time", func() bool { // on a busy machine
		var err error
		half, err = w.c.dial(async.Context(t), greeting{kind: KindRelayed, node: "d-1"}, strict.addr)
		return err == nil
	})
	defer func() { _ = half.Close() }()
	if err := half.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := half.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a silent one is kept: %v", err)
	}
	for _, p := range []*testPeer{w.b, strict} {
		async.Await(t, "nothing to be left", func() bool { return len(remoteAddrs(p.Mesh)) == 0 })
	}
}

// The ends of a tunnel come to an end together, and what was said before that
// arrives.
func TestTunnelEnds(t *testing.T) {
	async.NoLeaks(t)
	w := newTriangle(t)
	ln := w.b.Listener(KindHTTP)
	w.link.cut()
	near := w.through(t, KindHTTP)
	far, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := near.Write([]byte("last words")); err != nil {
		t.Fatal(err)
	}
	if err := near.Close(); err != nil {
		t.Error(err)
	}
	text, err := io.ReadAll(far)
	if string(text) != "last words" || err != nil {
		t.Errorf("%q arrived, %v", text, err)
	}
	_ = far.Close()
	for _, p := range []*testPeer{w.a, w.b, w.c} {
		async.Await(t, "nothing to be left at "+p.id.Node, func() bool { return len(remoteAddrs(p.Mesh)) == 0 })
	}

	// The relay's own end ends it as well.
	near = w.through(t, KindHTTP)
	far, err = ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = far.Close() }()
	w.c.CloseKind(KindTunnel)
	for _, end := range []net.Conn{near, far} {
		if _, err := end.Read(make([]byte, 1)); err == nil {
			t.Error("one end goes on without the relay")
		}
	}
}

// When no way leads to a node the words tell of both, and the reason is the
// direct one's.
func TestNeitherWay(t *testing.T) {
	async.NoLeaks(t)
	w := newTriangle(t)
	w.link.addr = "127.0.0.1:1" // refuses
	w.book.set("b-1", "127.0.0.1:1")
	_, err := w.a.Dial(async.Context(t), KindHTTP, "b-1")
	var network *net.OpError
	if !errors.As(err, &network) || !strings.Contains(err.Error(), "through c-1") {
		t.Errorf("got %v", err)
	}
	if refusedAs(CodeUnreached)(err) {
		t.Errorf("the relay's refusal passes for the node's: %v", err)
	}
	if got := testutil.ToFloat64(w.a.metrics.tunnels.WithLabelValues("dialled", CodeUnreached)); got != 1 {
		t.Errorf("counted %v times", got)
	}
}

func TestCutOff(t *testing.T) {
	for _, tc := range []struct {
		err  error
		want bool
	}{
		{nil, false},
		{context.Canceled, false},
		{context.DeadlineExceeded, true},
		{&net.OpError{Op: "dial", Err: errors.New("no route to host")}, true},
		{&net.DNSError{Err: "no such host"}, true},
		{fmt.Errorf("read preface: %w", io.EOF), true},
		{&RefusedError{Code: CodeIsolated}, false},
		{fmt.Errorf("%w: b", ErrWrongNode), false},
		{&detourError{"c-1", &RefusedError{Code: CodeIsolated}}, true},
		{errNoRelay, true},
		{fmt.Errorf("%w: 8192 stand", errTooManyConns), false},
	} {
		if got := cutOff(tc.err); got != tc.want {
			t.Errorf("%v: %v, want %v", tc.err, got, tc.want)
		}
	}
}
