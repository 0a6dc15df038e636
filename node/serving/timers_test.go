package serving

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/node/upstream"
)

// TestLatePlainAnswers: a plain completion takes as long as all of its tokens. It is
// waited for while its server answers probes.
func TestLatePlainAnswers(t *testing.T) {
	late := func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-time.After(700 * time.Millisecond): // three times the timer
			well(w, r)
		case <-r.Context().Done():
		}
	}
	embedding := `{"model":"m","input":"x"}`
	for _, c := range []struct {
		name  string
		sick  bool
		req   Request
		wants string // who answers
	}{
		{"probes answer", false, chat(false), "bad"},
		{"probes fail", true, chat(false), "good"},
		{"a stream is not waited for", false, chat(true), "good"},
		{"nor is an embedding", false, request("/v1/embeddings", embedding, false), "good"},
	} {
		t.Run(c.name, func(t *testing.T) {
			bad, good := newServer(t, "bad", late), newServer(t, "good", well)
			r := newRig(t, []*server{bad, good}, hasty)
			bad.onHit = func() {
				bad.sick.Store(c.sick)
				for range 2 {
					r.fleet.Probe(t.Context())
				}
			}
			saw, err := r.serve(t, c.req)
			if err != nil || saw.heads[0].Upstream != c.wants {
				t.Fatalf("%v %+v\n%s", err, saw.heads, r.logs)
			}
			if c.wants == "good" && r.results("bad", "timeout_first_token") != 1 {
				t.Errorf("not the first token's timer:\n%s", r.logs)
			}
		})
	}
}

// TestPace: the least pace of a stream, in virtual time.
func TestPace(t *testing.T) {
	type step struct {
		after  time.Duration
		tokens int
	}
	steady := func(each time.Duration, tokens, n int) (all []step) {
		for range n {
			all = append(all, step{each, tokens})
		}
		return all
	}
	for _, c := range []struct {
		name  string
		floor int
		steps []step
		end   time.Duration // when it is ended from the first step on, 0: it isn't
	}{
		{"no floor", 0, steady(20*time.Second, 1, 10), 0},
		{"fast enough", 5, steady(100*time.Millisecond, 1, 600), 0},
		{"just fast enough", 5, steady(time.Second, 6, 60), 0},
		{"a drip", 5, steady(time.Second, 1, 60), 10 * time.Second},
		{"a drip after a good start", 5, append(steady(100*time.Millisecond, 1, 300), steady(time.Second, 1, 60)...), 40 * time.Second},
		{"a pause shorter than the window", 5, append(steady(100*time.Millisecond, 1, 100), step{8 * time.Second, 60}), 0},
		{"nothing after the first", 5, []step{{0, 1}, {40 * time.Second, 1}}, 10 * time.Second},
		{"much at a time", 5, []step{{0, 100}, {19 * time.Second, 100}, {19 * time.Second, 100}}, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				limits := config.Timeouts{FirstToken: seconds(60), BetweenTokens: seconds(30), Total: seconds(3600), MinTokensPerSecond: c.floor}
				w := newWatch(t.Context(), limits, time.Now().Add(limits.Total.D()), nil, nil)
				defer w.stop()
				time.Sleep(c.steps[0].after)
				begun := time.Now()
				for i, s := range c.steps {
					if i > 0 {
						select {
						case <-w.Done():
						case <-time.After(s.after):
						}
					}
					if w.Err() != nil {
						break
					}
					w.content(s.tokens)
				}
				ended := time.Since(begun)
				var timer *timerError
				if !errors.As(context.Cause(w), &timer) {
					if c.end != 0 {
						t.Fatalf("not ended: %v", context.Cause(w))
					}
					return
				}
				if timer.result != upstream.TooSlow || c.end == 0 || ended < c.end-time.Second || ended > c.end+10*time.Second {
					t.Errorf("ended after %s, want %s: %v", ended, c.end, timer)
				}
			})
		})
	}
}

// TestSlowClientsAreNoFault of the upstream: the time of a write to the client counts
// neither as silence nor as a slow pace.
func TestSlowClientsAreNoFault(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		limits := config.Timeouts{FirstToken: seconds(60), BetweenTokens: seconds(30), Total: seconds(3600), MinTokensPerSecond: 5}
		w := newWatch(t.Context(), limits, time.Now().Add(limits.Total.D()), nil, nil)
		defer w.stop()
		slow := &recorder{onData: func(int) error { time.Sleep(40 * time.Second); return nil }}
		a := &attempt{w: w, sink: slow}
		for range 20 {
			w.content(1)
			if err := a.send(nil); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(9 * time.Second)
		if w.Err() != nil {
			t.Fatalf("ended: %v", context.Cause(w))
		}
		time.Sleep(2 * limits.BetweenTokens.D())
		synctest.Wait()
		if w.Err() == nil {
			t.Error("silence after a slow write is never ended")
		}
	})
}

