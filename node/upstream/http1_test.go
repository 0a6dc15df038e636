package upstream

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// script answers the n-th request of the conn-th connection, both from 1, and
// says whether the connection goes on.
type script func(c net.Conn, conn, n int, body string) bool

// scripted is a server that says exactly what its script does, byte by byte.
type scripted struct {
	net.Listener
	conns atomic.Int64 // accepted
	open  atomic.Int64 // of them, not yet closed by either side
}

func newScripted(t *testing.T, answer script) *scripted {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &scripted{Listener: ln}
	var all sync.WaitGroup
	t.Cleanup(func() { _ = ln.Close(); all.Wait() })
	all.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			conn := int(s.conns.Add(1))
			s.open.Add(1)
			all.Go(func() {
				defer s.open.Add(-1)
				defer func() { _ = c.Close() }()
				in := bufio.NewReader(c)
				for n := 1; ; n++ {
					r, err := http.ReadRequest(in)
					if err != nil {
						return
					}
					body, err := io.ReadAll(r.Body)
					if err != nil || !answer(c, conn, n, string(body)) {
						return
					}
				}
			})
		}
	})
	return s
}

func say(c net.Conn, text string) { _, _ = io.WriteString(c, text) }

const hello = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"

// client makes a client of s. Its connections are closed at the end of the test.
func (s *scripted) client(t *testing.T) *http1 {
	t.Helper()
	h := newHTTP1(newTransport(nil, nil, "", time.Second, 8), s.Addr().String())
	t.Cleanup(h.CloseIdleConnections)
	return h
}

func (s *scripted) request(ctx context.Context, body string, header http.Header) *http.Request {
	u := &url.URL{Scheme: "http", Host: s.Addr().String(), Path: "/v1/chat/completions"}
	if header == nil {
		header = http.Header{}
	}
	return (&http.Request{
		Method: http.MethodPost, URL: u, Host: u.Host, Header: header, ContentLength: int64(len(body)),
		Body: io.NopCloser(strings.NewReader(body)),
	}).WithContext(ctx)
}

// ask gives the whole answer.
func (s *scripted) ask(t *testing.T, h *http1, body string, header http.Header) (string, error) {
	t.Helper()
	resp, err := h.RoundTrip(s.request(t.Context(), body, header))
	if err != nil {
		return "", err
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(resp.Body)
	return fmt.Sprintf("%d %s", resp.StatusCode, text), err
}

func (h *http1) kept() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.idle)
}

