package ports

import (
	"errors"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// conn is an accepted connection of a port.
type conn struct {
	net.Conn
	port *Port

	// Guarded by Port.mu: its place among those that wait, and whether it is off the books.
	before, after *conn
	waits, gone   bool
	late          bool // counted as slow

	arrived int         // bytes of a body since its last progress; of the request's goroutine
	began   atomic.Bool // a byte of the present handshake or request has come

	since     time.Time
	tolerance time.Duration // by which a deadline may be too early
	writeBy   atomic.Int64  // the deadline for writes, in nanoseconds since, 0: none

	// Without TLS the time for the first header counts from its first byte. net/http counts
	// it from the accept, so a connection that a client opens in advance would be closed
	// just when a request comes on it, and a client doesn't send a POST again.
	counts  atomic.Bool // a byte has come, or TLS: deadlines count as they are
	mu      sync.Mutex  // guards allowed, and counts against SetReadDeadline
	allowed time.Duration
}

func newConn(raw net.Conn, p *Port, tls bool) *conn {
	c := &conn{Conn: raw, port: p, since: time.Now(), tolerance: p.o.WriteTolerance}
	c.counts.Store(tls)
	return c
}

// SetReadDeadline delays a deadline until the first byte.
func (c *conn) SetReadDeadline(t time.Time) error {
	if c.counts.Load() {
		return c.Conn.SetReadDeadline(t)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.counts.Load() && !t.IsZero() {
		if left := time.Until(t); left > 0 {
			c.allowed = left
			t = time.Now().Add(idleTimeout)
		}
	}
	return c.Conn.SetReadDeadline(t)
}

func (c *conn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if n > 0 && !c.began.Load() {
		c.began.Store(true)
	}
	if n > 0 && !c.counts.Load() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.counts.Store(true)
		if c.allowed > 0 && err == nil {
			err = c.Conn.SetReadDeadline(time.Now().Add(c.allowed))
		}
	}
	if err != nil && errors.Is(err, os.ErrDeadlineExceeded) && c.began.Load() {
		c.port.late(c)
	}
	return n, err
}

// late counts a connection whose handshake, header or body took too long. net/http also
// ends its own reads with a deadline, but only of connections that don't wait.
func (p *Port) late(c *conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if c.waits && !c.late {
		c.late = true
		p.refused[refusedSlow].Inc()
	}
}

// SetWriteDeadline keeps the present deadline when the new one is hardly later: each
// request sets one, and moving a timer is one of the most expensive parts of a cache
// hit.
func (c *conn) SetWriteDeadline(t time.Time) error {
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

func (c *conn) Close() error {
	c.port.closed(c)
	return c.Conn.Close()
}

// CloseWrite lets net/http end an answer to a client that is still sending. A reset
// would lose the answer.
func (c *conn) CloseWrite() error {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return nil
}
