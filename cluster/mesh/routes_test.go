package mesh

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/test/async"
)

// The link is cut under open connections: everything moves to a relay without
// waiting for TCP timeouts. The link is mended: everything moves back to the direct
// route.
func TestRouteMovesToARelayAndBack(t *testing.T) {
	async.NoLeaks(t)
	w := newTriangle(t)
	w.b.serveGRPC(t)
	w.b.serveHTTP(t)
	w.b.serveRaft(t)
	transport := w.a.serveRaft(t)
	w.a.opts.DialTimeout = 2 * time.Second // two of these confirm the cut
	async.Run(t, w.a.MonitorRoutes)
	ctx := async.Context(t)
	callBoth := func(when string) {
		t.Helper()
		if err := w.a.check(ctx, "b-1"); err != nil {
			t.Errorf("grpc %s: %v", when, err)
		}
		if _, err := post(ctx, w.a.Mesh, "b-1", "hello"); err != nil {
			t.Errorf("http %s: %v", when, err)
		}
	}
	callBoth("at first")
	if err := appendTo(transport, "b-1"); err != nil {
		t.Fatal(err)
	}
	before, err := w.a.Client("b-1")
	if err != nil {
		t.Fatal(err)
	}

	w.link.cut()
	hanging := make(chan error, 1)
	go func() { // on the idle connection, which is dead now
		request, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://b-1/", strings.NewReader("late"))
		if err != nil {
			hanging <- err
			return
		}
		request.Header["X-Idempotency-Key"] = []string{} // so that it may be sent again
		response, err := w.a.HTTPTransport().RoundTrip(request)
		if err == nil {
			_, err = io.Copy(io.Discard, response.Body)
			_ = response.Body.Close()
		}
		hanging <- err
	}()
	async.Await(t, "the link to hold the request back", func() bool { return w.link.held.Load() > 0 })
	w.set(func() { w.silent = []string{"b-1"} })
	async.Await(t, "the route through c", w.routed("c-1"))
	w.set(func() { w.silent = nil })
	// The route changes shortly before the channel is replaced.
	async.Await(t, "the channel to be replaced", func() bool { return before.Replaced.Err() != nil })
	callBoth("through the relay")
	if err := <-hanging; err != nil {
		t.Errorf("the request under way at the cut: %v", err)
	}
	async.Await(t, "a raft call to succeed", func() bool { return appendTo(transport, "b-1") == nil })
	if n := testutil.ToFloat64(w.a.metrics.viaRelay); n != 1 {
		t.Errorf("%v nodes are counted as reached through a relay, want 1", n)
	}

	w.link.mend()
	async.Await(t, "the direct route", w.routed(""))
	w.set(func() { w.relays = nil }) // a slow machine must not open another tunnel after tunnelDelay
	async.Await(t, "all tunnels to be closed", func() bool { return w.c.relaying() == 0 })
	callBoth("on the direct route again")
	async.Await(t, "a raft call to succeed", func() bool { return appendTo(transport, "b-1") == nil })
	if n := testutil.ToFloat64(w.a.metrics.viaRelay); n != 0 || w.c.relaying() != 0 {
		t.Errorf("%v nodes are counted as reached through a relay and c relays %d tunnels, want 0 and 0", n, w.c.relaying())
	}
}

// A probe of a node whose direct route works asks no relay.
func TestProbeOfAWorkingDirectRoute(t *testing.T) {
	async.NoLeaks(t)
	w := newTriangle(t)
	echo(t, w.b, KindGRPC)
	w.a.timing.tunnelDelay, w.a.timing.softTimeout = time.Minute, time.Minute
	w.a.probeRoute("b-1")
	async.Await(t, "the probe to end", func() bool { return w.a.routes.successes("b-1") == 1 })
	if w.a.Via("b-1") != "" || testutil.CollectAndCount(w.a.metrics.tunnels) != 0 {
		t.Error("the probe asked a relay")
	}
	w.set(func() { w.relays = nil })
	w.a.probeRoute("c-1")
	if w.a.routes.successes("c-1") != 0 {
		t.Error("a node was probed that no relay hears")
	}
}

