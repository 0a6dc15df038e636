// Package ports bounds what strangers can take of the node's HTTP ports: the number of
// connections, and who gives way when there are too many. It also judges whether a request
// comes directly from a program on this machine (local.go), and divides the open files
// among the ports and the rest of the node (files.go). Start reading at Port.
package ports

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

const (
	// idleTimeout is how long a connection may wait for a request, the first one too.
	idleTimeout = 2 * time.Minute
	// headerTimeout is how long a header may take from its first byte, and a TLS
	// handshake from the accept.
	headerTimeout = 10 * time.Second
	// progress is how many bytes of a body make a connection count as new among those
	// that wait.
	progress = 16 << 10
)

// Options of a port. Name and Limit are required.
type Options struct {
	Name string // the label port of the metric
	// Limit is how many connections may be open. It is called at each accept.
	Limit func() int
	// Refusal is the body of the 503 for a connection beyond the limit, a JSON text. It is
	// called once for each. Nil: the connection is closed without an answer.
	Refusal func() []byte
	// WriteTolerance is by how much a deadline for writes may be too early.
	WriteTolerance time.Duration
	Registerer     prometheus.Registerer
}

// Port bounds the connections of one port. A connection waits while the client owes it
// something: the TLS handshake, a request's header, or its body. At the limit the
// connection that has waited for longest is closed in favour of a new one, so neither
// silent connections nor slow senders keep others out. A connection whose request is being
// answered is never closed for another one.
type Port struct {
	o       Options
	refused [reasons]prometheus.Counter

	mu             sync.Mutex // guards all below, and the links of conns
	open           int
	oldest, newest *conn // those that wait, by when they began to
}

type reason int

const (
	refusedFull   reason = iota // all connections were being answered
	refusedSilent               // it gave way to a newer one
	refusedSlow                 // a handshake, header or body took too long
	refusedTLS                  // the handshake failed
	reasons
)

var reasonNames = [reasons]string{"full", "silent", "slow", "tls"}

// New makes a port.
func New(o Options) *Port {
	p := &Port{o: o}
	// The label port is constant, so that other packages can register series of the same
	// metric for their ports.
	refused := promauto.With(o.Registerer).NewCounterVec(prometheus.CounterOpts{
		Name: "dsnode_connections_refused_total", Help: "Connections and packets that a port refused, by reason.",
		ConstLabels: prometheus.Labels{"port": o.Name},
	}, []string{"reason"})
	for i, name := range reasonNames {
		p.refused[i] = refused.WithLabelValues(name)
	}
	return p
}

// Listen bounds the connections of ln. Put TLS above it: a TLS client that is refused sees
// a closed connection, any other one the 503.
func (p *Port) Listen(ln net.Listener, tls bool) net.Listener {
	return &listener{Listener: ln, port: p, tls: tls}
}

type listener struct {
	net.Listener
	port *Port
	tls  bool
}

func (l *listener) Accept() (net.Conn, error) {
	for {
		raw, err := l.Listener.Accept()
		if errors.Is(err, syscall.EMFILE) && l.port.makeRoom() {
			continue
		}
		if err != nil {
			return nil, err
		}
		c := newConn(raw, l.port, l.tls)
		admitted, victims := l.port.admit(c)
		for _, v := range victims {
			_ = v.Conn.Close() // its client is silent
		}
		if admitted {
			return c, nil
		}
		l.refuse(raw)
	}
}

// refuse closes a connection at once: waiting in the kernel's queue would look like a hang.
func (l *listener) refuse(raw net.Conn) {
	l.port.refused[refusedFull].Inc()
	var body []byte
	if l.port.o.Refusal != nil {
		body = l.port.o.Refusal()
	}
	if !l.tls && body != nil {
		_ = raw.SetWriteDeadline(time.Now().Add(100 * time.Millisecond)) // a new socket's buffer is empty
		_, _ = raw.Write([]byte("HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: " +
			strconv.Itoa(len(body)) + "\r\n\r\n" + string(body)))
	}
	_ = raw.Close()
}

// admit counts a new connection. It returns the connections to close for it: more than one
// only after the limit was lowered.
func (p *Port) admit(c *conn) (admitted bool, victims []*conn) {
	limit := p.o.Limit()
	p.mu.Lock()
	defer p.mu.Unlock()
	for p.open >= limit && p.oldest != nil {
		victims = append(victims, p.giveWay())
	}
	if p.open >= limit {
		return false, victims
	}
	p.open++
	p.enqueue(c)
	return true, victims
}

