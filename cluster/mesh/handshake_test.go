package mesh

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/dsnode/dsnode/test/async"
)

// otherTLS is the configuration of a client that has a certificate, or none, and
// does not check this node.
func otherTLS(t testing.TB, cert, key []byte) *tls.Config {
	t.Helper()
	c := &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS12} //nolint:gosec // checks nothing on purpose
	if cert != nil {
		pair, err := tls.X509KeyPair(cert, key)
		if err != nil {
			t.Fatal(err)
		}
		c.Certificates = []tls.Certificate{pair}
	}
	return c
}

func TestInvalidClientsAreNotAccepted(t *testing.T) {
	async.NoLeaks(t)
	ca, book := newTLSAuthority(t, "dev"), newTestBook()
	hub := newTestPeer(t, ca, book, Identity{"dev", "a", "a-1"}, nil)
	hub.serve(t, book)
	hub.Listener(KindGRPC)

	id := Identity{"dev", "b", "b-1"}
	otherCA := newTLSAuthority(t, "dev")
	valid, validKey := ca.issue(t, id)
	otherCACert, otherCAKey := otherCA.issue(t, id)
	expired, expiredKey := ca.issueUntil(t, id, time.Now().Add(-time.Minute))
	foreignCert, foreignKey := ca.issue(t, Identity{"prod", "b", "b-1"})
	old := otherTLS(t, valid, validKey)
	old.MaxVersion = tls.VersionTLS12

	preface, err := encodePreface(prefaceRequest{Format: 1, Kind: KindGRPC, ClusterID: "c1", Generation: first.Generation, Node: "b-1", Site: "b"})
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name   string
		tls    *tls.Config // nil: no TLS at all
		send   []byte
		reason string
	}{
		{"another CA", otherTLS(t, otherCACert, otherCAKey), preface, "unknown_ca"},
		{"an expired certificate", otherTLS(t, expired, expiredKey), preface, "expired"},
		{"another cluster's name", otherTLS(t, foreignCert, foreignKey), preface, "other_cluster"},
		{"no certificate", otherTLS(t, nil, nil), preface, "other"},
		{"TLS 1.2", old, preface, "other"},
		{"plain HTTP", nil, []byte("GET / HTTP/1.1\r\n\r\n"), "not_tls"},
		{"another protocol inside TLS", otherTLS(t, valid, validKey), []byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), "not_a_preface"},
		{"closed in the middle of the preface", otherTLS(t, valid, validKey), preface[:9], "closed"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			before := testutil.ToFloat64(hub.metrics.failures.WithLabelValues("accepted", tc.reason))
			refused := testutil.ToFloat64(hub.metrics.turnedAway.WithLabelValues(tc.reason))
			raw, err := net.Dial("tcp", hub.addr)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = raw.Close() }()
			if err := raw.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
				t.Fatal(err)
			}
			conn := raw
			if tc.tls != nil {
				conn = tls.Client(raw, tc.tls)
			}
			// TLS may fail in the write or only in the read.
			if _, err := conn.Write(tc.send); err == nil {
				if tc.reason == "closed" {
					_ = conn.Close()
				}
				if n, err := io.Copy(io.Discard, conn); err == nil && n > 100 {
					t.Errorf("the client got an answer of %d bytes", n)
				}
			}
			_ = raw.Close() // the acceptor lingers until then
			async.Await(t, "the failure to be counted as "+tc.reason, func() bool {
				return testutil.ToFloat64(hub.metrics.failures.WithLabelValues("accepted", tc.reason)) == before+1
			})
			if tc.reason != "closed" { // then the client has ended it
				refused++
			}
			async.Await(t, "the refusal at the port to be counted", func() bool {
				return testutil.ToFloat64(hub.metrics.turnedAway.WithLabelValues(tc.reason)) == refused
			})
		})
	}
	if n := len(remoteAddrs(hub.Mesh)); n != 0 {
		t.Errorf("%d connections are open, want none", n)
	}
}

