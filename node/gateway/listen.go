package gateway

import (
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

// idleTimeout is how long a connection may wait for a request, the first one too.
const idleTimeout = 2 * time.Minute

// NewHTTPServer makes an http.Server for h with the limits that apply before a handler
// runs. It has no WriteTimeout, which would cut streams: each write has its own
// deadline. It has no ReadTimeout either: net/http would end the wait for an answer
// with it. headerBytes is read once, at start.
func NewHTTPServer(h http.Handler, headerBytes int, log *slog.Logger) *http.Server {
	return &http.Server{
		Handler:           h,
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    headerBytes,
		ErrorLog:          newServerLog(log),
	}
}

// Listen bounds the connections of ln to limits.connections, which is read at each
// accept. A connection beyond it gets a 503 in plain HTTP and is closed at once: waiting
// in the kernel's queue would look like a hang. Put TLS above it; a TLS client sees a
// closed connection.
func (g *Gateway) Listen(ln net.Listener, tls bool) net.Listener {
	return &boundedListener{
		Listener: ln, g: g, tls: tls,
	}
}

type boundedListener struct {
	net.Listener
	g    *Gateway
	tls  bool
	open atomic.Int64
}

func (l *boundedListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if int(l.open.Add(1)) <= l.g.config().Limits.Connections {
			if l.tls {
				return &boundedConn{Conn: c, open: &l.open, since: time.Now(), tolerance: l.g.o.WriteTimeout / 8}, nil
			}
			return &headerTimeoutConn{boundedConn: boundedConn{Conn: c, open: &l.open, since: time.Now(), tolerance: l.g.o.WriteTimeout / 8}}, nil
		}
		l.open.Add(-1)
		f := l.g.shed(shedConnections)
		if !l.tls {
			body := string(f.json())
			_ = c.SetWriteDeadline(time.Now().Add(100 * time.Millisecond)) // a new socket's buffer is empty
			_, _ = c.Write([]byte("HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: " +
				strconv.Itoa(len(body)) + "\r\n\r\n" + body))
		}
		_ = c.Close()
	}
}

type boundedConn struct {
	net.Conn
	once sync.Once
	open *atomic.Int64

	since     time.Time
	tolerance time.Duration // by which a deadline may be too early
	writeBy   atomic.Int64  // the deadline for writes, in nanoseconds since, 0: none
}

// SetWriteDeadline keeps the present deadline when the new one is hardly later: each
// request sets one, and moving a timer is one of the most expensive parts of a cache
// hit.
func (c *boundedConn) SetWriteDeadline(t time.Time) error {
	by := int64(0)
	if !t.IsZero() {
		by = int64(t.Sub(c.since)) // by the monotonic clock: the wall clock may be set back
	}
	if has := c.writeBy.Load(); has != 0 && has <= by && by-has < int64(c.tolerance) {
		return nil
	}
	c.writeBy.Store(by)
	return c.Conn.SetWriteDeadline(t)
}

func (c *boundedConn) Close() error {
	c.once.Do(func() { c.open.Add(-1) })
	return c.Conn.Close()
}

// CloseWrite lets net/http end an answer to a client that is still sending. A reset
// would lose the answer.
func (c *boundedConn) CloseWrite() error {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return nil
}

// headerTimeoutConn counts the time for a request's header from its first byte. net/http
// counts it from the accept for the first request, so a connection that a client opens
// in advance would be closed just when a request comes on it, and a client doesn't send
// a POST again.
type headerTimeoutConn struct {
	boundedConn
	begun   atomic.Bool // a byte has come
	mu      sync.Mutex  // guards allowed, and begun against SetReadDeadline
	allowed time.Duration
}

// SetReadDeadline delays a deadline until the first byte.
func (c *headerTimeoutConn) SetReadDeadline(t time.Time) error {
	if c.begun.Load() {
		return c.Conn.SetReadDeadline(t)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.begun.Load() && !t.IsZero() {
		if left := time.Until(t); left > 0 {
			c.allowed = left
			t = time.Now().Add(idleTimeout)
		}
	}
	return c.Conn.SetReadDeadline(t)
}

func (c *headerTimeoutConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if n > 0 && !c.begun.Load() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.begun.Store(true)
		if c.allowed > 0 && err == nil {
			err = c.Conn.SetReadDeadline(time.Now().Add(c.allowed))
		}
	}
	return n, err
}
