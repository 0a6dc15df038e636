package ports

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/dsnode/dsnode/cluster/config"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// pipeListener gives one connection, then waits for its end.
type pipeListener struct {
	conns  chan net.Conn
	closed chan struct{}
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error {
	close(l.closed)
	return nil
}
func (l *pipeListener) Addr() net.Addr { return &net.TCPAddr{} }

// TestHeaderTimeCountsFromTheFirstByte: a connection may be idle for long before its
// first request, but a header that has begun must come soon.
func TestHeaderTimeCountsFromTheFirstByte(t *testing.T) {
	const request = "GET /healthz/live HTTP/1.1\r\nHost: x\r\n\r\n"
	tests := []struct {
		name  string
		parts []string // a minute is between two of them
		want  error
	}{
		{"opened ahead of its need", []string{"", request}, nil},
		{"a header that dribbles", []string{request[:20], request[20:]}, io.EOF},
		{"the header of a second request", []string{request, request[:20], request[20:]}, io.EOF},
		{"a second request, later", []string{request, request}, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				client, server := net.Pipe()
				ln := &pipeListener{conns: make(chan net.Conn, 1), closed: make(chan struct{})}
				ln.conns <- server
				p := New(Options{Name: "p", Limit: func() int { return 1 }})
				srv := p.Server(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "here") }), 1<<16, slog.New(slog.DiscardHandler))
				done := make(chan error, 1)
				go func() { done <- srv.Serve(p.Listen(ln, false)) }()
				in := bufio.NewReader(client)
				var last error
				for i, part := range tt.parts {
					if i > 0 {
						time.Sleep(time.Minute)
					}
					if part == "" {
						continue
					}
					// A server that has given up may want to say so, and does not listen.
					_ = client.SetDeadline(time.Now().Add(time.Second))
					if _, last = io.WriteString(client, part); last != nil {
						break
					}
					if part != request && i < len(tt.parts)-1 {
						continue // not the end of a request
					}
					var resp *http.Response
					if resp, last = http.ReadResponse(in, nil); last == nil {
						_, _ = io.ReadAll(resp.Body)
					}
				}
				if (last == nil) != (tt.want == nil) {
					t.Errorf("the client saw %v, want %v", last, tt.want)
				}
				_ = client.Close()
				if err := srv.Close(); err != nil {
					t.Error(err)
				}
				if err := <-done; !errors.Is(err, http.ErrServerClosed) {
					t.Error(err)
				}
			})
		})
	}
}

// deadlines is a connection that records its write deadlines.
type deadlines struct {
	net.Conn
	set []time.Time
}

func (d *deadlines) SetWriteDeadline(t time.Time) error {
	d.set = append(d.set, t)
	return nil
}

func TestWriteDeadlines(t *testing.T) {
	below := &deadlines{}
	since := time.Now()
	c := newConn(below, New(Options{Name: "p", WriteTolerance: time.Second}), false)
	c.since = since
	at := since.Add(time.Minute)
	for _, step := range []struct {
		by  time.Time
		set bool
	}{
		{at, true},
		{at, false},
		{at.Add(999 * time.Millisecond), false},
		{at.Add(time.Second), true},
		{at.Add(time.Second - 1), true}, // never later than asked for
		{time.Time{}, true},
		{at, true},
		{time.Time{}, true},
		{time.Time{}, true},
	} {
		below.set = nil
		if err := c.SetWriteDeadline(step.by); err != nil {
			t.Fatal(err)
		}
		if (len(below.set) == 1) != step.set || step.set && !below.set[0].Equal(step.by) {
			t.Errorf("%v: set %v", step.by.Sub(at), below.set)
		}
	}
}

// server serves a port on loopback until the test ends.
type server struct {
	*Port
	t    *testing.T
	addr string
	reg  *prometheus.Registry
	tls  *tls.Config // of its clients; nil: plain
}