// TestSlowDripEndsTheStream: the client gets an explicit error, and it counts as a
// failure of the upstream.
func TestSlowDripEndsTheStream(t *testing.T) {
	if testing.Short() {
		t.Skip("the shortest window is ten seconds")
	}
	up := newServer(t, "up", then(events(roleChunk), func(w http.ResponseWriter, r *http.Request) {
		tick := time.NewTicker(500 * time.Millisecond)
		defer tick.Stop()
		for {
			if _, err := io.WriteString(w, delta("x")); err != nil {
				return
			}
			flush(w)
			select {
			case <-tick.C:
			case <-r.Context().Done():
				return
			}
		}
	}))
	r := newRig(t, []*server{up}, func(r *rig, _ *upstream.Options) { r.conf.Timeouts.MinTokensPerSecond = 10 })
	saw, err := r.serve(t, chat(true))
	if !errors.Is(err, ErrTimeout) || !strings.Contains(err.Error(), "min_tokens_per_second (10)") || r.results("up", "too_slow") != 1 {
		t.Errorf("%v\n%s", err, r.logs)
	}
	if strings.Contains(saw.text(), "[DONE]") || r.status(t, "up").LastErr == "" {
		t.Errorf("%q", saw.text())
	}
}

// TestKeptConnections: clients get no errors from a server that closes connections
// while the next request is on its way.
func TestKeptConnections(t *testing.T) {
	for _, how := range []string{"FIN", "RST"} {
		t.Run(how, func(t *testing.T) {
			ln, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			var answered, closed atomic.Int64
			var all sync.WaitGroup
			t.Cleanup(all.Wait)
			t.Cleanup(func() { _ = ln.Close() })
			all.Go(func() {
				for {
					conn, err := ln.Accept()
					if err != nil {
						return
					}
					all.Go(func() {
						defer func() { _ = conn.Close() }()
						in := bufio.NewReader(conn)
						req, err := http.ReadRequest(in)
						if err != nil {
							return
						}
						_, _ = io.Copy(io.Discard, req.Body)
						answered.Add(1)
						_, _ = fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", len(plainBody), plainBody)
						if _, err := in.Peek(1); err == nil { // the next request has come
							closed.Add(1)
							if tcp, ok := conn.(*net.TCPConn); ok && how == "RST" {
								_ = tcp.SetLinger(0)
							}
						}
					})
				}
			})
			up := &server{name: "up", Server: &httptest.Server{URL: "http://" + ln.Addr().String()}}
			r := newRig(t, []*server{up})
			for range 20 {
				if _, err := r.serve(t, chat(false)); err != nil {
					t.Fatal(err)
				}
			}
			if answered.Load() != 20 || closed.Load() == 0 || r.results("up", "ok") != 20 {
				t.Errorf("%d answered, %d closed under a request", answered.Load(), closed.Load())
			}
		})
	}
}

// TestUpstreamWorkStopsWithin100ms of the client's leaving, as the upstream sees it. It
// looks at the median: a busy machine may delay some.
func TestUpstreamWorkStopsWithin100ms(t *testing.T) {
	for _, stream := range []bool{false, true} {
		t.Run(fmt.Sprintf("stream=%t", stream), func(t *testing.T) {
			began, ended := make(chan struct{}, 1), make(chan time.Time, 1)
			up := newServer(t, "up", func(w http.ResponseWriter, r *http.Request) {
				if stream {
					events(roleChunk+delta("a"))(w, r)
				}
				began <- struct{}{}
				<-r.Context().Done()
				ended <- time.Now()
			})
			r := newRig(t, []*server{up})
			var took []time.Duration
			for range 20 {
				ctx, leave := context.WithCancel(t.Context())
				done := make(chan error, 1)
				go func() { done <- r.Serve(ctx, chat(stream), &recorder{}) }()
				<-began
				left := time.Now()
				leave()
				took = append(took, (<-ended).Sub(left))
				if err := <-done; !errors.Is(err, context.Canceled) {
					t.Fatalf("Serve: %v", err)
				}
			}
			slices.Sort(took)
			t.Logf("median %s, worst %s", took[10], took[19])
			if took[10] > 100*time.Millisecond {
				t.Errorf("the upstream stops after %s at the median", took[10])
			}
		})
	}
}
