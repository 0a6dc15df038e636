package gateway

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dsnode/dsnode/node/serving"
)

const streamed = `{"model":"m","messages":[],"stream":true}`

func streamHead() serving.Head {
	return serving.Head{Status: 200, Header: http.Header{"Content-Type": {"text/event-stream; charset=utf-8"}}, Length: -1, Stream: true, Upstream: "up", Site: "here", Attempts: 1}
}

func TestStreamFlushesEachEvent(t *testing.T) {
	step := make(chan struct{})
	b := open(t, serverFunc(func(_ context.Context, _ serving.Request, s serving.Sink) error {
		if err := s.Head(streamHead()); err != nil {
			return err
		}
		for i := range 3 {
			<-step
			if err := s.Data(fmt.Appendf(nil, "data: %d\n\n", i)); err != nil {
				return err
			}
		}
		<-step
		return s.Data([]byte("data: [DONE]\n\n"))
	}), nil)
	go func() { step <- struct{}{} }()
	resp, err := http.Post(b.url+"/v1/chat/completions", "application/json", strings.NewReader(streamed))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	for k, want := range map[string]string{
		"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no", "Content-Length": "",
		"X-Dsnode-Upstream": "up", "X-Dsnode-Site": "here", "X-Dsnode-Node": "here-1", "X-Dsnode-Attempts": "1",
	} {
		if resp.Header.Get(k) != want {
			t.Errorf("%s: %q, want %q", k, resp.Header.Get(k), want)
		}
	}
	in := bufio.NewReader(resp.Body)
	for i := range 3 { // each must arrive before the next is allowed
		line, err := in.ReadString('\n')
		if err != nil || line != fmt.Sprintf("data: %d\n", i) {
			t.Fatal(line, err)
		}
		_, _ = in.ReadString('\n')
		step <- struct{}{}
	}
	rest, err := io.ReadAll(in)
	if err != nil || string(rest) != "data: [DONE]\n\n" {
		t.Errorf("%q, %v", rest, err)
	}
}

// TestHeldHeaders: a failure is a status while the headers are held, and an error event
// afterwards; content may come from any upstream until it has begun.
func TestHeldHeaders(t *testing.T) {
	release := make(chan struct{})
	var result error
	server := serverFunc(func(_ context.Context, _ serving.Request, s serving.Sink) error {
		<-release
		if result != nil {
			return result
		}
		return errors.Join(s.Head(streamHead()), s.Data([]byte("data: x\n\n")), s.Data([]byte("data: [DONE]\n\n")))
	})
	ask := func(b *bench) (*http.Response, *bufio.Reader) {
		resp, err := http.Post(b.url+"/v1/chat/completions", "application/json", strings.NewReader(streamed))
		if err != nil {
			t.Fatal(err)
		}
		return resp, bufio.NewReader(resp.Body)
	}
	soon := func(o *Options) { o.HoldHeaders = 5 * time.Millisecond }
	b := open(t, server, soon)
	for name, tc := range map[string]struct {
		err  error
		want string
	}{
		"content":  {nil, "data: x\n\ndata: [DONE]\n\n"},
		"failure":  {serving.ErrUpstreamFailed, `data: {"error":{"message":"The model server failed to answer.","type":"server_error","param":null,"code":"upstream_failed"}}` + "\n\n"},
		"upstream": {&serving.StatusError{Status: 400, Body: []byte("{\n \"error\": {\"message\": \"no\"}\n}")}, `data: {"error":{"message":"no"}}` + "\n\n"},
	} {
		result = tc.err
		resp, in := ask(b)
		if resp.StatusCode != 200 || resp.Header.Get("Content-Type") != "text/event-stream" || resp.Header.Get("X-Request-Id") == "" {
			t.Errorf("%s: %d %v", name, resp.StatusCode, resp.Header)
		}
		for range 3 {
			if line, err := in.ReadString('\n'); err != nil || line != ": keep-alive\n" {
				t.Fatal(line, err)
			}
			_, _ = in.ReadString('\n')
		}
		release <- struct{}{}
		rest, err := io.ReadAll(in)
		_ = resp.Body.Close()
		if got := strings.ReplaceAll(string(rest), ": keep-alive\n\n", ""); err != nil || got != tc.want {
			t.Errorf("%s: %q, %v", name, got, err)
		}
		if strings.Contains(string(rest), "id:") {
			t.Errorf("%s: an id line: %q", name, rest)
		}
	}

	// Headers that are held for long, and those for peers, which are always held: the
	// failure is a status.
	result = serving.ErrNoUpstream
	patient := open(t, server, func(o *Options) { o.HoldHeaders = time.Hour })
	for _, url := range []string{patient.url, listen(t, b.Gateway, b.PeerHandler())} {
		answered := make(chan got)
		go func() {
			answered <- do(t, "POST", url+"/v1/chat/completions", streamed, serving.HeaderHops, "1", serving.HeaderPrincipal, "{}")
		}()
		release <- struct{}{}
		g := <-answered
		g.wantError(t, 503, "no_upstream", "`m`")
	}
}

