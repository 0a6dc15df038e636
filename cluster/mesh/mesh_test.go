package mesh

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health/grpc_health_v1"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/test/async"
)

func meshOfThree(t *testing.T, change func(*Options)) (*testBook, []*testPeer) {
	t.Helper()
	ca, book := newTLSAuthority(t, "dev"), newTestBook()
	var peers []*testPeer
	for _, site := range []string{"shanghai-a", "shanghai-b", "beijing"} {
		p := newTestPeer(t, ca, book, Identity{"dev", site, site + "-1"}, change)
		p.serve(t, book)
		peers = append(peers, p)
	}
	return book, peers
}

func TestOnePortCarriesEveryKind(t *testing.T) {
	async.NoLeaks(t)
	_, peers := meshOfThree(t, nil)
	ctx := async.Context(t)
	callers := map[string]func() []Identity{}
	transports := map[string]*raft.NetworkTransport{}
	for _, p := range peers {
		callers[p.id.Node] = p.serveGRPC(t)
		p.serveHTTP(t)
		transports[p.id.Node] = p.serveRaft(t)
	}
	if _, ok := any(transports[peers[0].id.Node]).(raft.WithPreVote); !ok {
		t.Error("raft.NetworkTransport over the mesh does not support pre-vote")
	}

	var all sync.WaitGroup
	fail := make(chan error, 64)
	for _, from := range peers {
		for _, to := range peers {
			all.Go(func() {
				if err := from.check(ctx, to.id.Node); err != nil {
					fail <- fmt.Errorf("grpc %s to %s: %w", from.id.Node, to.id.Node, err)
				}
			})
			all.Go(func() {
				body := strings.Repeat("deepseek ", 100_000)
				want := from.id.Node + " to " + to.id.Node + ": " + body
				if got, err := post(ctx, from.Mesh, to.id.Node, body); err != nil || got != want {
					fail <- fmt.Errorf("http %s to %s: %d bytes, %w", from.id.Node, to.id.Node, len(got), err)
				}
			})
			all.Go(func() {
				var answer raft.AppendEntriesResponse
				err := transports[from.id.Node].AppendEntries(raft.ServerID(to.id.Node), raft.ServerAddress(to.id.Node),
					&raft.AppendEntriesRequest{Term: 7}, &answer)
				if err != nil || answer.Term != 7 {
					fail <- fmt.Errorf("raft %s to %s: term %d, %w", from.id.Node, to.id.Node, answer.Term, err)
				}
			})
		}
	}
	all.Wait()
	close(fail)
	for err := range fail {
		t.Error(err)
	}
	for _, p := range peers {
		seen := map[Identity]bool{}
		for _, id := range callers[p.id.Node]() {
			seen[id] = true
		}
		for _, other := range peers {
			if !seen[other.id] {
				t.Errorf("%s was not called by %s", p.id.Node, other.id)
			}
		}
	}
	if got := testutil.ToFloat64(peers[0].metrics.connections.WithLabelValues("raft", "accepted")); got != 3 {
		t.Errorf("%v accepted raft connections are counted, want 3", got)
	}
	if got := transports[peers[0].id.Node].LocalAddr(); got != raft.ServerAddress(peers[0].id.Node) {
		t.Errorf("raft's local address is %q", got)
	}
}

func post(ctx context.Context, m *Mesh, node, body string) (string, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+node+"/", strings.NewReader(body))
	if err != nil {
		return "", err
	}
	response, err := m.HTTPTransport().RoundTrip(request)
	if err != nil {
		return "", err
	}
	defer func() { _ = response.Body.Close() }()
	answer, err := io.ReadAll(response.Body)
	return string(answer), err
}

func TestJoinerReachesASeedByItsAddress(t *testing.T) {
	async.NoLeaks(t)
	_, peers := meshOfThree(t, nil)
	callers := peers[0].serveGRPC(t)
	ctx := async.Context(t)

	joiner := peers[2]
	joiner.setMembership(noCluster)
	conn, err := joiner.DialAddr(ctx, KindGRPC, peers[0].addr)
	if err != nil {
		t.Fatal(err)
	}
	if conn.peer != peers[0].id || conn.kind != KindGRPC {
		t.Errorf("connected with %v for %s, want %v for grpc", conn.peer, conn.kind, peers[0].id)
	}
	if err := conn.Close(); err != nil {
		t.Error(err)
	}
	seed, err := joiner.SeedConn(peers[0].addr)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = seed.Close() }()
	if _, err := grpc_health_v1.NewHealthClient(seed).Check(ctx, &grpc_health_v1.HealthCheckRequest{}); err != nil {
		t.Fatal(err)
	}
	if got := callers(); len(got) != 1 || got[0] != joiner.id {
		t.Errorf("the seed was called by %v", got)
	}
	if _, err := joiner.Dial(ctx, KindGRPC, "unheard-of"); !errors.Is(err, ErrNoAddress) {
		t.Errorf("got %v, want ErrNoAddress", err)
	}
}

