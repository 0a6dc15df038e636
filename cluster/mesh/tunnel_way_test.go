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

// The link breaks under everything that stands, is found to be cut, and heals:
// nobody has to wait for TCP to give up, and in the end all is direct again.
func TestWayIsFoundAndLeft(t *testing.T) {
	async.NoLeaks(t)
	w := newTriangle(t)
	w.b.serveGRPC(t)
	w.b.serveHTTP(t)
	w.b.serveRaft(t)
	transport := w.a.serveRaft(t)
	w.a.opts.DialTimeout = 2 * time.Second // the cut is certain after two of these
	async.Run(t, w.a.KeepWays)
	ctx := async.Context(t)
	all := func(when string) {
		t.Helper()
		if err := w.a.check(ctx, "b-1"); err != nil {
			t.Errorf("grpc %s: %v", when, err)
		}
		if _, err := post(ctx, w.a.Mesh, "b-1", "hello"); err != nil {
			t.Errorf("http %s: %v", when, err)
		}
	}
	all("at first")
	if err := appendTo(transport, "b-1"); err != nil {
		t.Fatal(err)
	}
	before, err := w.a.Client("b-1")
	if err != nil {
		t.Fatal(err)
	}

	w.link.cut()
	hanging := make(chan error, 1)
	go func() { // on the connection that was kept, which is dead
		request, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://b-1/", strings.NewReader("late"))
		if err != nil {
			hanging <- err
			return
		}
		request.Header["X-Idempotency-Key"] = []string{} // it may be sent again
		response, err := w.a.HTTPTransport().RoundTrip(request)
		if err == nil {
			_, err = io.Copy(io.Discard, response.Body)
			_ = response.Body.Close()
		}
		hanging <- err
	}()
	async.Await(t, "the request to hang", func() bool { return w.link.held.Load() > 0 })
	w.set(func() { w.silent = []string{"b-1"} })
	async.Await(t, "the detour", w.goes("c-1"))
	w.set(func() { w.silent = nil })
	// The way is known a moment before it is taken.
	async.Await(t, "another channel", func() bool { return before.Replaced.Err() != nil })
	all("behind the cut")
	if err := <-hanging; err != nil {
		t.Errorf("a request that hung: %v", err)
	}
	async.Await(t, "raft", func() bool { return appendTo(transport, "b-1") == nil })
	if n := testutil.ToFloat64(w.a.metrics.detours); n != 1 {
		t.Errorf("%v detours are counted", n)
	}

	w.link.mend()
	async.Await(t, "the direct way", w.goes(""))
	w.set(func() { w.relays = nil }) // a busy machine is slower than the head start
	async.Await(t, "the tunnels to be left", func() bool { return w.c.carries() == 0 })
	all("in the end")
	async.Await(t, "raft", func() bool { return appendTo(transport, "b-1") == nil })
	if n := testutil.ToFloat64(w.a.metrics.detours); n != 0 || w.c.carries() != 0 {
		t.Errorf("%v detours are counted, c carries %d tunnels", n, w.c.carries())
	}
}

// A peer that is only slow to answer keeps its way, and nobody is asked.
func TestDoubtAboutAGoodWay(t *testing.T) {
	async.NoLeaks(t)
	w := newTriangle(t)
	echo(t, w.b, KindGRPC)
	w.a.timing.headStart, w.a.timing.soft = time.Minute, time.Minute
	w.a.Doubt("b-1")
	async.Await(t, "the way to be examined", func() bool { return w.a.ways.worked("b-1") == 1 })
	if w.a.Way("b-1") != "" || testutil.CollectAndCount(w.a.metrics.tunnels) != 0 {
		t.Error("another way was looked for")
	}
	w.set(func() { w.relays = nil })
	w.a.Doubt("c-1")
	if w.a.ways.worked("c-1") != 0 {
		t.Error("a way was examined to which there is no other")
	}
}

