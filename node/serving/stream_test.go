package serving

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(closing{m})
}

// closing closes the idle connections of the tests' own client.
type closing struct{ m *testing.M }

func (c closing) Run() int {
	defer http.DefaultTransport.(*http.Transport).CloseIdleConnections() //nolint:errcheck // it is one
	return c.m.Run()
}

// newEarlyServer answers before it has read the request's body.
func newEarlyServer(t *testing.T, like *server) *server {
	t.Helper()
	s := &server{name: like.name}
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(w).EnableFullDuplex()
		events(wellStream)(w, r)
		_, _ = io.Copy(io.Discard, r.Body)
	}))
	t.Cleanup(s.Close)
	return s
}

// TestHangUps: clients that leave, at any time, count as no failure of an upstream, and
// the upstream stops working for them at once.
func TestHangUps(t *testing.T) {
	bye := errors.New("client has gone")
	endless := then(events(roleChunk+delta("a")), chatter(delta("b")))
	up := newServer(t, "up", nil)
	other := newServer(t, "other", well)
	for _, c := range []struct {
		name   string
		answer answering
		stream bool
		leave  func(s *recorder, cancel context.CancelFunc)
		want   error
	}{
		{"before an answer", stall, false, func(_ *recorder, cancel context.CancelFunc) {
			eventually(t, "the upstream is asked", func() bool { return up.active.Load() > 0 })
			cancel()
		}, context.Canceled},
		{"before content", then(events(roleChunk), stall), true, func(_ *recorder, cancel context.CancelFunc) {
			eventually(t, "the upstream is asked", func() bool { return up.active.Load() > 0 })
			cancel()
		}, context.Canceled},
		{"within a stream", endless, true, func(s *recorder, cancel context.CancelFunc) {
			s.onData = func(n int) error {
				if n == 4 {
					cancel()
				}
				return nil
			}
		}, context.Canceled},
		{"told by a write", endless, true, func(s *recorder, _ context.CancelFunc) {
			s.onData = func(n int) error {
				if n == 4 {
					return bye
				}
				return nil
			}
		}, bye},
	} {
		t.Run(c.name, func(t *testing.T) {
			up.set(c.answer)
			r := newRig(t, []*server{up, other})
			before := other.hits.Load()
			const clients = 20
			var all sync.WaitGroup
			for range clients {
				all.Go(func() {
					ctx, cancel := context.WithCancel(t.Context())
					defer cancel()
					s := &recorder{}
					left := make(chan struct{})
					if strings.HasPrefix(c.name, "before") {
						go func() {
							defer close(left)
							c.leave(s, cancel)
						}()
					} else {
						c.leave(s, cancel)
						close(left)
					}
					if err := r.Serve(ctx, chat(c.stream), s); !errors.Is(err, c.want) {
						t.Errorf("error %v", err)
					}
					<-left
				})
			}
			all.Wait()
			gone := time.Now()
			eventually(t, "the upstream stops", func() bool { return up.active.Load() == 0 })
			t.Logf("upstream work stopped after %s", time.Since(gone))
			if r.results("up", "cancelled") != clients {
				t.Errorf("%v of %d counted as cancelled", r.results("up", "cancelled"), clients)
			}
			if other.hits.Load() != before {
				t.Error("another upstream was asked for a client that has gone")
			}
			s := r.fleet.Status()[1]
			if s.Name != "up" || s.Breaker != "closed" || s.LastErr != "" || s.InFlight != 0 {
				t.Errorf("the upstream is marked: %+v", s)
			}
		})
	}
}

// TestConnectionsAreKept: the connection of a finished stream is used again.
func TestConnectionsAreKept(t *testing.T) {
	up := newServer(t, "up", well)
	var mu sync.Mutex // guards addrs
	addrs := map[string]bool{}
	up.set(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		addrs[r.RemoteAddr] = true
		mu.Unlock()
		well(w, r)
	})
	r := newRig(t, []*server{up})
	for i := range 20 {
		if _, err := r.serve(t, chat(i%2 == 0)); err != nil {
			t.Fatal(err)
		}
	}
	if len(addrs) > 2 { // one may be lost to a slow end on a busy machine
		t.Errorf("%d connections for 20 requests one after the other", len(addrs))
	}
}

// TestNoStreamIsLost: golang/go#40747 cuts a proxy's streams when the answer begins before
// the transport is done with the request's body. Here that body is a slice, and an
// upstream may answer without reading it.
func TestNoStreamIsLost(t *testing.T) {
	up := newServer(t, "up", well)
	early := newEarlyServer(t, up)
	r := newRig(t, []*server{early})
	body := strings.Repeat("x", 100<<10)
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for range 10 {
				req := request("/v1/chat/completions", `{"model":"m","stream":true,"messages":[{"role":"user","content":"`+body+`"}]}`, true)
				s := &recorder{}
				if err := r.Serve(t.Context(), req, s); err != nil || s.text() != wellStream {
					t.Errorf("%v: %q", err, s.text())
				}
			}
		})
	}
	all.Wait()
}

// TestEventsArriveOneByOne: no event is held until the next one comes.
func TestEventsArriveOneByOne(t *testing.T) {
	next := make(chan struct{})
	up := newServer(t, "up", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		for _, e := range strings.SplitAfter(wellStream, "\n\n") {
			_, _ = io.WriteString(w, e)
			flush(w)
			if strings.Contains(e, `"content":"`) && !strings.Contains(e, `"role"`) {
				select {
				case <-next:
				case <-r.Context().Done():
					return
				}
			}
		}
	})
	r := newRig(t, []*server{up})
	s := &recorder{}
	s.onData = func(n int) error {
		if n == 2 || n == 3 { // the role, then "Hel", then "lo"
			next <- struct{}{}
		}
		return nil
	}
	if err := r.Serve(t.Context(), chat(true), s); err != nil || s.text() != wellStream {
		t.Fatalf("%v: %q", err, s.text())
	}
}
