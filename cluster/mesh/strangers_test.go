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

// strangerTLS is what somebody presents who has a certificate but not our code.
func strangerTLS(t testing.TB, cert, key []byte) *tls.Config {
	t.Helper()
	c := &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS12} //nolint:gosec // a stranger
	if cert != nil {
		pair, err := tls.X509KeyPair(cert, key)
		if err != nil {
			t.Fatal(err)
		}
		c.Certificates = []tls.Certificate{pair}
	}
	return c
}

func TestStrangersAreNotAccepted(t *testing.T) {
	async.NoLeaks(t)
	ca, book := newTLSAuthority(t, "dev"), newTestBook()
	hub := newTestPeer(t, ca, book, Identity{"dev", "a", "a-1"}, nil)
	hub.serve(t, book)
	hub.Listener(KindGRPC)

	id := Identity{"dev", "b", "b-1"}
	otherCA := newTLSAuthority(t, "dev")
	good, goodKey := ca.issue(t, id)
	unknown, unknownKey := otherCA.issue(t, id)
	expired, expiredKey := ca.issueUntil(t, id, time.Now().Add(-time.Minute))
	foreignCert, foreignKey := ca.issue(t, Identity{"prod", "b", "b-1"})
	old := strangerTLS(t, good, goodKey)
	old.MaxVersion = tls.VersionTLS12

	hello, err := appendPreface(nil, prefaceRequest{Format: 1, Kind: KindGRPC, ClusterID: "c1", Generation: first.Generation, Node: "b-1", Site: "b"})
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name   string
		tls    *tls.Config // nil: no TLS at all
		say    []byte
		reason string
	}{
		{"another CA", strangerTLS(t, unknown, unknownKey), hello, "unknown_ca"},
		{"an expired certificate", strangerTLS(t, expired, expiredKey), hello, "expired"},
		{"another cluster's name", strangerTLS(t, foreignCert, foreignKey), hello, "other_cluster"},
		{"no certificate", strangerTLS(t, nil, nil), hello, "other"},
		{"TLS 1.2", old, hello, "other"},
		{"plain HTTP", nil, []byte("GET / HTTP/1.1\r\n\r\n"), "not_tls"},
		{"another protocol inside", strangerTLS(t, good, goodKey), []byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), "not_a_preface"},
		{"gone in the middle", strangerTLS(t, good, goodKey), hello[:9], "closed"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			before := testutil.ToFloat64(hub.metrics.failures.WithLabelValues("accepted", tc.reason))
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
			// TLS may fail in either call, or only when reading.
			if _, err := conn.Write(tc.say); err == nil {
				if tc.reason == "closed" {
					_ = conn.Close()
				}
				if n, err := io.Copy(io.Discard, conn); err == nil && n > 100 {
					t.Errorf("it was answered, with %d bytes", n)
				}
			}
			_ = raw.Close() // the other side lingers until then
			async.Await(t, "the failure to be counted as "+tc.reason, func() bool {
				return testutil.ToFloat64(hub.metrics.failures.WithLabelValues("accepted", tc.reason)) == before+1
			})
		})
	}
	if n := len(remoteAddrs(hub.Mesh)); n != 0 {
		t.Errorf("%d strangers were taken in", n)
	}
}

// What an operator reads at the node with the wrong certificate.
func TestWordsForAWrongCertificate(t *testing.T) {
	async.NoLeaks(t)
	ca, otherCA, book := newTLSAuthority(t, "dev"), newTLSAuthority(t, "dev"), newTestBook()
	hub := newTestPeer(t, ca, book, Identity{"dev", "a", "a-1"}, nil)
	hub.serve(t, book)
	hub.Listener(KindGRPC)
	ctx := async.Context(t)

	lost := newTestPeer(t, otherCA, book, Identity{"dev", "b", "b-1"}, nil)
	if _, err := lost.Dial(ctx, KindGRPC, "a-1"); err == nil || !strings.Contains(err.Error(), "signed by another CA") {
		t.Errorf("the dialler's CA is another: %v", err)
	}
	// A dialler that trusts both CAs, but shows a certificate of the other one.
	trusting := newTestPeer(t, otherCA, book, Identity{"dev", "c", "c-1"}, nil)
	writeTLSFile(t, trusting.files.ca, append(bytes.Clone(ca.cert), otherCA.cert...))
	if err := trusting.opts.Credentials.Reload(); err != nil {
		t.Fatal(err)
	}
	for range 20 { // a reset must not swallow the alert
		if _, err := trusting.Dial(ctx, KindGRPC, "a-1"); !errors.Is(err, ErrCertificateRefused) {
			t.Fatalf("got %v, want ErrCertificateRefused", err)
		}
	}
	abroad := newTestPeer(t, newTLSAuthority(t, "prod"), book, Identity{"prod", "d", "d-1"}, nil)
	writeTLSFile(t, abroad.files.ca, append(bytes.Clone(ca.cert), readTestFile(t, abroad.files.ca)...))
	if err := abroad.opts.Credentials.Reload(); err != nil {
		t.Fatal(err)
	}
	if _, err := abroad.Dial(ctx, KindGRPC, "a-1"); !errors.Is(err, ErrForeignCluster) {
		t.Errorf("got %v, want ErrForeignCluster", err)
	}
}