// makeRoom closes one connection that waits. It is false when there is none.
func (p *Port) makeRoom() bool {
	p.mu.Lock()
	var victim *conn
	if p.oldest != nil {
		victim = p.giveWay()
	}
	p.mu.Unlock()
	if victim == nil {
		return false
	}
	_ = victim.Conn.Close() // its client is silent
	return true
}

// giveWay takes the connection that has waited for longest off the books; p.mu is held, as
// in the next two.
func (p *Port) giveWay() *conn {
	c := p.oldest
	p.dequeue(c)
	c.gone = true
	p.open--
	p.refused[refusedSilent].Inc()
	return c
}

func (p *Port) enqueue(c *conn) {
	c.waits, c.before, c.after = true, p.newest, nil
	if p.newest != nil {
		p.newest.after = c
	} else {
		p.oldest = c
	}
	p.newest = c
}

func (p *Port) dequeue(c *conn) {
	if c.before != nil {
		c.before.after = c.after
	} else {
		p.oldest = c.after
	}
	if c.after != nil {
		c.after.before = c.before
	} else {
		p.newest = c.before
	}
	c.waits, c.before, c.after = false, nil, nil
}

// wait puts a connection behind all that wait.
func (p *Port) wait(c *conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if c.waits {
		p.dequeue(c)
	}
	if !c.gone {
		p.enqueue(c)
	}
}

// serve takes a connection out of those that wait.
func (p *Port) serve(c *conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if c.waits {
		p.dequeue(c)
	}
}

func (p *Port) closed(c *conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if c.waits {
		p.dequeue(c)
	}
	if !c.gone {
		c.gone = true
		p.open--
	}
}

// NewHTTPServer makes an http.Server for h with the limits that apply before a handler
// runs. It has no WriteTimeout, which would cut streams: each write has its own deadline.
// It has no ReadTimeout either: net/http would end the wait for an answer with it.
// headerBytes is read once, at start.
func NewHTTPServer(h http.Handler, headerBytes int, log *slog.Logger) *http.Server {
	return &http.Server{
		Handler:           h,
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    headerBytes,
		ErrorLog:          newServerLog(log),
	}
}

// Server makes the http.Server for the connections of Listen. A handler that reads a body
// calls Arrived for its parts and Received when it has all, and sets a deadline for reading
// it: until then the connection waits.
func (p *Port) Server(h http.Handler, headerBytes int, logger *slog.Logger) *http.Server {
	s := NewHTTPServer(receives{h}, headerBytes, logger)
	s.ErrorLog = log.New(&errorLog{p, s.ErrorLog.Writer()}, "", 0)
	s.ConnContext = func(ctx context.Context, c net.Conn) context.Context {
		return context.WithValue(ctx, connKey{}, below(c))
	}
	s.ConnState = func(c net.Conn, state http.ConnState) {
		if state != http.StateIdle {
			return
		}
		if c := below(c); c != nil {
			c.began.Store(false)
			p.wait(c)
		}
	}
	return s
}

// below is this package's connection under what net/http has.
func below(c net.Conn) *conn {
	if secure, ok := c.(*tls.Conn); ok {
		c = secure.NetConn()
	}
	found, _ := c.(*conn) // nil for a connection that Listen did not return
	return found
}

type connKey struct{}

// receives marks requests without a body as received.
type receives struct{ next http.Handler }

func (h receives) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.ContentLength == 0 {
		Received(r.Context())
	}
	h.next.ServeHTTP(w, r)
}

// Received says that all of a request has come: from now on, until its answer is sent, its
// connection gives way to no other. The context is the request's.
func Received(ctx context.Context) {
	if c, _ := ctx.Value(connKey{}).(*conn); c != nil {
		c.port.serve(c)
	}
}

// Arrived says that more bytes of a request's body have come: a sender that is not slow
// gives way later. The context is the request's.
func Arrived(ctx context.Context, bytes int) {
	c, _ := ctx.Value(connKey{}).(*conn)
	if c == nil {
		return
	}
	if c.arrived += bytes; c.arrived >= progress {
		c.arrived = 0
		c.port.wait(c)
	}
}

// errorLog counts failed TLS handshakes in the log of an http.Server, which tells of them
// nowhere else.
type errorLog struct {
	port *Port
	next io.Writer
}

func (l *errorLog) Write(line []byte) (int, error) {
	text := strings.TrimSpace(string(line))
	// A load balancer's check of the port ends with EOF; a timeout counts as slow.
	if strings.HasPrefix(text, "http: TLS handshake error") && !strings.HasSuffix(text, "EOF") && !strings.HasSuffix(text, "i/o timeout") &&
		!strings.HasSuffix(text, "use of closed network connection") {
		l.port.refused[refusedTLS].Inc()
	}
	return l.next.Write(line)
}