func serve(t *testing.T, limit int, secure bool, h http.HandlerFunc) *server {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &server{t: t, addr: ln.Addr().String(), reg: prometheus.NewRegistry()}
	s.Port = New(Options{Name: "client", Limit: func() int { return limit }, Refusal: func() []byte { return []byte(`{"error":{}}`) }, Registerer: s.reg})
	srv := s.Server(h, 1<<16, slog.New(slog.DiscardHandler))
	ln = s.Listen(ln, secure)
	if secure {
		borrowed := httptest.NewUnstartedServer(nil) // it has a certificate
		borrowed.StartTLS()
		srv.TLSConfig = &tls.Config{Certificates: borrowed.TLS.Certificates}
		s.tls = &tls.Config{RootCAs: x509.NewCertPool(), ServerName: "example.com"}
		s.tls.RootCAs.AddCert(borrowed.Certificate())
		borrowed.Close()
	}
	done := make(chan error, 1)
	go func() {
		if secure {
			done <- srv.ServeTLS(ln, "", "")
		} else {
			done <- srv.Serve(ln)
		}
	}()
	t.Cleanup(func() {
		_ = srv.Close()
		if err := <-done; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	})
	return s
}

// dial opens a connection and sends a text, after the TLS handshake if there is one.
func (s *server) dial(text string) net.Conn {
	s.t.Helper()
	c, err := net.Dial("tcp", s.addr)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = c.Close() })
	if s.tls != nil {
		secure := tls.Client(c, s.tls)
		if err := secure.Handshake(); err != nil {
			s.t.Fatal(err)
		}
		c = secure
	}
	if _, err := io.WriteString(c, text); err != nil {
		s.t.Fatal(err)
	}
	return c
}

// ask sends a request without a body on a new connection, and reads the answer.
func (s *server) ask(path string) string {
	s.t.Helper()
	return answer(s.t, s.dial("GET "+path+" HTTP/1.1\r\nHost: localhost\r\n\r\n"))
}

// answer reads the body of one answer.
func answer(t *testing.T, c net.Conn) string {
	t.Helper()
	_ = c.SetReadDeadline(time.Now().Add(20 * time.Second))
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Errorf("no answer: %v", err)
		return ""
	}
	text, _ := io.ReadAll(resp.Body)
	return resp.Status + " " + string(text)
}

// wantClosed waits until the server has closed a connection without an answer.
func wantClosed(t *testing.T, what string, c net.Conn) {
	t.Helper()
	_ = c.SetReadDeadline(time.Now().Add(20 * time.Second))
	if n, err := c.Read(make([]byte, 1)); n != 0 || err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%s: read %d bytes, %v, want a closed connection", what, n, err)
	}
}

func (s *server) value(reason string) float64 {
	s.t.Helper()
	families, err := s.reg.Gather()
	if err != nil {
		s.t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if f.GetName() == "dsnode_connections_refused_total" && m.GetLabel()[0].GetValue() == "client" && m.GetLabel()[1].GetValue() == reason {
				return m.GetCounter().GetValue()
			}
		}
	}
	s.t.Errorf("no series for %s", reason)
	return 0
}

// await waits for a condition.
func await(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	limit := time.After(20 * time.Second)
	for !ok() {
		select {
		case <-tick.C:
		case <-limit:
			t.Fatalf("not in 20 s: %s", what)
		}
	}
}

// waiting is how many connections wait, and how many are open.
func (p *Port) waiting() (n, open int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := p.oldest; c != nil; c = c.after {
		n++
	}
	return n, p.open
}