func readTestFile(t testing.TB, path string) []byte {
	t.Helper()
	text, err := readBounded(path)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// silent opens a connection that says nothing, and tells when it was dropped.
func silent(t *testing.T, addr string) (dropped <-chan struct{}) {
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

func TestSilentClientIsDropped(t *testing.T) {
	async.NoLeaks(t)
	ca, book := newTLSAuthority(t, "dev"), newTestBook()
	hub := newTestPeer(t, ca, book, Identity{"dev", "a", "a-1"}, nil)
	hub.arrivals.limit = 50 * time.Millisecond
	hub.serve(t, book)
	select {
	case <-silent(t, hub.addr):
	case <-time.After(20 * time.Second):
		t.Fatal("it was not dropped")
	}
	async.Await(t, "it to be counted", func() bool {
		return testutil.ToFloat64(hub.metrics.failures.WithLabelValues("accepted", "timeout")) == 1
	})
}

func TestCrowdDoesNotKeepPeersOut(t *testing.T) {
	async.NoLeaks(t)
	ca, book := newTLSAuthority(t, "dev"), newTestBook()
	hub := newTestPeer(t, ca, book, Identity{"dev", "a", "a-1"}, nil)
	hub.arrivals = newArrivals(4, time.Minute)
	hub.serve(t, book)
	hub.serveGRPC(t)
	var crowd []<-chan struct{}
	for range 20 {
		crowd = append(crowd, silent(t, hub.addr))
	}
	peer := newTestPeer(t, ca, book, Identity{"dev", "b", "b-1"}, nil)
	if err := peer.check(async.Context(t), "a-1"); err != nil {
		t.Fatalf("a peer did not get through: %v", err)
	}
	for _, dropped := range crowd[:16] { // the oldest went first
		<-dropped
	}
	if got := testutil.ToFloat64(hub.metrics.handshakes); got > 4 {
		t.Errorf("%v handshakes at once, the bound is 4", got)
	}
}

// A connection that nobody takes off the listener's hands does not wait for ever.
func TestUnclaimedConnectionIsDropped(t *testing.T) {
	async.NoLeaks(t)
	ca, book := newTLSAuthority(t, "dev"), newTestBook()
	hub := newTestPeer(t, ca, book, Identity{"dev", "a", "a-1"}, nil)
	hub.arrivals.limit = 300 * time.Millisecond
	hub.serve(t, book)
	hub.Listener(KindHTTP) // nobody accepts
	peer := newTestPeer(t, ca, book, Identity{"dev", "b", "b-1"}, nil)
	async.Await(t, "a dial that comes through in time", func() bool {
		conn, err := peer.Dial(async.Context(t), KindHTTP, "a-1")
		if err != nil {
			return false // a busy machine
		}
		defer func() { _ = conn.Close() }()
		if _, err := conn.Read(make([]byte, 1)); err == nil {
			t.Error("something was read")
		}
		return true
	})
	if n := len(remoteAddrs(hub.Mesh)); n != 0 {
		t.Errorf("%d connections are left", n)
	}
}

// The CA is exchanged, and with it every certificate, while peers dial all the
// time: not one dial fails, whatever lies half written on the disk.
func TestRotationUnderDials(t *testing.T) {
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
	dialSome := func() {
		target := dials.Load() + 6
		async.Await(t, "more dials", func() bool { return dials.Load() >= target || t.Failed() })
	}
	settled := func(what string) {
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
		dialSome()
	}
	half := func(text []byte) []byte { return text[:len(text)*2/3] }

	next := newTLSAuthority(t, "dev")
	both := append(bytes.Clone(ca.cert), next.cert...)
	for _, p := range peers {
		writeTLSFile(t, p.files.ca, half(both))
		dialSome()
		writeTLSFile(t, p.files.ca, both)
	}
	settled("both CAs are trusted")
	for _, p := range peers {
		cert, key := next.issue(t, p.id)
		writeTLSFile(t, p.files.cert, half(cert))
		dialSome()
		writeTLSFile(t, p.files.cert, cert)
		dialSome() // with the old key still there
		writeTLSFile(t, p.files.key, key)
	}
	settled("the new certificates are in use")
	for _, p := range peers {
		writeTLSFile(t, p.files.ca, nil)
		dialSome()
		writeTLSFile(t, p.files.ca, next.cert)
	}
	settled("the old CA is trusted no more")
	stopA()
	stopB()

	// It really is: a certificate of the old CA is refused now.
	late := newTestPeer(t, ca, book, Identity{"dev", "c", "c-1"}, nil)
	writeTLSFile(t, late.files.ca, both)
	if err := late.opts.Credentials.Reload(); err != nil {
		t.Fatal(err)
	}
	if _, err := late.Dial(async.Context(t), KindHTTP, "a-1"); !errors.Is(err, ErrCertificateRefused) {
		t.Errorf("got %v, want ErrCertificateRefused", err)
	}
}

// A dial ends when its context does, at whatever step it is.
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
		then func(net.Conn) // what the other side does after accepting
	}{
		{"no TLS answer", func(net.Conn) {}},
		{"no preface answer", func(raw net.Conn) {
			c := strangerTLS(t, cert, key)
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
					t.Fatal("it came through")
				}
			case <-time.After(20 * time.Second):
				t.Fatal("it hangs")
			}
		})
	}
	if n := len(remoteAddrs(peer.Mesh)); n != 0 {
		t.Errorf("%d connections are left", n)
	}
}