// Both sides get the same code for a refusal, whichever of them is outdated or
// foreign.
func TestBothSidesKnowWhyAConnectionWasRefused(t *testing.T) {
	async.NoLeaks(t)
	type newer struct {
		at   string
		peer Identity
		gen  uint64
	}
	var mu sync.Mutex
	var noticed []newer
	ca, book := newTLSAuthority(t, "dev"), newTestBook()
	newPeer := func(site string) *testPeer {
		id := Identity{"dev", site, site + "-1"}
		p := newTestPeer(t, ca, book, id, func(o *Options) {
			o.OnNewerGeneration = func(peer Identity, g agreed.Generation) {
				mu.Lock()
				defer mu.Unlock()
				noticed = append(noticed, newer{site, peer, g.Number})
			}
		})
		p.serve(t, book)
		p.Listener(KindGRPC)
		p.Listener(KindHTTP)
		return p
	}
	a, b := newPeer("a"), newPeer("b")
	ctx := async.Context(t)
	for _, tc := range []struct {
		name      string
		kind      Kind
		a, b      Membership
		code      string // that a gets from b when it dials b
		wantNewer []newer
	}{
		{"another cluster", KindHTTP, first, foreign, CodeOtherCluster, nil},
		{"a is behind", KindHTTP, first, recovered, CodeOlderGeneration, []newer{{"a", b.id, 2}}},
		{"b is behind", KindHTTP, recovered, first, CodeNewerGeneration, []newer{{"b", a.id, 2}}},
		{"two recoveries", KindHTTP, recovered, forked, CodeForkGeneration, nil},
		{"a has not joined", KindHTTP, noCluster, first, CodePeerNotMember, nil},
		{"b has not joined", KindHTTP, first, noCluster, CodeNotMember, nil},
		{"no raft listener", KindRaft, first, first, CodeKindClosed, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			a.setMembership(tc.a)
			b.setMembership(tc.b)
			mu.Lock()
			noticed = nil
			mu.Unlock()
			before := testutil.ToFloat64(b.metrics.refused.WithLabelValues(tc.code, "self"))
			_, err := a.Dial(ctx, tc.kind, b.id.Node)
			var refused *RefusedError
			if !errors.As(err, &refused) || refused.Code != tc.code || !refused.ByPeer || !strings.Contains(refused.Message, b.id.Node) {
				t.Fatalf("got %v, want code %s from the peer, with its name in the message", err, tc.code)
			}
			async.Await(t, "the acceptor to count the refusal", func() bool {
				return testutil.ToFloat64(b.metrics.refused.WithLabelValues(tc.code, "self")) == before+1
			})
			if got := testutil.ToFloat64(a.metrics.refused.WithLabelValues(tc.code, "peer")); got == 0 {
				t.Error("the dialler did not count the refusal")
			}
			mu.Lock()
			defer mu.Unlock()
			if fmt.Sprint(noticed) != fmt.Sprint(tc.wantNewer) {
				t.Errorf("newer generations reported: %v, want %v", noticed, tc.wantNewer)
			}
		})
	}
}