// TestKeepAliveRacesContent has the timer fire while content comes: in any order, the
// comment is never inside an event.
func TestKeepAliveRacesContent(t *testing.T) {
	b := open(t, serverFunc(func(ctx context.Context, _ serving.Request, s serving.Sink) error {
		wait, cancel := context.WithTimeout(ctx, time.Millisecond)
		defer cancel()
		<-wait.Done()
		if err := s.Head(streamHead()); err != nil {
			return err
		}
		for range 20 {
			if err := errors.Join(s.Data([]byte("data: one\n\n"))); err != nil {
				return err
			}
		}
		return nil
	}), func(o *Options) { o.HoldHeaders = time.Millisecond })
	var done sync.WaitGroup
	for range 8 {
		done.Go(func() {
			for range 20 {
				g := do(t, "POST", b.url+"/v1/chat/completions", streamed)
				if body := strings.ReplaceAll(g.body, ": keep-alive\n\n", ""); body != strings.Repeat("data: one\n\n", 20) || g.err != nil {
					t.Errorf("%v %q", g.err, g.body)
				}
			}
		})
	}
	done.Wait()
}

func TestFailureAfterHead(t *testing.T) {
	b := open(t, serverFunc(func(_ context.Context, r serving.Request, s serving.Sink) error {
		h := serving.Head{Status: 200, Header: http.Header{"Content-Type": {"application/json"}}, Length: -1}
		if r.Stream {
			h = streamHead()
		}
		return errors.Join(s.Head(h), s.Data([]byte("data: x\n\n")), fmt.Errorf("cut: %w", serving.ErrTruncated))
	}), nil)
	g := do(t, "POST", b.url+"/v1/chat/completions", streamed)
	if want := "data: x\n\n" + `data: {"error":{"message":"The model server ended its answer early.","type":"server_error","param":null,"code":"upstream_truncated"}}` + "\n\n"; g.body != want || g.err != nil {
		t.Errorf("stream: %q, %v", g.body, g.err)
	}
	resp, err := http.Post(b.url+"/v1/chat/completions", "application/json", strings.NewReader(chat))
	if err == nil {
		_, err = io.ReadAll(resp.Body)
		_ = resp.Body.Close()
	}
	if err == nil {
		t.Error("a plain answer that broke looks whole")
	}
	await(t, "both are counted", func() bool { return b.value(t, "dsnode_requests_total", "code", "502") == 2 })
}

