package mesh

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"

	"github.com/dsnode/dsnode/test/async"
)

// testBook is a test's address book, shared by all its nodes.
type testBook struct {
	mu    sync.Mutex // guards addrs
	addrs map[string]string
}

func newTestBook() *testBook { return &testBook{addrs: map[string]string{}} }

func (b *testBook) set(node, addr string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.addrs[node] = addr
}

func (b *testBook) address(node string) (string, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	addr, ok := b.addrs[node]
	return addr, ok
}

// testPeer is a node of a test: a mesh with credentials in files.
type testPeer struct {
	*Mesh
	id    Identity
	files tlsFiles
	addr  string

	mu         sync.Mutex // guards membership
	membership Membership
}

func (p *testPeer) setMembership(m Membership) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.membership = m
}

// newTestPeer makes a node that only dials; serve makes it accept as well.
func newTestPeer(t testing.TB, ca tlsAuthority, book *testBook, id Identity, change func(*Options)) *testPeer {
	t.Helper()
	p := &testPeer{id: id, files: newTLSFiles(t), membership: first}
	cert, key := ca.issue(t, id)
	p.files.write(t, cert, key, ca.cert)
	o := Options{
		Credentials: p.files.load(t, nil),
		Membership: func() Membership {
			p.mu.Lock()
			defer p.mu.Unlock()
			return p.membership
		},
		Address:     book.address,
		Logger:      slog.New(slog.DiscardHandler),
		DialTimeout: 10 * time.Second, // a slow test machine must not fail the test
	}
	if change != nil {
		change(&o)
	}
	p.Mesh = New(o)
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	return p
}

// serve accepts peers at a new address, which it enters in the book.
func (p *testPeer) serve(t testing.TB, book *testBook) (stop func()) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p.addr = ln.Addr().String()
	book.set(p.id.Node, p.addr)
	return async.Run(t, func(ctx context.Context) error { return p.Serve(ctx, ln) })
}

// serveGRPC answers health checks and records the callers.
func (p *testPeer) serveGRPC(t testing.TB) (callers func() []Identity) {
	t.Helper()
	var mu sync.Mutex
	var seen []Identity
	server := grpc.NewServer(append(p.GRPCServerOptions(), grpc.UnaryInterceptor(
		func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
			id, ok := PeerFromContext(ctx)
			if !ok {
				return nil, errors.New("no peer in the context")
			}
			mu.Lock()
			seen = append(seen, id)
			mu.Unlock()
			return next(ctx, req)
		}))...)
	grpc_health_v1.RegisterHealthServer(server, health.NewServer())
	ln := p.Listener(KindGRPC)
	async.Run(t, func(ctx context.Context) error {
		defer context.AfterFunc(ctx, server.Stop)()
		return server.Serve(ln)
	})
	return func() []Identity {
		mu.Lock()
		defer mu.Unlock()
		return append([]Identity(nil), seen...)
	}
}

// serveHTTP answers with the names of the caller and of this node, and the body
// that it was sent.
func (p *testPeer) serveHTTP(t testing.TB) {
	t.Helper()
	server := &http.Server{
		ConnContext:       HTTPConnContext,
		ReadHeaderTimeout: 10 * time.Second,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			id, ok := HTTPPeer(r)
			if !ok {
				http.Error(w, "no peer", http.StatusForbidden)
				return
			}
			_, _ = fmt.Fprintf(w, "%s to %s: ", id.Node, p.id.Node) // the client checks
			_, _ = io.Copy(w, r.Body)
		}),
	}
	ln := p.Listener(KindHTTP)
	async.Run(t, func(ctx context.Context) error {
		defer context.AfterFunc(ctx, func() { _ = server.Close() })()
		if err := server.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
			return err
		}
		return nil
	})
}

// serveRaft answers AppendEntries with the term that it was sent.
func (p *testPeer) serveRaft(t testing.TB) *raft.NetworkTransport {
	t.Helper()
	transport := raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{
		Stream: p.RaftLayer(p.id.Node), MaxPool: 2, Timeout: 10 * time.Second, Logger: hclog.NewNullLogger(),
	})
	async.Run(t, func(ctx context.Context) error {
		for {
			select {
			case <-ctx.Done():
				transport.CloseStreams()
				return transport.Close()
			case rpc := <-transport.Consumer():
				request := rpc.Command.(*raft.AppendEntriesRequest)
				rpc.Respond(&raft.AppendEntriesResponse{Term: request.Term, Success: true}, nil)
			}
		}
	})
	return transport
}

// check does a gRPC health check of a node.
func (p *testPeer) check(ctx context.Context, node string) error {
	client, err := p.ClientConn(node)
	if err != nil {
		return err
	}
	_, err = grpc_health_v1.NewHealthClient(client).Check(ctx, &grpc_health_v1.HealthCheckRequest{})
	return err
}