// A node that was removed gets no connection of any kind, in neither direction, and its
// open ones are closed. It learns why. One that has not joined yet may ask to.
func TestRemovedNodeIsRefused(t *testing.T) {
	async.NoLeaks(t)
	ca, book := newTLSAuthority(t, "dev"), newTestBook()
	var removedBefore atomic.Uint64
	var learned atomic.Value
	learned.Store("")
	newPeer := func(site string) *testPeer {
		return newTestPeer(t, ca, book, Identity{"dev", site, site + "-1"}, func(o *Options) {
			o.Removed = func(peer Identity, admitted uint64) string {
				if peer.Site == "b" && admitted < removedBefore.Load() {
					return peer.Node + " was removed by ops"
				}
				return ""
			}
			o.OnRemoved = func(peer Identity, why string) { learned.Store(site + " learned from " + peer.Node + ": " + why) }
		})
	}
	a, b := newPeer("a"), newPeer("b")
	kinds := []Kind{KindRaft, KindGRPC, KindHTTP}
	for _, p := range []*testPeer{a, b} {
		p.serve(t, book)
		for _, kind := range kinds {
			p.Listener(kind)
		}
	}
	admitted := first
	admitted.Admitted = 40
	b.setMembership(admitted)
	ctx := async.Context(t)
	open, err := b.Dial(ctx, KindHTTP, a.id.Node)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = open.Close() }()
	if got := open.(*PeerConn).Membership(); got != first {
		t.Errorf("b knows a as %+v, want %+v", got, first)
	}

	removedBefore.Store(50)
	a.CloseRefused()
	if _, err := open.Read(make([]byte, 1)); err == nil {
		t.Error("an open connection with the removed node was not closed")
	}
	for _, kind := range append(kinds, KindTunnel) {
		_, err := b.dial(ctx, dialRequest{kind: kind, node: a.id.Node, target: map[bool]string{true: "c-1"}[kind == KindTunnel]}, a.addr)
		var refused *RefusedError
		if !errors.As(err, &refused) || refused.Code != CodeRemoved || !refused.ByPeer {
			t.Errorf("%s: %v, want refused by the peer with code %s", kind, err, CodeRemoved)
		}
		if kind == KindTunnel {
			continue
		}
		if _, err := a.Dial(ctx, kind, b.id.Node); !errors.As(err, &refused) || refused.Code != CodeRemoved || refused.ByPeer {
			t.Errorf("%s to the removed node: %v, want refused by the dialler with code %s", kind, err, CodeRemoved)
		}
	}
	if got, want := learned.Load(), "b learned from a-1: a-1 says: b-1 was removed by ops"; got != want {
		t.Errorf("%q, want %q", got, want)
	}

	for _, m := range []struct {
		what string
		Membership
	}{{"one with an empty disk", noCluster}, {"one that was admitted later", Membership{ClusterID: first.ClusterID, Generation: first.Generation, Admitted: 51}}} {
		b.setMembership(m.Membership)
		conn, err := b.DialAddr(ctx, KindGRPC, a.addr)
		if err != nil {
			t.Fatalf("%s: %v", m.what, err)
		}
		_ = conn.Close()
	}
}

func TestDialVerifiesTheNodeName(t *testing.T) {
	async.NoLeaks(t)
	book, peers := meshOfThree(t, nil)
	peers[1].Listener(KindGRPC)
	book.set(peers[0].id.Node, peers[1].addr) // an outdated entry: another node has the address now
	_, err := peers[2].Dial(async.Context(t), KindGRPC, peers[0].id.Node)
	if !errors.Is(err, ErrWrongNode) {
		t.Fatalf("got %v, want ErrWrongNode", err)
	}
	if got := testutil.ToFloat64(peers[2].metrics.failures.WithLabelValues("dialled", "wrong_node")); got != 1 {
		t.Errorf("the failure was counted %v times, want once", got)
	}
}

func TestClientConnFollowsANewAddress(t *testing.T) {
	async.NoLeaks(t)
	book, peers := meshOfThree(t, nil)
	ctx := async.Context(t)
	peers[0].serveGRPC(t)
	caller := peers[1]
	if err := caller.check(ctx, peers[0].id.Node); err != nil {
		t.Fatal(err)
	}

	old := peers[0].addr
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	peers[0].addr = ln.Addr().String()
	async.Run(t, func(ctx context.Context) error { return peers[0].Serve(ctx, ln) })
	book.set(peers[0].id.Node, peers[0].addr)
	peers[0].CloseAll(caller.id.Site)
	client, err := caller.ClientConn(peers[0].id.Node)
	if err != nil {
		t.Fatal(err)
	}
	async.Await(t, "the channel to find the new address", func() bool {
		// A call that was under way on the closed connection fails.
		_, err := grpc_health_v1.NewHealthClient(client).Check(ctx, &grpc_health_v1.HealthCheckRequest{}, grpc.WaitForReady(true))
		return err == nil
	})
	if got := remoteAddrs(caller.Mesh); len(got) != 1 || got[0] != peers[0].addr || got[0] == old {
		t.Errorf("connected to %v, want only %s", got, peers[0].addr)
	}

	if err := caller.Forget(peers[0].id.Node); err != nil {
		t.Fatal(err)
	}
	if got := remoteAddrs(caller.Mesh); len(got) != 0 {
		t.Errorf("still connected to %v after Forget", got)
	}
	if again, err := caller.ClientConn(peers[0].id.Node); err != nil || again == client {
		t.Errorf("ClientConn after Forget: %v, want a new channel", err)
	}
}