// A node with a wrong certificate gets an error that says what is wrong with it.
func TestErrorsOfANodeWithAWrongCertificate(t *testing.T) {
	async.NoLeaks(t)
	ca, otherCA, book := newTLSAuthority(t, "dev"), newTLSAuthority(t, "dev"), newTestBook()
	hub := newTestPeer(t, ca, book, Identity{"dev", "a", "a-1"}, nil)
	hub.serve(t, book)
	hub.Listener(KindGRPC)
	ctx := async.Context(t)

	otherPeer := newTestPeer(t, otherCA, book, Identity{"dev", "b", "b-1"}, nil)
	if _, err := otherPeer.Dial(ctx, KindGRPC, "a-1"); err == nil || !strings.Contains(err.Error(), "signed by another CA") {
		t.Errorf("the dialler has another CA: got %v, want an error that says so", err)
	}
	// A dialler that trusts both CAs, with a certificate of the other one.
	trusting := newTestPeer(t, otherCA, book, Identity{"dev", "c", "c-1"}, nil)
	writeTLSFile(t, trusting.files.ca, append(bytes.Clone(ca.cert), otherCA.cert...))
	if err := trusting.opts.Credentials.Reload(); err != nil {
		t.Fatal(err)
	}
	for range 20 { // a reset must never destroy the alert
		if _, err := trusting.Dial(ctx, KindGRPC, "a-1"); !errors.Is(err, ErrCertificateRefused) {
			t.Fatalf("got %v, want ErrCertificateRefused", err)
		}
	}
	foreignPeer := newTestPeer(t, newTLSAuthority(t, "prod"), book, Identity{"prod", "d", "d-1"}, nil)
	writeTLSFile(t, foreignPeer.files.ca, append(bytes.Clone(ca.cert), readTestFile(t, foreignPeer.files.ca)...))
	if err := foreignPeer.opts.Credentials.Reload(); err != nil {
		t.Fatal(err)
	}
	if _, err := foreignPeer.Dial(ctx, KindGRPC, "a-1"); !errors.Is(err, ErrForeignCluster) {
		t.Errorf("got %v, want ErrForeignCluster", err)
	}
}

func readTestFile(t testing.TB, path string) []byte {
	t.Helper()
	content, err := readBounded(path)
	if err != nil {
		t.Fatal(err)
	}
	return content
}

// dialSilently opens a connection that sends nothing. The channel is closed when
// the other side has closed the connection.
func dialSilently(t *testing.T, addr string) (closed <-chan struct{}) {
	t.Helper()
	raw, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = raw.Close() })
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = io.Copy(io.Discard, raw)
	}()
	t.Cleanup(func() { _ = raw.Close(); <-done })
	return done
}

func TestSilentClientIsDisconnected(t *testing.T) {
	async.NoLeaks(t)
	ca, book := newTLSAuthority(t, "dev"), newTestBook()
	hub := newTestPeer(t, ca, book, Identity{"dev", "a", "a-1"}, nil)
	hub.handshakes.limit = 50 * time.Millisecond
	hub.serve(t, book)
	select {
	case <-dialSilently(t, hub.addr):
	case <-time.After(20 * time.Second):
		t.Fatal("the connection was not closed")
	}
	async.Await(t, "the timeout to be counted", func() bool {
		return testutil.ToFloat64(hub.metrics.failures.WithLabelValues("accepted", "timeout")) == 1
	})
}

// Clients that send nothing use up all handshake slots; a peer still gets through.
func TestSilentClientsDoNotBlockPeers(t *testing.T) {
	async.NoLeaks(t)
	ca, book := newTLSAuthority(t, "dev"), newTestBook()
	hub := newTestPeer(t, ca, book, Identity{"dev", "a", "a-1"}, nil)
	hub.handshakes = newHandshakeLimiter(4, time.Minute)
	hub.serve(t, book)
	hub.serveGRPC(t)
	var clients []<-chan struct{}
	for range 20 {
		clients = append(clients, dialSilently(t, hub.addr))
	}
	peer := newTestPeer(t, ca, book, Identity{"dev", "b", "b-1"}, nil)
	if err := peer.check(async.Context(t), "a-1"); err != nil {
		t.Fatalf("a peer could not connect: %v", err)
	}
	for _, closed := range clients[:16] { // the oldest are aborted first
		<-closed
	}
	if got := testutil.ToFloat64(hub.metrics.handshakes); got > 4 {
		t.Errorf("%v handshakes at once, the bound is 4", got)
	}
}

// A connection that is never accepted from its kind's listener is closed after the
// time limit.
func TestConnectionNobodyAcceptsIsClosed(t *testing.T) {
	async.NoLeaks(t)
	ca, book := newTLSAuthority(t, "dev"), newTestBook()
	hub := newTestPeer(t, ca, book, Identity{"dev", "a", "a-1"}, nil)
	hub.handshakes.limit = 300 * time.Millisecond
	hub.serve(t, book)
	hub.Listener(KindHTTP) // never accepted from
	peer := newTestPeer(t, ca, book, Identity{"dev", "b", "b-1"}, nil)
	async.Await(t, "a dial that succeeds within the time limit", func() bool {
		conn, err := peer.Dial(async.Context(t), KindHTTP, "a-1")
		if err != nil {
			return false // the machine is slow
		}
		defer func() { _ = conn.Close() }()
		if _, err := conn.Read(make([]byte, 1)); err == nil {
			t.Error("the connection delivered data, want it closed")
		}
		return true
	})
	if n := len(remoteAddrs(hub.Mesh)); n != 0 {
		t.Errorf("%d connections are open, want none", n)
	}
}

