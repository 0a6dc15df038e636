package upstream

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/dsnode/dsnode/cluster/cause"
)

// http1 is a client of one server over plain HTTP/1.1. The goroutine of the request
// writes it and reads its answer. http.Transport has two more goroutines for each
// connection and passes everything on twice: measured side by side, a proxied
// completion takes a quarter less CPU here.
//
// It is for small bodies without TLS. All else goes through the http.Transport,
// whose settings and dialer it shares.
type http1 struct {
	*http.Transport
	addr string // host:port; empty: everything goes through the Transport

	mu    sync.Mutex // guards all below
	idle  []*http1Conn
	sweep *time.Timer // closes what is idle for too long; nil: nothing is idle
}

const (
	// http1Inline bounds the bodies that are written before any of the answer is
	// read. The answer of a server that refuses a larger body in its middle is seen
	// only by a client that reads meanwhile, as http.Transport does.
	http1Inline = 64 << 10
	// http1Interim bounds the 1xx answers before the one that counts.
	http1Interim = 5
)

// newHTTP1 takes the host of a URL. Names that are not in ASCII, and zones of IPv6,
// are left to the Transport.
func newHTTP1(t *http.Transport, host string) *http1 {
	at := url.URL{Host: host}
	for i := range len(host) {
		if c := host[i]; c <= ' ' || c >= 0x7f || c == '%' {
			return &http1{Transport: t}
		}
	}
	return &http1{Transport: t, addr: net.JoinHostPort(at.Hostname(), cmp.Or(at.Port(), "80"))}
}

// http1Conn is a connection with its read buffer.
type http1Conn struct {
	net.Conn
	raw    syscall.RawConn
	in     *bufio.Reader
	header int64     // bytes that the answer's header may still have; negative: no bound
	since  time.Time // it is idle
	reused bool
}

const (
	errHeaderTooLong = cause.Words("the answer's header is too long")
	errBadHeader     = cause.Words("a header value can't be sent")
	errInterim       = cause.Words("too many 1xx answers")
)

// Read feeds the buffer.
func (c *http1Conn) Read(b []byte) (int, error) {
	if c.header < 0 {
		return c.Conn.Read(b)
	}
	if c.header == 0 {
		return 0, errHeaderTooLong
	}
	if int64(len(b)) > c.header {
		b = b[:c.header]
	}
	n, err := c.Conn.Read(b)
	c.header -= int64(n)
	return n, err
}

// RoundTrip implements http.RoundTripper.
func (h *http1) RoundTrip(req *http.Request) (*http.Response, error) {
	if h.addr == "" || req.URL.Scheme != "http" || req.ContentLength < 0 || req.ContentLength > http1Inline {
		return h.Transport.RoundTrip(req)
	}
	buf := http1Buffers.Get().(*[]byte) //nolint:errcheck // the pool holds nothing else
	defer func() {
		if cap(*buf) <= 2*http1Inline {
			http1Buffers.Put(buf)
		}
	}()
	text, err := appendRequest((*buf)[:0], req)
	*buf = text
	if err != nil {
		return nil, err
	}
	for {
		c, err := h.connection(req.Context())
		if err != nil {
			return nil, err
		}
		// The last call before the request is written, as with http.Transport: a
		// caller that has to check something just before it starts does it here.
		if t := httptrace.ContextClientTrace(req.Context()); t != nil && t.GotConn != nil {
			t.GotConn(httptrace.GotConnInfo{Conn: c, Reused: c.reused})
			if req.Context().Err() != nil {
				_ = c.Close() // nothing was sent on it
				return nil, context.Cause(req.Context())
			}
		}
		resp, again, err := h.exchange(c, req, text)
		if !again {
			return resp, err
		}
	}
}

var http1Buffers = sync.Pool{New: func() any { b := make([]byte, 0, 4<<10); return &b }}

// exchange sends a request on a connection and reads the answer's header. again: the
// connection was kept from an earlier request, and the server has closed it
// meanwhile without a byte of an answer, so the request is to be sent on another
// one. As with http.Transport, that is for requests only that say they may be sent
// twice.
func (h *http1) exchange(c *http1Conn, req *http.Request, text []byte) (resp *http.Response, again bool, err error) {
	ctx := req.Context()
	// The connection is closed as soon as the request is cancelled, even while its
	// goroutine waits for a client with a full buffer: the upstream must stop
	// working then.
	stop := context.AfterFunc(ctx, func() { _ = c.Close() })
	c.header = maxAnswerHeader
	_, failed := c.Write(text)
	// A server may answer before it has read everything, and hang up.
	if resp, err = c.readHeader(req); err != nil {
		began := c.header != maxAnswerHeader
		err = cmp.Or(failed, err)
		stop()
		_ = c.Close()
		switch {
		case ctx.Err() != nil:
			return nil, false, context.Cause(ctx)
		case c.reused && !began && replayable(req):
			return nil, true, nil
		}
		return nil, false, err
	}
	resp.Body = &http1Answer{ReadCloser: resp.Body, pool: h, conn: c, stop: stop, keep: !resp.Close && !req.Close}
	return resp, false, nil
}

// replayable is the rule of http.Transport.
func replayable(req *http.Request) bool {
	if req.Method == http.MethodGet || req.Method == http.MethodHead {
		return true
	}
	_, one := req.Header["Idempotency-Key"]
	_, other := req.Header["X-Idempotency-Key"]
	return one || other
}

// readHeader reads the answer up to its body.
func (c *http1Conn) readHeader(req *http.Request) (*http.Response, error) {
	for range http1Interim {
		resp, err := http.ReadResponse(c.in, req)
		switch {
		case err != nil:
			return nil, err
		case resp.StatusCode >= http.StatusOK:
			c.header = -1
			return resp, nil
		case resp.StatusCode == http.StatusSwitchingProtocols:
			return nil, fmt.Errorf("%w: 101", errInterim)
		}
	}
	return nil, errInterim
}

