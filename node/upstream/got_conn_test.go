package upstream

import (
	"context"
	"errors"
	"net"
	"net/http/httptrace"
	"sync/atomic"
	"testing"
)

// TestGotConn: the trace of a request is called with the connection, new or kept, before
// anything is written on it, and can still cancel the request.
func TestGotConn(t *testing.T) {
	var served atomic.Int64
	s := newScripted(t, func(c net.Conn, _, _ int, _ string) bool {
		served.Add(1)
		say(c, hello)
		return true
	})
	h := s.client(t)
	errNo := errors.New("no permit")
	ask := func(permit bool) error {
		ctx, cancel := context.WithCancelCause(t.Context())
		defer cancel(nil)
		heard := 0
		ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: func(httptrace.GotConnInfo) {
			if heard++; !permit {
				cancel(errNo)
			}
		}})
		resp, err := h.RoundTrip(s.request(ctx, "{}", nil))
		if err == nil {
			_ = resp.Body.Close()
		}
		if heard != 1 {
			t.Errorf("heard of %d connections, want 1", heard)
		}
		return err
	}
	for _, permit := range []bool{true, true, false, true, false} {
		if err := ask(permit); permit != (err == nil) || !permit && !errors.Is(err, errNo) {
			t.Errorf("permit %v: %v", permit, err)
		}
	}
	if got := served.Load(); got != 3 {
		t.Errorf("the server got %d requests, want 3", got)
	}
}