// During a short interruption, new connections use a relay. The open direct
// connections stay open.
func TestShortInterruptionKeepsOpenConnections(t *testing.T) {
	async.NoLeaks(t)
	w := newTriangle(t)
	echo(t, w.b, KindGRPC)
	echo(t, w.b, KindHTTP)
	async.Run(t, w.a.MonitorRoutes)
	open, err := w.a.Dial(async.Context(t), KindHTTP, "b-1")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = open.Close() }()
	w.link.cut()
	w.a.probeRoute("b-1")
	async.Await(t, "the route through c", w.routed("c-1"))
	w.link.mend() // before a direct dial has failed
	async.Await(t, "the direct route", w.routed(""))
	if via := open.(*PeerConn).via; via != "" {
		t.Fatalf("the first connection goes through %s, want direct", via)
	}
	if err := roundTrip(open); err != nil {
		t.Errorf("an open direct connection was aborted: %v", err)
	}
}

// If a relay fails the next one is used, and without any relay the route is direct
// again.
func TestNextRelayIsUsedWhenOneFails(t *testing.T) {
	async.NoLeaks(t)
	w := newTriangle(t)
	echo(t, w.b, KindGRPC)
	d := newTestPeer(t, w.ca, w.book, Identity{"dev", "d", "d-1"}, nil)
	d.serve(t, w.book)
	w.book.set("dead-1", "127.0.0.1:1")
	if err := w.link.refuse(); err != nil {
		t.Fatal(err)
	}
	w.set(func() { w.relays, w.silent = []string{"dead-1", "c-1", "d-1"}, []string{"b-1"} })
	async.Run(t, w.a.MonitorRoutes)
	async.Await(t, "the route through c, the first relay that works", w.routed("c-1"))
	if got := w.a.relaysFor("b-1"); fmt.Sprint(got) != "[c-1 dead-1 d-1]" {
		t.Errorf("relays are asked in the order %v, want the present one first", got)
	}
	w.set(func() { w.silent = nil })
	open := w.dialViaC(t, KindGRPC)

	w.stopC()
	if _, err := open.Read(make([]byte, 1)); err == nil {
		t.Error("a tunnel is still open after its relay has ended")
	}
	w.set(func() { w.silent = []string{"b-1"} })
	async.Await(t, "the route through d", w.routed("d-1"))

	w.set(func() { w.relays = nil })
	async.Await(t, "the direct route, as no relay hears the node", w.routed(""))
}

// Close ends a probe and a dial that wait for a relay which does not answer.
func TestCloseDuringAProbe(t *testing.T) {
	async.NoLeaks(t)
	w := newTriangle(t)
	echo(t, w.b, KindGRPC)
	mute, err := net.Listen("tcp", "127.0.0.1:0") // accepts, and sends nothing
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = mute.Close() }()
	w.book.set("c-1", mute.Addr().String())
	w.link.cut()
	w.a.probeRoute("b-1")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	dialled := make(chan error, 1)
	go func() {
		_, err := w.a.Dial(ctx, KindGRPC, "b-1")
		dialled <- err
	}()
	conn, err := mute.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	start := time.Now()
	if err := w.a.Close(); err != nil {
		t.Error(err)
	}
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("Close took %v, want less than the timeout of a dial", took)
	}
	w.a.probeRoute("b-1") // does nothing after Close
	cancel()
	if err := <-dialled; err == nil {
		t.Error("a dial succeeded after Close")
	}
}

func TestProbesAreBounded(t *testing.T) {
	table := newRouteTable(newMetrics(nil))
	if !table.beginProbe("a", time.Hour) || table.beginProbe("a", 0) {
		t.Error("a node was not probed, or twice at once")
	}
	table.endProbe("a")
	if table.beginProbe("a", time.Hour) || !table.beginProbe("a", 0) {
		t.Error("the time between two probes of a node is not respected")
	}
	for i := range maxProbes - 1 {
		if !table.beginProbe(fmt.Sprint("n", i), 0) {
			t.Fatalf("probe %d was refused below the bound", i)
		}
	}
	if table.beginProbe("one more", 0) {
		t.Error("a probe beyond the bound was allowed")
	}
	table.endProbe("n0")
	table.remove("n1")
	if table.endProbe("n1"); table.probes != maxProbes-2 {
		t.Errorf("%d probes are under way", table.probes)
	}
	for i := range agreed.MaxNodes {
		if table.beginProbe(fmt.Sprint("m", i), 0) {
			table.endProbe(fmt.Sprint("m", i))
		}
	}
	if len(table.byNode) != agreed.MaxNodes {
		t.Errorf("the table holds %d nodes, want at most %d", len(table.byNode), agreed.MaxNodes)
	}
}