// appendRequest writes a request in HTTP/1.1. It refuses what it can't write: a line
// break in a value would begin another header.
func appendRequest(b []byte, req *http.Request) ([]byte, error) {
	host := req.Host
	if host == "" {
		host = req.URL.Host
	}
	path := req.URL.RequestURI()
	if !writable(host) || !writable(path) || strings.Contains(path, " ") {
		return b, errBadHeader
	}
	b = append(append(append(b, req.Method...), ' '), path...)
	b = append(append(b, " HTTP/1.1\r\nHost: "...), host...)
	b = append(b, "\r\n"...)
	if _, named := req.Header["User-Agent"]; !named {
		b = append(b, "User-Agent: Go-http-client/1.1\r\n"...) // as http.Transport does
	}
	for name, values := range req.Header {
		switch name {
		case "Host", "Content-Length", "Transfer-Encoding", "Trailer":
			continue // these follow from the request itself
		}
		for _, v := range values {
			if !writable(name) || !writable(v) {
				return b, errBadHeader
			}
			b = append(append(append(append(b, name...), ": "...), v...), "\r\n"...)
		}
	}
	if req.Body == nil || req.Body == http.NoBody {
		return append(b, "\r\n"...), nil
	}
	b = append(b, "Content-Length: "...)
	b = append(strconv.AppendInt(b, req.ContentLength, 10), "\r\n\r\n"...)
	n := len(b) + int(req.ContentLength)
	if cap(b) < n {
		b = append(make([]byte, 0, n), b...)
	}
	_, err := io.ReadFull(req.Body, b[len(b):n])
	if closed := req.Body.Close(); err == nil {
		err = closed
	}
	if err != nil {
		return b, fmt.Errorf("read the request's body: %w", err)
	}
	return b[:n], nil
}

// writable reports that s has no control characters, which could end a line.
func writable(s string) bool {
	for i := range len(s) {
		if c := s[i]; c < ' ' && c != '\t' || c == 0x7f {
			return false
		}
	}
	return true
}

// connection takes the idle connection that was used last, which is the least likely
// to be closed soon, or dials.
func (h *http1) connection(ctx context.Context) (*http1Conn, error) {
	for {
		c := h.take()
		if c == nil {
			break
		}
		if time.Since(c.since) < h.IdleConnTimeout && quiet(c.raw) {
			c.reused = true
			return c, nil
		}
		_ = c.Close() // it is idle
	}
	conn, err := h.DialContext(ctx, "tcp", h.addr)
	if err != nil {
		return nil, err
	}
	c := &http1Conn{Conn: conn}
	if s, ok := conn.(syscall.Conn); ok {
		c.raw, err = s.SyscallConn()
	}
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	c.in = bufio.NewReaderSize(c, 4<<10)
	return c, nil
}

func (h *http1) take() *http1Conn {
	h.mu.Lock()
	defer h.mu.Unlock()
	n := len(h.idle)
	if n == 0 {
		return nil
	}
	c := h.idle[n-1]
	h.idle[n-1] = nil
	h.idle = h.idle[:n-1]
	return c
}

// put keeps a connection whose answer is over.
func (h *http1) put(c *http1Conn) {
	c.since = time.Now()
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.idle) >= h.MaxIdleConnsPerHost {
		_ = c.Close() // it is idle
		return
	}
	h.idle = append(h.idle, c)
	if h.sweep == nil {
		h.sweep = time.AfterFunc(h.IdleConnTimeout, h.closeOld)
	}
}

// closeOld closes what was idle for too long. The oldest are first in idle.
func (h *http1) closeOld() {
	h.mu.Lock()
	defer h.mu.Unlock()
	now := time.Now()
	old := 0
	for old < len(h.idle) && now.Sub(h.idle[old].since) >= h.IdleConnTimeout {
		_ = h.idle[old].Close() // it is idle
		old++
	}
	rest := copy(h.idle, h.idle[old:])
	clear(h.idle[rest:])
	h.idle = h.idle[:rest]
	if rest == 0 {
		h.sweep = nil
		return
	}
	h.sweep = time.AfterFunc(h.IdleConnTimeout-now.Sub(h.idle[0].since), h.closeOld)
}

// CloseIdleConnections closes all idle connections.
func (h *http1) CloseIdleConnections() {
	h.Transport.CloseIdleConnections()
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, c := range h.idle {
		_ = c.Close() // it is idle
	}
	h.idle = nil
	if h.sweep != nil {
		h.sweep.Stop()
		h.sweep = nil
	}
}

// http1Answer is the body of an answer. Read to its end it gives the connection back.
// Closed before its end it closes the connection, and so ends the upstream's work.
type http1Answer struct {
	io.ReadCloser
	pool *http1
	conn *http1Conn
	stop func() bool // after it the context's end no longer closes the connection
	keep bool        // the connection may be used again
	over bool
}

func (a *http1Answer) Read(b []byte) (int, error) {
	n, err := a.ReadCloser.Read(b)
	if err == nil || a.over {
		return n, err
	}
	a.over = true
	// Bytes after the answer's end belong to no request.
	if a.stop() && a.keep && errors.Is(err, io.EOF) && a.conn.in.Buffered() == 0 {
		a.pool.put(a.conn)
	} else {
		_ = a.conn.Close() // the answer is what counts
	}
	return n, err
}

// Close doesn't read the rest.
func (a *http1Answer) Close() error {
	if a.over {
		return nil
	}
	a.over = true
	a.stop()
	return a.conn.Close()
}