// A link that is bad, but not cut, gets its new connections another way for a
// moment. Those that stand are left alone.
func TestBadLinkKeepsItsConnections(t *testing.T) {
	async.NoLeaks(t)
	w := newTriangle(t)
	echo(t, w.b, KindGRPC)
	echo(t, w.b, KindHTTP)
	async.Run(t, w.a.KeepWays)
	standing, err := w.a.Dial(async.Context(t), KindHTTP, "b-1")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = standing.Close() }()
	w.link.cut()
	w.a.Doubt("b-1")
	async.Await(t, "the detour", w.goes("c-1"))
	w.link.mend() // long before a direct dial has failed
	async.Await(t, "the direct way", w.goes(""))
	if via := standing.(*PeerConn).Via(); via != "" {
		t.Fatalf("it was made through %s", via)
	}
	if err := roundTrip(standing); err != nil {
		t.Errorf("a connection that lived was ended: %v", err)
	}
}

// When a relay is no good the next one is asked, and when all are none the
// direct way is what is left.
func TestAnotherRelay(t *testing.T) {
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
	async.Run(t, w.a.KeepWays)
	async.Await(t, "a detour through the one that works", w.goes("c-1"))
	if got := w.a.relaysFor("b-1"); fmt.Sprint(got) != "[c-1 dead-1 d-1]" {
		t.Errorf("asked next: %v", got)
	}
	w.set(func() { w.silent = nil })
	standing := w.through(t, KindGRPC)

	w.stopC()
	if _, err := standing.Read(make([]byte, 1)); err == nil {
		t.Error("a tunnel outlives its relay")
	}
	w.set(func() { w.silent = []string{"b-1"} })
	async.Await(t, "a detour through the other one", w.goes("d-1"))

	w.set(func() { w.relays = nil })
	async.Await(t, "no detour when nobody hears the node", w.goes(""))
}

// Ends of a mesh while it looks for ways are as orderly as others.
func TestCloseWhileExamining(t *testing.T) {
	async.NoLeaks(t)
	w := newTriangle(t)
	echo(t, w.b, KindGRPC)
	deaf, err := net.Listen("tcp", "127.0.0.1:0") // accepts, and says nothing
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = deaf.Close() }()
	w.book.set("c-1", deaf.Addr().String())
	w.link.cut()
	w.a.Doubt("b-1")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	dialled := make(chan error, 1)
	go func() {
		_, err := w.a.Dial(ctx, KindGRPC, "b-1")
		dialled <- err
	}()
	conn, err := deaf.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	begun := time.Now()
	if err := w.a.Close(); err != nil {
		t.Error(err)
	}
	if took := time.Since(begun); took > 5*time.Second {
		t.Errorf("it took %v, as long as a dial", took)
	}
	w.a.Doubt("b-1") // is heard by nobody
	cancel()
	if err := <-dialled; err == nil {
		t.Error("a dial came through")
	}
}

func TestExaminationsAreBounded(t *testing.T) {
	w := newWays(newMetrics(nil))
	if !w.begin("a", time.Hour) || w.begin("a", 0) {
		t.Error("one node is examined twice at once, or never")
	}
	w.end("a")
	if w.begin("a", time.Hour) || !w.begin("a", 0) {
		t.Error("the time between two examinations is not kept")
	}
	for i := range maxExamined - 1 {
		if !w.begin(fmt.Sprint("n", i), 0) {
			t.Fatalf("the %dth is refused", i)
		}
	}
	if w.begin("one more", 0) {
		t.Error("too many at once")
	}
	w.end("n0")
	w.forget("n1")
	if w.end("n1"); w.examining != maxExamined-2 {
		t.Errorf("%d are examined", w.examining)
	}
	for i := range agreed.MaxNodes {
		if w.begin(fmt.Sprint("m", i), 0) {
			w.end(fmt.Sprint("m", i))
		}
	}
	if len(w.of) != agreed.MaxNodes {
		t.Errorf("%d nodes are remembered, want %d at most", len(w.of), agreed.MaxNodes)
	}
}
