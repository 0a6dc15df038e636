package serving

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"sync/atomic"
	"time"

	"github.com/dsnode/dsnode/cluster"
)

const defaultConcurrency = 256

// upstream is one model server of the own site.
type upstream struct {
	backend
	def       cluster.Upstream
	connect   time.Duration
	base      baseURL
	urls      map[string]*url.URL // of the usual endpoints, made once
	transport *http.Transport
	client    http.RoundTripper // the transport, or a test's
	key       atomic.Pointer[string]
	drained   atomic.Bool
	noUsage   atomic.Bool // it refused stream_options once
	broken    error       // its files or URL are unusable: never asked
	probed    atomic.Pointer[probe]
}

// probe is what the last cheap request for a sign of life gave.
type probe struct {
	at  time.Time
	err error // nil: it answered
}

var usualEndpoints = []string{"/v1/chat/completions", "/v1/completions", "/v1/embeddings"}

func newUpstream(name string, def cluster.Upstream, connect time.Duration, readFile func(string) ([]byte, error)) *upstream {
	u := &upstream{def: def, connect: connect}
	u.name, u.site, u.max = name, def.Site, int64(def.MaxConcurrency)
	if u.max <= 0 {
		u.max = defaultConcurrency
	}
	u.base, u.broken = parseBase(def.URL)
	if u.broken != nil {
		return u
	}
	u.urls = make(map[string]*url.URL, len(usualEndpoints))
	for _, e := range usualEndpoints {
		u.urls[e] = u.base.join(e)
	}
	var conf *tls.Config
	conf, u.broken = upstreamTLS(def.TLS, readFile)
	u.transport = newTransport(conf, connect, int(u.max))
	u.client = u.transport
	return u
}

// newTransport is tuned like a reverse proxy: many idle connections, nothing
// decompressed, HTTP/1.1 (a stream that stalls on HTTP/2 takes its neighbours'
// flow control with it).
func newTransport(conf *tls.Config, connect time.Duration, idle int) *http.Transport {
	dialer := &net.Dialer{
		Timeout: connect,
		// A server whose machine died says nothing: 15 s + 3 × 5 s.
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 15 * time.Second, Interval: 5 * time.Second, Count: 3},
		Control:         boundUnacknowledged,
	}
	return &http.Transport{
		DialContext:         dialer.DialContext,
		TLSClientConfig:     conf,
		TLSHandshakeTimeout: connect,
		MaxIdleConnsPerHost: idle,
		// Below the 5 s of uvicorn, which vLLM and SGLang stand on: a request
		// sent on a connection that is just being closed is a failure for nothing.
		IdleConnTimeout:        4 * time.Second,
		DisableCompression:     true,
		MaxResponseHeaderBytes: 64 << 10,
		WriteBufferSize:        16 << 10,
		ReadBufferSize:         16 << 10,
	}
}

func upstreamTLS(t cluster.UpstreamTLS, readFile func(string) ([]byte, error)) (*tls.Config, error) {
	conf := &tls.Config{
		MinVersion:         tls.VersionTLS12,
		ServerName:         t.ServerName,
		InsecureSkipVerify: t.InsecureSkipVerify, //nolint:gosec // the operator wrote it
	}
	if t.CAFile != "" {
		pem, err := readFile(t.CAFile)
		if err != nil {
			return conf, fmt.Errorf("read ca_file: %w", err)
		}
		conf.RootCAs = x509.NewCertPool()
		if !conf.RootCAs.AppendCertsFromPEM(pem) {
			return conf, fmt.Errorf("ca_file %s holds no certificate in PEM", t.CAFile)
		}
	}
	if t.CertFile == "" {
		return conf, nil
	}
	cert, err := readFile(t.CertFile)
	if err != nil {
		return conf, fmt.Errorf("read cert_file: %w", err)
	}
	key, err := readFile(t.KeyFile)
	if err != nil {
		return conf, fmt.Errorf("read key_file: %w", err)
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return conf, fmt.Errorf("cert_file and key_file: %w", err)
	}
	conf.Certificates = []tls.Certificate{pair}
	return conf, nil
}

func (u *upstream) url(endpoint string) *url.URL {
	if to := u.urls[endpoint]; to != nil {
		return to
	}
	return u.base.join(endpoint)
}

var errNoKey = errors.New("api key can't be resolved")

// refreshKey resolves the api key again: files change.
func (u *upstream) refreshKey(lookupEnv func(string) (string, bool), readFile func(string) ([]byte, error)) error {
	if u.def.APIKey.IsZero() {
		return nil
	}
	key, err := cluster.ResolveSecret(u.def.APIKey, lookupEnv, readFile)
	if err != nil {
		return fmt.Errorf("%w: %w", errNoKey, err) // the key known so far stays
	}
	bearer := "Bearer " + key
	if old := u.key.Load(); old == nil || *old != bearer {
		u.key.Store(&bearer)
	}
	return nil
}

// usable reports whether the upstream may be asked at all. A key that was
// never readable is no reason to send requests without one.
func (u *upstream) usable() bool {
	return u.broken == nil && !u.drained.Load() && (u.def.APIKey.IsZero() || u.key.Load() != nil)
}

// probeFails reports that the last probe failed and that no real request went
// well since.
func (u *upstream) probeFails() bool {
	p := u.probed.Load()
	return p != nil && p.err != nil && !u.goodSince(p.at)
}
