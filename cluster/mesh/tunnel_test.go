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

// With the direct route cut, gRPC, HTTP and Raft go through a tunnel, and the
// target sees the dialler's identity, not the relay's.
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
		t.Errorf("b was called by %v, want a", got)
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
		t.Errorf("c relayed %v tunnels, want at least 3", n)
	}
	if n := testutil.ToFloat64(w.b.metrics.opened.WithLabelValues("relayed", "accepted")); n < 3 {
		t.Errorf("b accepted %v tunnels, want at least 3", n)
	}
}

// No tunnel is opened while the direct dial may still succeed.
func TestDirectRouteIsPreferred(t *testing.T) {
	async.NoLeaks(t)
	w := newTriangle(t)
	echo(t, w.b, KindHTTP)
	w.a.timing.tunnelDelay = time.Minute
	conn, err := w.a.Dial(async.Context(t), KindHTTP, "b-1")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if via := conn.(*PeerConn).via; via != "" {
		t.Errorf("the connection goes through %s, want direct", via)
	}
	if n := testutil.ToFloat64(w.c.metrics.tunnels.WithLabelValues("relayed", "ok")); n != 0 {
		t.Errorf("c relayed %v tunnels, want none", n)
	}
}

// Only a failure of the network leads to a tunnel, not a refusal.
func TestNoTunnelAfterARefusal(t *testing.T) {
	async.NoLeaks(t)
	for _, tc := range []struct {
		name    string
		prepare func(*triangle)
		want    func(error) bool
	}{
		{"b does not admit a", func(w *triangle) { w.refuse["b:a"] = errors.New("a is isolated") }, refusedAs(CodeIsolated)},
		{"a does not admit b", func(w *triangle) { w.refuse["a:b"] = errors.New("b is isolated") }, refusedAs(CodeIsolated)},
		{"another generation", func(w *triangle) { w.b.setMembership(recovered) }, refusedAs(CodeOlderGeneration)},
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
			w.a.timing.tunnelDelay = time.Minute
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

// A tunnel ends, and no new one is made, if any of its three nodes refuses the site
// of one of the others.
func TestTunnelsRespectIsolation(t *testing.T) {
	async.NoLeaks(t)
	for _, tc := range []struct{ name, node, site string }{
		{"the relay refuses the dialler", "c", "a"},
		{"the relay refuses the target", "c", "b"},
		{"the target refuses the dialler", "b", "a"},
		{"the target refuses the relay", "b", "c"},
		{"the dialler refuses the target", "a", "b"},
		{"the dialler refuses the relay", "a", "c"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newTriangle(t)
			echo(t, w.b, KindHTTP)
			w.link.cut()
			w.a.opts.DialTimeout = 2 * time.Second // for the direct dial, which fails
			open := w.dialViaC(t, KindHTTP)
			if err := roundTrip(open); err != nil {
				t.Fatal(err)
			}
			w.set(func() { w.refuse[tc.node+":"+tc.site] = errors.New("a drill") })
			if conn, err := w.a.Dial(async.Context(t), KindHTTP, "b-1"); err == nil {
				_ = conn.Close()
				t.Error("a new tunnel was made")
			}
			if err := roundTrip(open); err != nil {
				t.Fatalf("the open tunnel ended before CloseRefused: %v", err)
			}
			map[string]*testPeer{"a": w.a, "b": w.b, "c": w.c}[tc.node].CloseRefused()
			if err := open.SetReadDeadline(time.Now().Add(20 * time.Second)); err == nil {
				_, err = open.Read(make([]byte, 1))
				if err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
					t.Errorf("the tunnel is still open after CloseRefused: %v", err)
				}
			}
			async.Await(t, "the relay to end the tunnel", func() bool { return w.c.relaying() == 0 })
		})
	}
}

