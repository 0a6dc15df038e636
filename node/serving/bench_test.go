package serving

import (
	"bytes"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/node/cache"
	"github.com/dsnode/dsnode/node/upstream"
)

// canned is a server in this process, so that only the pipeline is measured.
type canned struct {
	kind string
	body []byte
}

func (c *canned) RoundTrip(*http.Request) (*http.Response, error) {
	return &http.Response{
		StatusCode: 200, Header: http.Header{"Content-Type": {c.kind}},
		ContentLength: int64(len(c.body)), Body: io.NopCloser(bytes.NewReader(c.body)),
	}, nil
}

type nowhere struct{ bytes int64 }

func (*nowhere) Head(Head) error { return nil }
func (n *nowhere) Data(b []byte) error {
	n.bytes += int64(len(b))
	return nil
}

func cannedPipeline(b *testing.B, conf *config.Config, c *canned, kept *cache.Cache) *Pipeline {
	fleet := upstream.New(upstream.Options{Site: "east", Transport: func(string) http.RoundTripper { return c }})
	if err := fleet.Configure(conf); err != nil {
		b.Fatal(err)
	}
	return New(Options{Fleet: fleet, Cache: kept})
}

func benchmark(b *testing.B, upstreams int, c *canned, req Request) {
	conf := &config.Config{Sites: map[string]config.Site{"east": {}}, Upstreams: map[string]config.Upstream{}}
	m := config.Model{}
	for i := range upstreams {
		name := string(rune('a' + i))
		conf.Upstreams[name] = config.Upstream{Site: "east", URL: "http://x/v1"}
		m.Serve = append(m.Serve, config.Serve{Upstream: name})
	}
	conf.Models = map[string]config.Model{"m": m}
	p := cannedPipeline(b, conf, c, nil)
	b.ReportAllocs()
	sink := &nowhere{}
	for b.Loop() {
		if err := p.Serve(b.Context(), req, sink); err != nil {
			b.Fatal(err)
		}
	}
	if sink.bytes == 0 {
		b.Fatal("nothing came")
	}
}

func BenchmarkServePlain(b *testing.B) {
	body := strings.Replace(plainBody, "hello", strings.Repeat("word ", 160), 1)
	benchmark(b, 1, &canned{"application/json", []byte(body)}, chat(false))
}

func BenchmarkServePlainOfThree(b *testing.B) {
	body := strings.Replace(plainBody, "hello", strings.Repeat("word ", 160), 1)
	benchmark(b, 3, &canned{"application/json", []byte(body)}, chat(false))
}

func BenchmarkServeStream50(b *testing.B) {
	text := roleChunk + strings.Repeat(delta("word "), 50) + finishChunk + usageChunk + doneChunk
	benchmark(b, 1, &canned{"text/event-stream", []byte(text)}, chat(true))
}