// TestCleanEndKeepsTheConnection: an answer that ends cleanly gives its connection back;
// in any doubt the connection is closed.
func TestCleanEndKeepsTheConnection(t *testing.T) {
	for _, tc := range []struct {
		name, answer, want string
		kept               bool
		err                error
	}{
		{"length", hello, "200 hello", true, nil},
		{"no body", "HTTP/1.1 204 No Content\r\n\r\n", "204 ", true, nil},
		{"empty", "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "200 ", true, nil},
		{"chunks", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n", "200 hello", true, nil},
		{"chunks and trailers", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-A\r\n\r\n5\r\nhello\r\n0\r\nX-A: b\r\n\r\n", "200 hello", true, nil},
		{"an error", "HTTP/1.1 500 No\r\nContent-Length: 5\r\n\r\nhello", "500 hello", true, nil},
		{"continue first", "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + hello, "200 hello", true, nil},
		{"server will close", "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello", "200 hello", false, nil},
		{"HTTP/1.0", "HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello", "200 hello", false, nil},
		{"more than it said", hello + "HTTP/1.1 200 OK", "200 hello", false, nil},
		{"only hints", strings.Repeat("HTTP/1.1 103 Early Hints\r\n\r\n", 9), "", false, errInterim},
		{"another protocol", "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", "", false, errInterim},
		{"endless header", "HTTP/1.1 200 OK\r\nX-A: " + strings.Repeat("a", maxAnswerHeader), "", false, errHeaderTooLong},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newScripted(t, func(c net.Conn, _, _ int, body string) bool {
				if body != "question" {
					t.Errorf("the server got %q", body)
				}
				say(c, tc.answer)
				return true
			})
			h := s.client(t)
			for range 2 {
				got, err := s.ask(t, h, "question", nil)
				if !errors.Is(err, tc.err) || got != tc.want {
					t.Errorf("got %q, %v", got, err)
				}
			}
			want := int64(2)
			if tc.kept {
				want = 1
			}
			if got := s.conns.Load(); got != want {
				t.Errorf("%d connections, want %d", got, want)
			}
			if tc.kept != (h.kept() == 1) {
				t.Errorf("%d are kept", h.kept())
			}
		})
	}
}

// TestEndOfTheConnectionIsTheEnd: an answer that is not whole is an error.
func TestEndOfTheConnectionIsTheEnd(t *testing.T) {
	for name, tc := range map[string]struct {
		answer string
		err    error
	}{
		"shorter than it said": {"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhello", io.ErrUnexpectedEOF},
		"no last chunk":        {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", io.ErrUnexpectedEOF},
		"no length":            {"HTTP/1.1 200 OK\r\n\r\nhello", nil},
	} {
		s := newScripted(t, func(c net.Conn, _, _ int, _ string) bool { say(c, tc.answer); return false })
		h := s.client(t)
		got, err := s.ask(t, h, "question", nil)
		if !errors.Is(err, tc.err) || got != "200 hello" || h.kept() != 0 {
			t.Errorf("%s: got %q, %v, kept %d", name, got, err, h.kept())
		}
	}
}

// TestKeptConnectionThatWasClosed: a request is sent again when the server has closed a
// kept connection. When it did so while the request was on its way, that is for requests
// only that may be sent twice, and never after a byte of an answer.
func TestKeptConnectionThatWasClosed(t *testing.T) {
	twice := http.Header{"X-Idempotency-Key": {}}
	for _, tc := range []struct {
		name   string
		again  string // what the first connection says to a second request
		closes bool   // the first connection, after its first answer
		header http.Header
		want   string
		fails  bool
	}{
		{name: "while idle", closes: true, want: "200 hello"},
		{name: "on the way", header: twice, want: "200 hello"},
		{name: "on the way, once only", fails: true},
		{name: "in the header", header: twice, again: "HTTP/1.1 200 OK\r\nContent", fails: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newScripted(t, func(c net.Conn, conn, n int, _ string) bool {
				if conn == 1 && n == 2 {
					say(c, tc.again)
					return false
				}
				say(c, hello)
				return !tc.closes
			})
			h := s.client(t)
			if got, err := s.ask(t, h, "question", nil); err != nil || got != "200 hello" {
				t.Fatalf("got %q, %v", got, err)
			}
			if tc.closes {
				eventually(t, "the server to close", func() bool { return s.open.Load() == 0 })
			}
			got, err := s.ask(t, h, "question", tc.header)
			if got != tc.want || (err != nil) != tc.fails {
				t.Errorf("got %q, %v", got, err)
			}
		})
	}
}

// TestUnsolicitedAnswer: what a server sends on an idle connection (many send 408) is no
// answer to the next request.
func TestUnsolicitedAnswer(t *testing.T) {
	more := make(chan struct{})
	said := make(chan struct{})
	s := newScripted(t, func(c net.Conn, conn, _ int, _ string) bool {
		say(c, hello)
		if conn == 1 {
			<-more
			say(c, "HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n")
			close(said)
		}
		return true
	})
	h := s.client(t)
	for i := range 2 {
		if got, err := s.ask(t, h, "question", nil); err != nil || got != "200 hello" {
			t.Errorf("got %q, %v", got, err)
		}
		if i == 0 {
			close(more)
			<-said
		}
	}
	if s.conns.Load() != 2 {
		t.Errorf("%d connections", s.conns.Load())
	}
}

// TestCancel: the connection is closed at once when the request is cancelled, while its
// answer is waited for and also while nothing reads it.
func TestCancel(t *testing.T) {
	errEnough := errors.New("enough")
	for name, begun := range map[string]bool{"before the answer": false, "in its middle": true} {
		t.Run(name, func(t *testing.T) {
			asked := make(chan struct{})
			s := newScripted(t, func(c net.Conn, _, _ int, _ string) bool {
				if begun {
					say(c, "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello")
				}
				close(asked)
				return true // reads on, and sees the end
			})
			h := s.client(t)
			ctx, cancel := context.WithCancelCause(t.Context())
			defer cancel(nil)
			if !begun {
				go func() { <-asked; cancel(errEnough) }()
			}
			resp, err := h.RoundTrip(s.request(ctx, "question", nil))
			if begun {
				if err != nil {
					t.Fatal(err)
				}
				cancel(errEnough)
			} else if !errors.Is(err, errEnough) {
				t.Errorf("error %v", err)
			}
			eventually(t, "the connection to be closed", func() bool { return s.open.Load() == 0 })
			if begun {
				if _, err := io.ReadAll(resp.Body); err == nil {
					t.Error("the answer seems whole")
				}
				if err := resp.Body.Close(); err != nil {
					t.Error(err)
				}
			}
			if h.kept() != 0 {
				t.Errorf("%d are kept", h.kept())
			}
		})
	}
}

// TestCloseBeforeTheEnd: closing a body in its middle closes the connection.
func TestCloseBeforeTheEnd(t *testing.T) {
	s := newScripted(t, func(c net.Conn, _, _ int, _ string) bool {
		say(c, "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello")
		return true
	})
	h := s.client(t)
	resp, err := h.RoundTrip(s.request(t.Context(), "question", nil))
	if err != nil {
		t.Fatal(err)
	}
	if err := resp.Body.Close(); err != nil {
		t.Error(err)
	}
	eventually(t, "the connection to be closed", func() bool { return s.open.Load() == 0 })
	if h.kept() != 0 {
		t.Errorf("%d are kept", h.kept())
	}
}

// TestIdleConnectionsEnd: by their age, by their number, and when asked.
func TestIdleConnectionsEnd(t *testing.T) {
	both := make(chan struct{}, 2)
	s := newScripted(t, func(c net.Conn, _, _ int, body string) bool {
		if body == "together" {
			both <- struct{}{}
			eventually(t, "both to come", func() bool { return len(both) == 2 })
		}
		say(c, hello)
		return true
	})
	h := s.client(t)
	h.MaxIdleConnsPerHost = 1
	var all sync.WaitGroup
	for range 2 {
		all.Go(func() {
			if _, err := s.ask(t, h, "together", nil); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	eventually(t, "one of two to be closed", func() bool { return s.open.Load() == 1 && h.kept() == 1 })
	h.CloseIdleConnections()
	eventually(t, "the other to be closed", func() bool { return s.open.Load() == 0 && h.kept() == 0 })

	h.IdleConnTimeout = 20 * time.Millisecond
	if _, err := s.ask(t, h, "alone", nil); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the old one to be closed", func() bool { return s.open.Load() == 0 && h.kept() == 0 })
}

// TestLargeBody goes through http.Transport: the refusal of a server that hasn't read it
// arrives.
func TestLargeBody(t *testing.T) {
	s := newServer(t, "up", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusRequestEntityTooLarge) })
	h := newHTTP1(newTransport(nil, nil, "", time.Second, 8), s.Listener.Addr().String())
	defer h.CloseIdleConnections()
	large := &scripted{Listener: s.Listener}
	got, err := large.ask(t, h, strings.Repeat("a", http1Inline+1), nil)
	if err != nil || got != "413 " || h.kept() != 0 {
		t.Errorf("got %q, %v, kept %d", got, err, h.kept())
	}
}

func TestAddressOfAHost(t *testing.T) {
	for host, want := range map[string]string{
		"vllm": "vllm:80", "vllm:8000": "vllm:8000", "vllm:": "vllm:80", "10.0.0.1": "10.0.0.1:80", "[::1]": "[::1]:80", "[::1]:81": "[::1]:81",
		"bücher.example": "", "[fe80::1%25eth0]:80": "",
	} {
		if got := newHTTP1(nil, host).addr; got != want {
			t.Errorf("%s: %q, want %q", host, got, want)
		}
	}
}

// TestRequestIsReadAsWritten: what is accepted is read back as exactly one request; what
// would be read as something else is refused.
func TestRequestIsReadAsWritten(t *testing.T) {
	value := rapid.OneOf(rapid.StringMatching(`[ -~]{0,20}`), rapid.String(), rapid.SampledFrom([]string{"a\r\nX-Evil: 1", "a\nb", "a\rb", "\x00", "tab\there"}))
	rapid.Check(t, func(t *rapid.T) {
		header := http.Header{"X-A": rapid.SliceOfN(value, 0, 3).Draw(t, "values"), "User-Agent": {value.Draw(t, "agent")}, "Content-Length": {"3"}, "Transfer-Encoding": {"chunked"}}
		body := rapid.SliceOfN(rapid.Byte(), 0, 50).Draw(t, "body")
		req := &http.Request{
			Method: http.MethodPost, URL: &url.URL{Scheme: "http", Host: "x", Path: "/" + value.Draw(t, "path")}, Header: header,
			ContentLength: int64(len(body)), Body: io.NopCloser(bytes.NewReader(body)),
		}
		text, err := appendRequest(nil, req)
		if err != nil {
			for _, v := range append(header["X-A"], header["User-Agent"]...) {
				if !writable(v) {
					return
				}
			}
			t.Fatalf("refused: %v", err)
		}
		in := bufio.NewReader(bytes.NewReader(text))
		got, err := http.ReadRequest(in)
		if err != nil {
			t.Fatalf("%q can't be read: %v", text, err)
		}
		read, err := io.ReadAll(got.Body)
		if err != nil || !bytes.Equal(read, body) || in.Buffered() != 0 {
			t.Fatalf("body %q, %v, %d bytes more, want %q", read, err, in.Buffered(), body)
		}
		if len(got.Header) > 3 || got.Host != "x" || got.URL.Path != req.URL.Path {
			t.Fatalf("read back as %s %v", got.URL, got.Header)
		}
		for i, v := range header["X-A"] {
			if strings.ContainsAny(v, "\r\n\x00") || strings.Trim(v, " \t") != got.Header["X-A"][i] {
				t.Fatalf("value %q came as %q", v, got.Header["X-A"][i])
			}
		}
	})
}

// TestManyAtOnce: while requests are cancelled at any time, each one gets its own answer.
func TestManyAtOnce(t *testing.T) {
	s := newScripted(t, func(c net.Conn, conn, n int, body string) bool {
		say(c, fmt.Sprintf("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n", len(body), body))
		say(c, "0\r\n\r\n")
		return (conn+n)%7 != 0
	})
	h := s.client(t)
	h.MaxIdleConnsPerHost = 4
	var all sync.WaitGroup
	for i := range 16 {
		all.Go(func() {
			random := rand.New(rand.NewPCG(uint64(i), 1))
			for n := range 50 {
				ctx, cancel := context.WithCancel(t.Context())
				off := random.IntN(4) == 0
				if off {
					time.AfterFunc(time.Duration(random.IntN(300))*time.Microsecond, cancel)
				}
				question := fmt.Sprintf("question %d of %d", n, i)
				resp, err := h.RoundTrip(s.request(ctx, question, http.Header{"X-Idempotency-Key": {}}))
				if err == nil {
					var text []byte
					text, err = io.ReadAll(resp.Body)
					if err == nil && string(text) != question {
						t.Errorf("%q was answered with %q", question, text)
					}
					_ = resp.Body.Close()
				}
				if err != nil && !off {
					t.Errorf("%s: %v", question, err)
				}
				cancel()
			}
		})
	}
	all.Wait()
	if h.kept() > 4 {
		t.Errorf("%d are kept", h.kept())
	}
}
