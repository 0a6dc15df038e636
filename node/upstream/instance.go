package upstream

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"sync/atomic"
	"time"

	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/cluster/host"
	"github.com/dsnode/dsnode/node/openai"
)

const (
	defaultConcurrency = 256
	// maxAnswerHeader bounds the header of an upstream's answer.
	maxAnswerHeader = 64 << 10
)

// instance is one model server of the own site: what a configured upstream's URL
// names, or one of the servers that were discovered for it.
type instance struct {
	backend
	def       config.Upstream
	connect   time.Duration
	material  [sha256.Size]byte // of its TLS files
	base      baseURL
	urls      map[string]*url.URL // of all endpoints, made once
	transport *http1
	client    http.RoundTripper // the transport, or a test's
	key       atomic.Pointer[string]
	noUsage   atomic.Bool // it refused stream_options once
	broken    error       // its files or URL are unusable: never asked
	probed    atomic.Pointer[probe]
	compared  atomic.Bool // some model has other instances to choose from
	reported  atomic.Pointer[report]
}

// probe is what the last probe brought.
type probe struct {
	at    time.Time
	err   error // nil: it answered
	fails int   // in a row
}

// newInstance makes an instance; unreadable is why its TLS files could not be read.
func newInstance(on *host.Host, name, address string, def config.Upstream, connect time.Duration, files config.TLSMaterial, unreadable error) *instance {
	i := &instance{def: def, connect: connect, material: digest(files)}
	i.name, i.address, i.site = name, address, def.Site
	i.hash, i.max = hashName(name+address), int64(def.MaxConcurrency)
	if i.max <= 0 {
		i.max = defaultConcurrency
	}
	i.base, i.broken = parseBase(def.URL)
	if i.broken != nil {
		return i
	}
	i.base.host = identity(i.base.host)
	i.urls = make(map[string]*url.URL, len(openai.Endpoints))
	for _, e := range openai.Endpoints {
		i.urls[e.Path] = i.base.join(e.Path)
	}
	var conf *tls.Config
	conf, i.broken = def.TLS.Client(files)
	i.broken = cmp.Or(unreadable, i.broken)
	i.transport = newHTTP1(newTransport(on, conf, address, connect, int(i.max)), i.base.host)
	i.client = i.transport
	return i
}

// newTransport is tuned like a reverse proxy: many idle connections, nothing
// decompressed, HTTP/1.1 (on HTTP/2 a stream that stalls can stall the other streams
// of its connection by flow control). An address, unless empty, is where all
// connections go; the Host header and the name to be proved stay the URL's.
func newTransport(on *host.Host, conf *tls.Config, address string, connect time.Duration, idle int) *http.Transport {
	dial := on.Dialer(&net.Dialer{
		Timeout: connect,
		// A machine that died is noticed after 15 s + 3 × 5 s.
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 15 * time.Second, Interval: 5 * time.Second, Count: 3},
		Control:         boundUnacknowledged,
	})
	if address != "" {
		anywhere := dial
		dial = func(ctx context.Context, network, _ string) (net.Conn, error) {
			return anywhere(ctx, network, address)
		}
	}
	return &http.Transport{
		DialContext:         dial,
		TLSClientConfig:     conf,
		TLSHandshakeTimeout: connect,
		MaxIdleConnsPerHost: idle,
		// Below the 5 s of uvicorn, which vLLM and SGLang use: a request that is
		// sent on a connection that the server is just closing fails.
		IdleConnTimeout:        4 * time.Second,
		DisableCompression:     true,
		MaxResponseHeaderBytes: maxAnswerHeader,
		WriteBufferSize:        16 << 10,
		ReadBufferSize:         16 << 10,
	}
}

func digest(m config.TLSMaterial) [sha256.Size]byte {
	return sha256.Sum256(bytes.Join([][]byte{m.CA, m.Cert, m.Key}, []byte{0}))
}

func (i *instance) url(endpoint string) *url.URL {
	if to := i.urls[endpoint]; to != nil {
		return to
	}
	return i.base.join(endpoint)
}

var errNoKey = errors.New("api key can't be resolved")

// refreshKey resolves the API key again: files change. When it can't be resolved the
// known key stays.
func (i *instance) refreshKey(lookupEnv func(string) (string, bool), readFile func(string) ([]byte, error)) error {
	if i.def.APIKey.IsZero() {
		return nil
	}
	key, err := config.ResolveSecret(i.def.APIKey, lookupEnv, readFile)
	if err != nil {
		return fmt.Errorf("%w: %w", errNoKey, err)
	}
	bearer := "Bearer " + key
	if old := i.key.Load(); old == nil || *old != bearer {
		i.key.Store(&bearer)
	}
	return nil
}

// keyRefused reads a key again that the server refused: it may have changed.
func (f *Fleet) keyRefused(i *instance) {
	if err := i.refreshKey(f.o.LookupEnv, f.o.ReadFile); err != nil {
		f.log.Error("upstream refused its api key, and the key can't be read again", append(i.logAttrs(), "err", err)...)
		return
	}
	f.log.Error("upstream refused its api key or has no money left; check api_key", i.logAttrs()...)
}

// logAttrs name the instance in the log.
func (i *instance) logAttrs() []any {
	if i.address == "" {
		return []any{"upstream", i.name}
	}
	return []any{"upstream", i.name, "instance", i.address}
}

// usable reports whether the instance may be asked at all. While its key can't be
// read, no request is sent without one.
func (i *instance) usable() bool {
	return i.broken == nil && (i.def.APIKey.IsZero() || i.key.Load() != nil)
}

// answersProbes reports that its probes don't speak against waiting for the
// instance: they answer, or are not known.
func (i *instance) answersProbes() bool {
	p := i.probed.Load()
	return p == nil || p.fails < probesToDie || i.goodSince(p.at)
}

// probeFails reports that the last probe failed and that no request succeeded since.
func (i *instance) probeFails() bool {
	p := i.probed.Load()
	return p != nil && p.err != nil && !i.goodSince(p.at)
}