// TestTheOldestThatWaitsGivesWay: whatever a client leaves out of its request, it keeps
// nobody out. The connections of each case fill the port; a new client is answered at once.
func TestTheOldestThatWaitsGivesWay(t *testing.T) {
	const limit = 4
	const header = "POST /body HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n"
	for name, tt := range map[string]struct {
		tls  bool
		text string
		// answered: the client asked once before, and has read the answer.
		answered bool
	}{
		"silent":                         {},
		"silent after TLS":               {tls: true},
		"a header that stops":            {text: "GET / HTTP/1.1\r\nHost: loc"},
		"a header that stops, with TLS":  {tls: true, text: "GET / HTTP/1.1\r\nHost: loc"},
		"a body that does not come":      {text: header + "\r\n"},
		"a body that stops":              {text: header + "\r\nabc"},
		"a body that stops, with TLS":    {tls: true, text: header + "\r\nabc"},
		"a chunked body that stops":      {text: "POST /body HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"},
		"a body that nobody reads":       {text: strings.Replace(header, "/body", "/", 1) + "\r\n"},
		"idle after a request":           {text: "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", answered: true},
		"idle after a request, with TLS": {tls: true, text: "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", answered: true},
	} {
		t.Run(name, func(t *testing.T) {
			bodies := make(chan struct{}, limit)
			s := serve(t, limit, tt.tls, func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path == "/body" {
					bodies <- struct{}{}
					if _, err := io.ReadAll(r.Body); err != nil {
						return
					}
					Received(r.Context())
				}
				_, _ = io.WriteString(w, "here")
			})
			var conns []net.Conn
			for range limit {
				c := s.dial(tt.text)
				if tt.answered {
					if got := answer(t, c); got != "200 OK here" {
						t.Fatal(got)
					}
				}
				if strings.Contains(tt.text, "/body") {
					<-bodies
				}
				conns = append(conns, c)
				await(t, "it waits", func() bool { n, open := s.waiting(); return n == len(conns) && open == len(conns) })
			}
			if got := s.ask("/"); got != "200 OK here" {
				t.Errorf("the new client got %q", got)
			}
			wantClosed(t, "the oldest", conns[0])
			for _, c := range conns[1:] { // the others are open still
				_ = c.SetReadDeadline(time.Now())
				if _, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
					t.Errorf("a newer one: %v", err)
				}
			}
			if n := s.value("silent"); n != 1 {
				t.Errorf("%v counted", n)
			}
			if n := s.value("full"); n != 0 {
				t.Errorf("%v refused", n)
			}
		})
	}
}

// TestSilentBeforeTLSGivesWay: a client that does not even begin its TLS handshake.
func TestSilentBeforeTLSGivesWay(t *testing.T) {
	s := serve(t, 2, true, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "here") })
	var conns []net.Conn
	for range 2 {
		c, err := net.Dial("tcp", s.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = c.Close() }()
		conns = append(conns, c)
		await(t, "it waits", func() bool { n, _ := s.waiting(); return n == len(conns) })
	}
	if got := s.ask("/"); got != "200 OK here" {
		t.Errorf("the new client got %q", got)
	}
	wantClosed(t, "the oldest", conns[0])
}

// TestRequestsGiveWayToNobody: requests that are being answered fill the port, so a new
// connection gets a 503 at once. A client that sends its body quickly counts as new.
func TestRequestsGiveWayToNobody(t *testing.T) {
	entered, leave := make(chan struct{}, 3), make(chan struct{})
	s := serve(t, 2, false, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/wait" {
			entered <- struct{}{}
			<-leave
		}
		_, _ = io.WriteString(w, "here")
	})
	const wait = "GET /wait HTTP/1.1\r\nHost: localhost\r\n\r\n"
	first, second := s.dial(wait), s.dial(wait)
	<-entered
	<-entered
	if got := s.ask("/"); !strings.HasPrefix(got, "503 ") || !strings.Contains(got, `{"error":{}}`) {
		t.Errorf("the third client got %q", got)
	}
	if n := s.value("full"); n != 1 {
		t.Errorf("%v refused", n)
	}
	close(leave)
	for _, c := range []net.Conn{first, second} {
		if got := answer(t, c); got != "200 OK here" {
			t.Errorf("a request that ran got %q", got)
		}
	}
	await(t, "both are idle", func() bool { n, _ := s.waiting(); return n == 2 })
	if got := s.ask("/"); got != "200 OK here" {
		t.Errorf("after them: %q", got)
	}
}

// TestASteadySenderGivesWayLater: of two connections that wait, the one whose body comes
// quickly stays, although it is older.
func TestASteadySenderGivesWayLater(t *testing.T) {
	arrived := make(chan struct{})
	s := serve(t, 2, false, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/body" {
			part := make([]byte, progress)
			if _, err := io.ReadFull(r.Body, part); err != nil {
				return
			}
			Arrived(r.Context(), len(part))
			close(arrived)
			if _, err := io.ReadAll(r.Body); err != nil {
				return
			}
			Received(r.Context())
		}
		_, _ = io.WriteString(w, "here")
	})
	sender := s.dial("POST /body HTTP/1.1\r\nHost: localhost\r\nContent-Length: " + strconv.Itoa(progress+3) + "\r\n\r\n")
	await(t, "it waits", func() bool { n, _ := s.waiting(); return n == 1 })
	silent := s.dial("")
	await(t, "both wait", func() bool { n, _ := s.waiting(); return n == 2 })
	if _, err := io.WriteString(sender, strings.Repeat("x", progress)); err != nil {
		t.Fatal(err)
	}
	<-arrived
	if got := s.ask("/"); got != "200 OK here" {
		t.Errorf("the new client got %q", got)
	}
	wantClosed(t, "the silent one", silent)
	if _, err := io.WriteString(sender, "end"); err != nil {
		t.Fatal(err)
	}
	if got := answer(t, sender); got != "200 OK here" {
		t.Errorf("the sender got %q", got)
	}
}