func TestPeerHandler(t *testing.T) {
	b := open(t, echo, func(o *Options) { o.Auth = keys{strict: true} })
	url := listen(t, b.Gateway, b.PeerHandler())
	g := do(t, "POST", url+"/v1/chat/completions", chat, serving.HeaderHops, "1", serving.HeaderPrincipal, `{"tenant":"t","key_id":"k","models":["m"]}`)
	if g.status != 200 || !strings.Contains(g.body, `"tenant":"t"`) || !strings.Contains(g.body, `"Hops":1`) || g.header.Get("X-Dsnode-Upstream") != "up" {
		t.Error(g)
	}
	for name, tc := range map[string]struct {
		path, hops, who string
		status          int
		code            string
	}{
		"too far":   {"/v1/chat/completions", "2", "{}", 508, "hop_limit"},
		"no hops":   {"/v1/chat/completions", "", "{}", 400, "bad_peer_request"},
		"nobody":    {"/v1/chat/completions", "1", "", 400, "bad_peer_request"},
		"not for":   {"/v1/chat/completions", "1", `{"models":["x"]}`, 404, "model_not_found"},
		"no health": {"/healthz/live", "1", "{}", 404, "unknown_url"},
		"no models": {"/v1/models", "1", "{}", 404, "unknown_url"},
	} {
		g := do(t, "POST", url+tc.path, chat, serving.HeaderHops, tc.hops, serving.HeaderPrincipal, tc.who)
		if g.status != tc.status || g.header.Get(serving.HeaderError) != tc.code {
			t.Errorf("%s: %+v", name, g)
		}
	}
	// Clients can't make themselves peers.
	do(t, "POST", b.url+"/v1/chat/completions", chat, serving.HeaderHops, "1", serving.HeaderPrincipal, "{}").wantError(t, 401, "invalid_api_key", "")
}

// TestClientsHangUp: 256 clients leave at once, again and again. The pipeline's context
// ends for each, none gets an answer, and no request is left.
func TestClientsHangUp(t *testing.T) {
	var inside, left atomic.Int64
	b := open(t, serverFunc(func(ctx context.Context, r serving.Request, s serving.Sink) error {
		if r.Choices == 2 { // half of them leave in the middle of a stream
			if err := errors.Join(s.Head(streamHead()), s.Data([]byte("data: x\n\n"))); err != nil {
				return err
			}
		}
		inside.Add(1)
		<-ctx.Done()
		left.Add(1)
		return ctx.Err()
	}), func(o *Options) { o.HoldHeaders = 20 * time.Millisecond })
	const crowd, rounds = 256, 3
	for round := range int64(rounds) {
		ctx, hangUp := context.WithCancel(t.Context())
		var done sync.WaitGroup
		for i := range crowd {
			done.Go(func() {
				body := fmt.Sprintf(`{"model":"m","stream":%v,"n":%d}`, i%4 < 3, 1+i%2)
				req, _ := http.NewRequestWithContext(ctx, "POST", b.url+"/v1/chat/completions", strings.NewReader(body))
				if resp, err := http.DefaultClient.Do(req); err == nil {
					_, _ = io.Copy(io.Discard, resp.Body)
					_ = resp.Body.Close()
				}
			})
		}
		await(t, "all are inside", func() bool { return inside.Load() == (round+1)*crowd })
		hangUp()
		done.Wait()
		await(t, "all have left", func() bool { return left.Load() == (round+1)*crowd && b.inFlight.Load() == 0 })
	}
	await(t, "all are counted", func() bool { return b.value(t, "dsnode_requests_total", "code", "499") == crowd*rounds })
	if n := b.value(t, "dsnode_requests_total"); n != crowd*rounds {
		t.Errorf("%v counted in all", n)
	}
}

// TestClientThatDoesNotRead is disconnected when a write takes too long.
func TestClientThatDoesNotRead(t *testing.T) {
	stopped := make(chan error, 1)
	b := open(t, serverFunc(func(_ context.Context, _ serving.Request, s serving.Sink) error {
		err := s.Head(streamHead())
		event := []byte("data: " + strings.Repeat("x", 64<<10) + "\n\n")
		for err == nil {
			err = s.Data(event)
		}
		stopped <- err
		return err
	}), func(o *Options) { o.WriteTimeout = 50 * time.Millisecond })
	c, err := net.Dial("tcp", strings.TrimPrefix(b.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	_, _ = fmt.Fprintf(c, "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s", len(streamed), streamed)
	select {
	case err := <-stopped:
		if err == nil {
			t.Error("no error")
		}
	case <-time.After(20 * time.Second):
		t.Fatal("a client that does not read is waited for")
	}
}
