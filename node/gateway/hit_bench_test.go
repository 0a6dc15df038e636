package gateway

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/node/cache"
	"github.com/dsnode/dsnode/node/ports"
	"github.com/dsnode/dsnode/node/serving"
	"github.com/dsnode/dsnode/node/upstream"
	"github.com/dsnode/dsnode/storage/keyring/keyringtest"
)

// hitBody is a request of the usual size whose answer is in the cache.
var hitBody = []byte(`{"model":"deepseek-chat","stream":false,"messages":[{"role":"system","content":"You are a helpful assistant."},` +
	`{"role":"user","content":"Tell me, in about 160 words, what a quick brown fox does all day long, and why the dog is lazy."}],"temperature":0,"max_tokens":256}`)

// BenchmarkHit measures an answer from the cache: in the handler alone, and over a
// connection, beside a handler on net/http that reads the body, writes as much and
// decides nothing. The client is a few reads and writes in this process.
func BenchmarkHit(b *testing.B) {
	answer := []byte(`{"id":"chatcmpl-1","object":"chat.completion","created":1,"model":"m","choices":[{"index":0,"message":{"role":"assistant","content":"` +
		strings.Repeat("word ", 160) + `"},"finish_reason":"stop"}],"usage":{"prompt_tokens":9,"completion_tokens":12,"total_tokens":21}}`)
	reply := func(w http.ResponseWriter, r *http.Request) {
		body := make([]byte, r.ContentLength)
		_, _ = io.ReadFull(r.Body, body)
		h := w.Header()
		h["Content-Type"], h["Content-Length"] = jsonType, []string{fmt.Sprint(len(answer))}
		_, _ = w.Write(answer)
	}
	server := httptest.NewServer(http.HandlerFunc(reply))
	defer server.Close()
	bare := httptest.NewServer(http.HandlerFunc(reply))
	defer bare.Close()

	cfg := &config.Config{
		Version: 1, Sites: map[string]config.Site{"here": {City: "x", Priority: 1}}, Limits: config.DefaultLimits(), Timeouts: config.DefaultTimeouts(),
		Upstreams: map[string]config.Upstream{"up": {Site: "here", Kind: config.KindVLLM, URL: server.URL + "/v1"}},
		Models: map[string]config.Model{"deepseek-chat": {
			Serve: []config.Serve{{Upstream: "up"}},
			Cache: config.ModelCache{Enabled: true, Store: config.StoreDeterministic, LocalTTL: config.Duration(time.Hour), SharedTTL: config.Duration(time.Hour)},
		}},
	}
	state := &agreed.State{APIKeys: map[string]agreed.APIKey{}}
	key, secret := agreed.NewAPIKey("tenant", "", nil, time.Time{}, time.Now())
	state.APIKeys[key.ID] = key
	ring, _ := keyringtest.New(b, 1)
	kept, err := cache.New(cache.Options{Dir: b.TempDir(), Site: "here", Ring: ring})
	if err != nil {
		b.Fatal(err)
	}
	fleet := upstream.New(upstream.Options{Site: "here"})
	if err := fleet.Configure(cfg); err != nil {
		b.Fatal(err)
	}
	defer fleet.Close()
	g := New(Options{
		Server: serving.New(serving.Options{Fleet: fleet, Cache: kept}), Config: func() *config.Config { return cfg }, Auth: stateAuth{state}, Health: healthFunc(func() Report { return Report{} }),
		Site: "here", Node: "here-1", Registerer: prometheus.NewRegistry(),
	})
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	p := ports.New(ports.Options{Name: "client", Limit: g.Connections, WriteTolerance: 4 * time.Second})
	handler := p.Server(g, cfg.Limits.HeaderBytes, g.log)
	go func() { _ = handler.Serve(p.Listen(ln, false)) }()
	defer func() { _ = handler.Close() }()
	c := rawClient{key: secret}
	c.ask(b, ln.Addr().String(), len(answer)) // now it is kept
	c.close()

	b.Run("handler", func(b *testing.B) {
		b.ReportAllocs()
		r := httptest.NewRequest(http.MethodPost, "/v1/chat/completions", nil)
		r.Header = http.Header{"Authorization": {"Bearer " + secret}, "Content-Type": {"application/json"}, "Host": {"x"}}
		r.ContentLength = int64(len(hitBody))
		body := bytes.NewReader(hitBody)
		r.Body = io.NopCloser(body)
		w := &discard{header: http.Header{}}
		for b.Loop() {
			body.Reset(hitBody)
			clear(w.header)
			g.ServeHTTP(w, r)
		}
		if w.n < b.N*len(answer) || w.header.Get("X-Dsnode-Cache") != "hit-local" {
			b.Fatalf("%d bytes for %d requests, %v", w.n, b.N, w.header)
		}
	})
	for _, to := range []struct{ name, addr string }{{"nethttp", bare.Listener.Addr().String()}, {"gateway", ln.Addr().String()}} {
		b.Run(to.name, func(b *testing.B) {
			b.ReportAllocs()
			before := cpuTime(b)
			b.SetParallelism(16)
			b.RunParallel(func(pb *testing.PB) {
				c := rawClient{key: secret}
				defer c.close()
				for pb.Next() {
					c.ask(b, to.addr, len(answer))
				}
			})
			b.ReportMetric(float64(cpuTime(b)-before)/float64(time.Microsecond)/float64(b.N), "cpu-µs/op")
		})
	}
}

// stateAuth checks keys against the agreed state, as a node does.
type stateAuth struct{ state *agreed.State }

func (a stateAuth) Authenticate(token string, _ bool) (serving.Principal, error) {
	key, err := a.state.Authenticate(token, time.Now())
	return serving.Principal{KeyID: key.ID, Tenant: key.Tenant, Models: key.Models}, err
}

// discard is a response writer that drops what it gets.
type discard struct {
	header http.Header
	n      int
}

func (d *discard) Header() http.Header            { return d.header }
func (*discard) WriteHeader(int)                  {}
func (d *discard) Write(b []byte) (int, error)    { d.n += len(b); return len(b), nil }
func (*discard) SetReadDeadline(time.Time) error  { return nil }
func (*discard) SetWriteDeadline(time.Time) error { return nil }

// rawClient is a client on one connection that does as little as possible.
type rawClient struct {
	key     string
	conn    net.Conn
	request []byte
	answer  []byte
}

func (c *rawClient) ask(b *testing.B, addr string, length int) {
	if c.conn == nil {
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			b.Fatal(err)
		}
		c.conn, c.answer = conn, make([]byte, 8<<10)
		c.request = fmt.Appendf(nil, "POST /v1/chat/completions HTTP/1.1\r\nHost: %s\r\nContent-Type: application/json\r\nAuthorization: Bearer %s\r\nContent-Length: %d\r\n\r\n%s",
			addr, c.key, len(hitBody), hitBody)
	}
	if _, err := c.conn.Write(c.request); err != nil {
		b.Fatal(err)
	}
	n := 0
	for {
		m, err := c.conn.Read(c.answer[n:])
		n += m
		at := bytes.Index(c.answer[:n], []byte("\r\n\r\n"))
		switch {
		case err != nil:
			b.Fatal(err)
		case at < 0:
			continue
		case !bytes.HasPrefix(c.answer, []byte("HTTP/1.1 200 ")) || n > at+4+length:
			b.Fatalf("%s", c.answer[:n])
		case n == at+4+length:
			return
		}
	}
}

func (c *rawClient) close() {
	if c.conn != nil {
		_ = c.conn.Close()
	}
}