// TestALoweredLimit: the configuration may change while the port is open.
func TestALoweredLimit(t *testing.T) {
	p := New(Options{Name: "p", Limit: func() int { return 2 }})
	p.o.Limit = func() int { return 5 }
	for range 5 {
		if ok, victims := p.admit(newConn(&deadlines{}, p, false)); !ok || victims != nil {
			t.Fatal(ok, victims)
		}
	}
	p.o.Limit = func() int { return 2 }
	ok, victims := p.admit(newConn(&deadlines{}, p, false))
	if n, open := p.waiting(); !ok || len(victims) != 4 || n != 2 || open != 2 {
		t.Errorf("%v, %d closed, %d wait, %d open", ok, len(victims), n, open)
	}
	for _, v := range victims { // their goroutines find out, and close them again
		p.closed(v)
		p.wait(v)
	}
	if n, open := p.waiting(); n != 2 || open != 2 {
		t.Errorf("%d wait, %d open", n, open)
	}
}

// TestSlowAndFailedAreCounted: what ends by a deadline, and what is not TLS.
func TestSlowAndFailedAreCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, end := net.Pipe()
		ln := &pipeListener{conns: make(chan net.Conn, 1), closed: make(chan struct{})}
		ln.conns <- end
		s := &server{t: t, reg: prometheus.NewRegistry()}
		s.Port = New(Options{Name: "client", Limit: func() int { return 1 }, Registerer: s.reg})
		srv := s.Server(http.NotFoundHandler(), 1<<16, slog.New(slog.DiscardHandler))
		done := make(chan error, 1)
		go func() { done <- srv.Serve(s.Listen(ln, false)) }()
		if _, err := io.WriteString(client, "GET / HT"); err != nil {
			t.Error(err)
		}
		if _, err := io.ReadAll(client); err != nil { // net/http may say why; then it closes
			t.Error(err)
		}
		if n := s.value("slow"); n != 1 {
			t.Errorf("%v counted as slow", n)
		}
		_ = srv.Close()
		if err := <-done; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	})

	s := serve(t, 2, true, func(http.ResponseWriter, *http.Request) {})
	c, err := net.Dial("tcp", s.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	await(t, "the failed handshake to be counted", func() bool { return s.value("tls") == 1 })
}

// TestDivide: the parts never exceed the whole, and the defaults of the configuration fit
// into the limit of open files of an ordinary service.
func TestDivide(t *testing.T) {
	for _, tt := range []struct{ files, clients, admin, metrics, peers, handshakes int }{
		{256, 52, 16, 4, 48, 16},
		{1024, 336, 64, 16, 128, 64},
		{20000, 8418, 128, 32, 2500, 128},
		{65536, 27984, 128, 32, 8192, 128},
		{1 << 20, 511824, 128, 32, 8192, 128},
	} {
		got := Divide(tt.files)
		if want := (Shares{Clients: tt.clients, InFlight: tt.clients, Admin: tt.admin, Metrics: tt.metrics, Peers: tt.peers, Handshakes: tt.handshakes}); got != want {
			t.Errorf("%d files: %+v, want %+v", tt.files, got, want)
		}
	}
	for files := 192; files < 1<<21; files += 1 + files/50 {
		s := Divide(files)
		if sum := own + s.Clients + s.InFlight + s.Admin + s.Metrics + s.Peers + s.Handshakes; sum > files {
			t.Errorf("%d files: %+v are %d", files, s, sum)
		}
	}
	if s := Divide(20000); s.Clients < config.DefaultLimits().Connections || s.InFlight < config.DefaultLimits().InFlight {
		t.Errorf("the defaults don't fit into 20000 files: %+v", s)
	}
}