func remoteAddrs(m *Mesh) []string {
	m.conns.mu.Lock()
	defer m.conns.mu.Unlock()
	var addrs []string
	for c := range m.conns.all {
		addrs = append(addrs, c.RemoteAddr().String())
	}
	return addrs
}

func TestCloseKindCloseRefusedAndCloseAll(t *testing.T) {
	async.NoLeaks(t)
	var refusedSite atomic.Value
	refusedSite.Store("")
	_, peers := meshOfThree(t, func(o *Options) {
		o.Admit = func(site string) error {
			if site == refusedSite.Load() {
				return fmt.Errorf("a drill isolates site %s", site)
			}
			return nil
		}
	})
	ctx := async.Context(t)
	hub := peers[0]
	type pair struct{ dialled, accepted net.Conn }
	open := func(kind Kind, from *testPeer) pair {
		t.Helper()
		dialled, err := from.Dial(ctx, kind, hub.id.Node)
		if err != nil {
			t.Fatal(err)
		}
		accepted, err := hub.Listener(kind).Accept()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = dialled.Close(); _ = accepted.Close() })
		return pair{dialled, accepted}
	}
	ended := func(p pair) bool {
		_, err := p.dialled.Read(make([]byte, 1))
		return err != nil && !errors.Is(err, context.DeadlineExceeded)
	}
	works := func(p pair) {
		t.Helper()
		if _, err := p.dialled.Write([]byte{42}); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(p.accepted, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
	for _, kind := range []Kind{KindRaft, KindHTTP} {
		hub.Listener(kind)
	}
	peers[1].Listener(KindHTTP)
	raftB, httpB := open(KindRaft, peers[1]), open(KindHTTP, peers[1])
	raftC, httpC := open(KindRaft, peers[2]), open(KindHTTP, peers[2])

	hub.CloseKind(KindRaft) // accepted connections
	if !ended(raftB) || !ended(raftC) {
		t.Error("a raft connection is still open after CloseKind")
	}
	works(httpB)
	works(httpC)

	refusedSite.Store("shanghai-b")
	hub.CloseRefused()
	if !ended(httpB) {
		t.Error("the connection with the refused site is still open after CloseRefused")
	}
	works(httpC)
	var refused *RefusedError
	if _, err := peers[1].Dial(ctx, KindHTTP, hub.id.Node); !errors.As(err, &refused) || refused.Code != CodeIsolated || !refused.ByPeer {
		t.Errorf("dial from the refused site: %v, want code isolated from the peer", err)
	}
	if _, err := hub.Dial(ctx, KindHTTP, peers[1].id.Node); !errors.As(err, &refused) || refused.Code != CodeIsolated {
		t.Errorf("dial to the refused site: %v, want code isolated", err)
	}
	refusedSite.Store("")
	again := open(KindHTTP, peers[1])
	works(again)
	hub.CloseAll("shanghai-b")
	if !ended(again) {
		t.Error("a connection with the site is still open after CloseAll")
	}

	peers[2].CloseKind(KindHTTP) // dialled connections
	if _, err := httpC.accepted.Read(make([]byte, 1)); err == nil {
		t.Error("a dialled connection is still open after CloseKind")
	}
	if got := testutil.ToFloat64(peers[2].metrics.connections.WithLabelValues("http", "dialled")); got != 0 {
		t.Errorf("%v dialled connections are counted, want 0", got)
	}
}

func TestClosedRaftLayerRefusesBothDirections(t *testing.T) {
	async.NoLeaks(t)
	_, peers := meshOfThree(t, nil)
	layer := peers[0].RaftLayer(peers[0].id.Node)
	if err := layer.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := layer.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("accept: %v, want net.ErrClosed", err)
	}
	peers[1].Listener(KindRaft)
	if _, err := layer.Dial(raft.ServerAddress(peers[1].id.Node), 0); !errors.Is(err, net.ErrClosed) {
		t.Errorf("dial: %v, want net.ErrClosed", err)
	}
	var refused *RefusedError
	if _, err := peers[1].Dial(async.Context(t), KindRaft, peers[0].id.Node); !errors.As(err, &refused) || refused.Code != CodeKindClosed {
		t.Errorf("dial to the closed layer: %v, want code kind_closed", err)
	}
	again := peers[0].RaftLayer(peers[0].id.Node)
	conn, err := peers[1].RaftLayer(peers[1].id.Node).Dial(raft.ServerAddress(peers[0].id.Node), 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	accepted, err := again.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = accepted.Close() }()
}
