package gateway

import (
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/node/serving"
	"github.com/dsnode/dsnode/node/upstream"
)

var benchBody = []byte(`{"model":"deepseek-chat","messages":[{"role":"system","content":"You are a helpful assistant, brief and kind."},` +
	`{"role":"user","content":"` + strings.Repeat("tell me more ", 14) + `"}],"temperature":0.7,"stream":false}`)

// BenchmarkProxied compares a plain completion direct, through a tuned Go
// reverse proxy, and through gateway and pipeline. All run in this process:
// subtract direct's cpu-µs/op to see what each hop costs.
func BenchmarkProxied(b *testing.B) {
	answer := []byte(`{"id":"chatcmpl-1","object":"chat.completion","created":1,"model":"m","choices":[{"index":0,"message":{"role":"assistant","content":"` +
		strings.Repeat("word ", 170) + `"},"finish_reason":"stop"}],"usage":{"prompt_tokens":9,"completion_tokens":12,"total_tokens":21}}`)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		w.Header()["Content-Type"] = jsonType
		_, _ = w.Write(answer)
	}))
	defer server.Close()
	to, err := url.Parse(server.URL)
	if err != nil {
		b.Fatal(err)
	}
	proxy := httptest.NewServer(&httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(to) },
		Transport: &http.Transport{
			DialContext: (&net.Dialer{}).DialContext, MaxIdleConnsPerHost: 1024, DisableCompression: true,
		},
	})
	defer proxy.Close()

	cfg := &config.Config{
		Version: 1, Sites: map[string]config.Site{"here": {City: "x", Priority: 1}}, Limits: config.DefaultLimits(), Timeouts: config.DefaultTimeouts(),
		Upstreams: map[string]config.Upstream{"up": {Site: "here", Kind: config.KindVLLM, URL: server.URL + "/v1"}},
		Models:    map[string]config.Model{"deepseek-chat": {Serve: []config.Serve{{Upstream: "up"}}}},
	}
	fleet := upstream.New(upstream.Options{Site: "here"})
	if err := fleet.Configure(cfg); err != nil {
		b.Fatal(err)
	}
	defer fleet.Close()
	g := New(Options{
		Server: serving.New(serving.Options{Fleet: fleet}), Config: func() *config.Config { return cfg }, Auth: keys{}, Health: healthFunc(func() Report { return Report{} }),
		Site: "here", Node: "here-1", Registerer: prometheus.NewRegistry(),
	})
	handler := httptest.NewServer(g)
	defer handler.Close()

	for name, url := range map[string]string{"direct": server.URL, "reverseproxy": proxy.URL, "gateway": handler.URL} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 1024, DisableCompression: true}}
			defer client.CloseIdleConnections()
			before := cpuTime(b)
			b.SetParallelism(16)
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					resp, err := client.Post(url+"/v1/chat/completions", "application/json", strings.NewReader(string(benchBody)))
					if err != nil {
						b.Error(err)
						return
					}
					if n, err := io.Copy(io.Discard, resp.Body); err != nil || n != int64(len(answer)) {
						b.Errorf("%d bytes, %v", n, err)
					}
					_ = resp.Body.Close()
				}
			})
			b.ReportMetric(float64(cpuTime(b)-before)/float64(time.Microsecond)/float64(b.N), "cpu-µs/op")
		})
	}
}

func cpuTime(b *testing.B) time.Duration {
	b.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