// The target's CloseAll ends a tunnelled connection for the dialler's site and for
// the relay's.
func TestCloseAllEndsTunnels(t *testing.T) {
	async.NoLeaks(t)
	w := newTriangle(t)
	accepted := echo(t, w.b, KindHTTP)
	w.link.cut()
	for _, site := range []string{"a", "c"} {
		conn := w.dialViaC(t, KindHTTP)
		if err := roundTrip(conn); err != nil {
			t.Fatal(err)
		}
		all := accepted()
		if last := all[len(all)-1]; last.peer != w.a.id || last.via != "c-1" {
			t.Errorf("b sees a connection with %s via %q, want a-1 via c-1", last.peer, last.via)
		}
		w.b.CloseAll(site)
		if err := roundTrip(conn); err == nil {
			t.Errorf("the connection is still open after CloseAll of site %s", site)
		}
	}
}

func TestRelayRefuses(t *testing.T) {
	async.NoLeaks(t)
	w := newTriangle(t)
	w.book.set("dead-1", "127.0.0.1:1")
	w.book.set("relayed-1", w.b.addr)
	if !w.c.routes.beginProbe("relayed-1", 0) {
		t.Fatal("could not add a route")
	}
	w.c.routes.setRelay("relayed-1", "b-1")
	w.c.relayed.mu.Lock()
	w.c.relayed.limit = 3
	w.c.relayed.mu.Unlock()
	ask := func(target string) (*PeerConn, error) {
		leg, err := w.a.dial(async.Context(t), dialRequest{kind: KindTunnel, node: "c-1", target: target}, w.c.addr)
		if err != nil {
			return nil, err
		}
		t.Cleanup(func() { _ = leg.Close() })
		answer, err := readPreface(leg)
		if err != nil {
			return nil, err
		}
		if _, refused := decodeReply(answer); refused != nil {
			return nil, refused
		}
		return leg, nil
	}
	for _, tc := range []struct{ name, target, code string }{
		{"back to the dialler", "a-1", CodeNoTunnel},
		{"to the relay itself", "c-1", CodeNoTunnel},
		{"to an unknown node", "unknown-1", CodeUnreached},
		{"to a dead node", "dead-1", CodeUnreached},
		{"through a second relay", "relayed-1", CodeUnreached},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if _, err := ask(tc.target); !refusedAs(tc.code)(err) {
				t.Errorf("got %v, want %s", err, tc.code)
			}
		})
	}
	t.Run("too many", func(t *testing.T) {
		var legs []*PeerConn
		for range 3 {
			leg, err := ask("b-1")
			if err != nil {
				t.Fatal(err)
			}
			legs = append(legs, leg)
		}
		if _, err := ask("b-1"); !refusedAs(CodeNoTunnel)(err) {
			t.Errorf("got %v", err)
		}
		_ = legs[0].Close()
		async.Await(t, "a free slot", func() bool {
			leg, err := ask("b-1")
			if leg != nil {
				legs = append(legs, leg)
			}
			return err == nil
		})
	})
	t.Run("too many of one peer", func(t *testing.T) {
		r := relayLimiter{limit: 10, limitPerPeer: 2, perPeer: map[string]int{}}
		for i, tc := range []struct {
			node string
			want bool
		}{{"x", true}, {"x", true}, {"x", false}, {"y", true}} {
			if got := r.acquire(tc.node); got != tc.want {
				t.Errorf("step %d: acquire(%s) = %v", i, tc.node, got)
			}
		}
		r.release("x")
		if !r.acquire("x") {
			t.Error("a released slot is not free")
		}
	})
}

