package gateway

import (
	"bufio"
	"errors"
	"io"
	"net"
	"net/http"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

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
				ln.conns <- &headerTimeoutConn{boundedConn: boundedConn{Conn: server, open: new(atomic.Int64)}}
				srv := &http.Server{
					Handler:           http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "here") }),
					ReadHeaderTimeout: 10 * time.Second, IdleTimeout: idleTimeout,
				}
				done := make(chan error, 1)
				go func() { done <- srv.Serve(ln) }()
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
	c := &boundedConn{Conn: below, since: since, tolerance: time.Second}
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