// The CA and every certificate are replaced while the peers dial all the time. No
// dial fails, although files are half written at times.
func TestRotationOfTheCAFailsNoDial(t *testing.T) {
	async.NoLeaks(t)
	ca, book := newTLSAuthority(t, "dev"), newTestBook()
	a := newTestPeer(t, ca, book, Identity{"dev", "a", "a-1"}, nil)
	b := newTestPeer(t, ca, book, Identity{"dev", "b", "b-1"}, nil)
	peers := []*testPeer{a, b}
	for _, p := range peers {
		p.serve(t, book)
		ln := p.Listener(KindHTTP)
		async.Run(t, func(ctx context.Context) error {
			defer context.AfterFunc(ctx, func() { _ = ln.Close() })()
			for {
				conn, err := ln.Accept()
				if err != nil {
					return nil
				}
				_ = conn.Close()
			}
		})
		p.opts.Credentials.poll = 2 * time.Millisecond
		p.opts.Credentials.log = slog.New(slog.DiscardHandler)
		async.Run(t, p.opts.Credentials.Run)
	}
	var dials atomic.Int64
	dialler := func(from, to *testPeer) func(context.Context) error {
		return func(ctx context.Context) error {
			for ctx.Err() == nil {
				conn, err := from.Dial(context.Background(), KindHTTP, to.id.Node)
				if err != nil {
					return err
				}
				_ = conn.Close()
				dials.Add(1)
			}
			return nil
		}
	}
	stopA, stopB := async.Run(t, dialler(a, b)), async.Run(t, dialler(b, a))
	waitForDials := func() {
		target := dials.Load() + 6
		async.Await(t, "more dials", func() bool { return dials.Load() >= target || t.Failed() })
	}
	waitForReload := func(what string) {
		t.Helper()
		async.Await(t, what, func() bool {
			for _, p := range peers {
				c := p.opts.Credentials
				files, err := c.read()
				if err != nil || files.sum != c.current.Load().sum {
					return false
				}
			}
			return true
		})
		waitForDials()
	}
	half := func(content []byte) []byte { return content[:len(content)*2/3] }

	next := newTLSAuthority(t, "dev")
	both := append(bytes.Clone(ca.cert), next.cert...)
	for _, p := range peers {
		writeTLSFile(t, p.files.ca, half(both))
		waitForDials()
		writeTLSFile(t, p.files.ca, both)
	}
	waitForReload("both CAs to be trusted")
	for _, p := range peers {
		cert, key := next.issue(t, p.id)
		writeTLSFile(t, p.files.cert, half(cert))
		waitForDials()
		writeTLSFile(t, p.files.cert, cert)
		waitForDials() // the key file still holds the old key
		writeTLSFile(t, p.files.key, key)
	}
	waitForReload("the new certificates to be in use")
	for _, p := range peers {
		writeTLSFile(t, p.files.ca, nil)
		waitForDials()
		writeTLSFile(t, p.files.ca, next.cert)
	}
	waitForReload("the old CA to be untrusted")
	stopA()
	stopB()

	// A certificate of the old CA is refused now.
	late := newTestPeer(t, ca, book, Identity{"dev", "c", "c-1"}, nil)
	writeTLSFile(t, late.files.ca, both)
	if err := late.opts.Credentials.Reload(); err != nil {
		t.Fatal(err)
	}
	if _, err := late.Dial(async.Context(t), KindHTTP, "a-1"); !errors.Is(err, ErrCertificateRefused) {
		t.Errorf("got %v, want ErrCertificateRefused", err)
	}
}

// A dial ends when its context ends, at each step of the handshake.
func TestDialEndsWithItsContext(t *testing.T) {
	async.NoLeaks(t)
	ca, book := newTLSAuthority(t, "dev"), newTestBook()
	peer := newTestPeer(t, ca, book, Identity{"dev", "b", "b-1"}, nil)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	cert, key := ca.issue(t, Identity{"dev", "a", "a-1"})
	for _, tc := range []struct {
		name string
		then func(net.Conn) // what the acceptor does
	}{
		{"no TLS answer", func(net.Conn) {}},
		{"no preface answer", func(raw net.Conn) {
			c := otherTLS(t, cert, key)
			c.ClientAuth = tls.RequireAnyClientCert
			secure := tls.Server(raw, c)
			_ = secure.Handshake()
			_, _ = readPreface(secure)
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(context.Background())
			result := make(chan error, 1)
			go func() {
				_, err := peer.DialAddr(ctx, KindGRPC, ln.Addr().String())
				result <- err
			}()
			raw, err := ln.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = raw.Close() }()
			tc.then(raw)
			cancel()
			select {
			case err := <-result:
				if err == nil {
					t.Fatal("the dial succeeded")
				}
			case <-time.After(20 * time.Second):
				t.Fatal("the dial hangs")
			}
		})
	}
	if n := len(remoteAddrs(peer.Mesh)); n != 0 {
		t.Errorf("%d connections are open, want none", n)
	}
}