// A malicious relay with a valid certificate can't impersonate the target.
func TestRelayCannotImpersonateTheTarget(t *testing.T) {
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
			accepted, _ := encodePreface(prefaceReply{Format: 1, ClusterID: first.ClusterID, Generation: first.Generation})
			leg := tls.Server(raw, w.c.serverTLS)
			_, _ = readPreface(leg)
			_, _ = leg.Write(append(accepted, accepted...))
			inner := tls.Server(leg, w.c.serverTLS) // as if it were b
			_, _ = readPreface(inner)
			_, _ = inner.Write(accepted)
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

// The handshake inside a tunnel refuses nested tunnels, invalid data and silence,
// as the handshake over TCP does.
func TestInvalidHandshakesInsideATunnel(t *testing.T) {
	async.NoLeaks(t)
	w := newTriangle(t)
	echo(t, w.b, KindHTTP)
	relayedLeg := func() *PeerConn {
		leg, err := w.c.dial(async.Context(t), dialRequest{kind: KindRelayed, node: "b-1"}, w.b.addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = leg.Close() })
		return leg
	}
	for _, kind := range []Kind{KindTunnel, KindRelayed} {
		inside := dialRequest{kind: kind, node: "b-1"}
		if kind == KindTunnel {
			inside.target = "c-1"
		}
		if _, err := w.a.clientHandshake(async.Context(t), relayedLeg(), inside); !refusedAs(CodeNoTunnel)(err) {
			t.Errorf("%s inside a tunnel: got %v, want no_tunnel", kind, err)
		}
	}
	for reason, data := range map[string][]byte{
		"not_tls": []byte("GET / HTTP/1.1\r\n\r\n"),
		"closed":  {},
	} {
		before := testutil.ToFloat64(w.b.metrics.failures.WithLabelValues("accepted", reason))
		leg := relayedLeg()
		_, _ = leg.Write(data)
		_ = leg.Close()
		async.Await(t, "the failure to be counted as "+reason, func() bool {
			return testutil.ToFloat64(w.b.metrics.failures.WithLabelValues("accepted", reason)) == before+1
		})
	}
	// A peer that sends nothing inside the tunnel is disconnected after the time limit
	// of any handshake.
	strict := newTestPeer(t, w.ca, w.book, Identity{"dev", "d", "d-1"}, nil)
	strict.handshakes.limit = 300 * time.Millisecond
	strict.serve(t, w.book)
	var leg *PeerConn
	async.Await(t, "a leg that opens within the time limit", func() bool { // which a slow machine may miss
		var err error
		leg, err = w.c.dial(async.Context(t), dialRequest{kind: KindRelayed, node: "d-1"}, strict.addr)
		return err == nil
	})
	defer func() { _ = leg.Close() }()
	if err := leg.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := leg.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the silent connection is still open: %v", err)
	}
	for _, p := range []*testPeer{w.b, strict} {
		async.Await(t, "all connections to be closed", func() bool { return len(remoteAddrs(p.Mesh)) == 0 })
	}
}

// When one end closes a tunnel, the data that it sent before still arrives, and all
// three nodes close their connections.
func TestTunnelCloses(t *testing.T) {
	async.NoLeaks(t)
	w := newTriangle(t)
	ln := w.b.Listener(KindHTTP)
	w.link.cut()
	near := w.dialViaC(t, KindHTTP)
	far, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := near.Write([]byte("last bytes")); err != nil {
		t.Fatal(err)
	}
	if err := near.Close(); err != nil {
		t.Error(err)
	}
	got, err := io.ReadAll(far)
	if string(got) != "last bytes" || err != nil {
		t.Errorf("%q arrived, %v", got, err)
	}
	_ = far.Close()
	for _, p := range []*testPeer{w.a, w.b, w.c} {
		async.Await(t, "all connections to be closed at "+p.id.Node, func() bool { return len(remoteAddrs(p.Mesh)) == 0 })
	}

	// When the relay closes a tunnel, both ends see it closed.
	near = w.dialViaC(t, KindHTTP)
	far, err = ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = far.Close() }()
	w.c.CloseKind(KindTunnel)
	for _, end := range []net.Conn{near, far} {
		if _, err := end.Read(make([]byte, 1)); err == nil {
			t.Error("one end is still open after the relay has closed the tunnel")
		}
	}
}

// When a node is reached neither directly nor through a relay, the error names both
// failures and wraps the direct one.
func TestErrorWhenNoRouteWorks(t *testing.T) {
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
		t.Errorf("the error wraps the relay's refusal: %v", err)
	}
	if got := testutil.ToFloat64(w.a.metrics.tunnels.WithLabelValues("dialled", CodeUnreached)); got != 1 {
		t.Errorf("the failed tunnel was counted %v times, want once", got)
	}
}

func TestIsNetworkError(t *testing.T) {
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
		{&tunnelError{"c-1", &RefusedError{Code: CodeIsolated}}, true},
		{errNoRelay, true},
		{fmt.Errorf("%w: 8192 are open", errTooManyConns), false},
	} {
		if got := isNetworkError(tc.err); got != tc.want {
			t.Errorf("%v: %v, want %v", tc.err, got, tc.want)
		}
	}
}
