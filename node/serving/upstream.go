package serving

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"sync/atomic"
	"time"

	"github.com/dsnode/dsnode/cluster/config"
)

const (
	defaultConcurrency = 256
	// maxAnswerHeader bounds the header of an upstream's answer.
	maxAnswerHeader = 64 << 10
)

// upstream is one model server of the own site: what a configured upstream's
// URL says, or one of the instances that were discovered for it.
type upstream struct {
	backend
	def       config.Upstream
	connect   time.Duration
	material  [sha256.Size]byte // of its TLS files
	base      baseURL
	urls      map[string]*url.URL // of the usual endpoints, made once
	transport *http1
	client    http.RoundTripper // the transport, or a test's
	key       atomic.Pointer[string]
	noUsage   atomic.Bool // it refused stream_options once
	broken    error       // its files or URL are unusable: never asked
	probed    atomic.Pointer[probe]
	rivals    atomic.Bool // some model has others to choose from
	reported  atomic.Pointer[report]
}

// probe is what the last cheap request for a sign of life gave.
type probe struct {
	at    time.Time
	err   error // nil: it answered
	fails int   // in a row
}

var usualEndpoints = []string{"/v1/chat/completions", "/v1/completions", "/v1/embeddings"}

// newUpstream makes an upstream; unreadable is why its files could not be read.
func newUpstream(name, address string, def config.Upstream, connect time.Duration, files material, unreadable error) *upstream {
	u := &upstream{def: def, connect: connect, material: files.digest()}
	u.name, u.address, u.site = name, address, def.Site
	u.hash, u.max = hashName(name+address), int64(def.MaxConcurrency)
	if u.max <= 0 {
		u.max = defaultConcurrency
	}
	u.base, u.broken = parseBase(def.URL)
	if u.broken != nil {
		return u
	}
	u.base.host = identity(u.base.host)
	u.urls = make(map[string]*url.URL, len(usualEndpoints))
	for _, e := range usualEndpoints {
		u.urls[e] = u.base.join(e)
	}
	var conf *tls.Config
	conf, u.broken = files.tls(def.TLS)
	u.broken = cmp.Or(unreadable, u.broken)
	u.transport = newHTTP1(newTransport(conf, address, connect, int(u.max)), u.base.host)
	u.client = u.transport
	return u
}

// newTransport is tuned like a reverse proxy: many idle connections, nothing
// decompressed, HTTP/1.1 (a stream that stalls on HTTP/2 takes its neighbours'
// flow control with it). With an address, that is where all connections go; the
// Host header and the name to be proved are the URL's all the same.
func newTransport(conf *tls.Config, address string, connect time.Duration, idle int) *http.Transport {
	dialer := &net.Dialer{
		Timeout: connect,
		// A server whose machine died says nothing: 15 s + 3 × 5 s.
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 15 * time.Second, Interval: 5 * time.Second, Count: 3},
		Control:         boundUnacknowledged,
	}
	dial := dialer.DialContext
	if address != "" {
		dial = func(ctx context.Context, network, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, network, address)
		}
	}
	return &http.Transport{
		DialContext:         dial,
		TLSClientConfig:     conf,
		TLSHandshakeTimeout: connect,
		MaxIdleConnsPerHost: idle,
		// Below the 5 s of uvicorn, which vLLM and SGLang stand on: a request
		// sent on a connection that is just being closed is a failure for nothing.
		IdleConnTimeout:        4 * time.Second,
		DisableCompression:     true,
		MaxResponseHeaderBytes: maxAnswerHeader,
		WriteBufferSize:        16 << 10,
		ReadBufferSize:         16 << 10,
	}
}

// material are the files of an upstream's TLS settings, as they are now.
type material struct{ ca, cert, key []byte }

func readMaterial(t config.UpstreamTLS, readFile func(string) ([]byte, error)) (m material, err error) {
	for _, f := range []struct {
		name, path string
		to         *[]byte
	}{{"ca_file", t.CAFile, &m.ca}, {"cert_file", t.CertFile, &m.cert}, {"key_file", t.KeyFile, &m.key}} {
		if f.path == "" {
			continue
		}
		if *f.to, err = readFile(f.path); err != nil {
			return m, fmt.Errorf("read %s: %w", f.name, err)
		}
	}
	return m, nil
}

func (m material) digest() [sha256.Size]byte {
	return sha256.Sum256(bytes.Join([][]byte{m.ca, m.cert, m.key}, []byte{0}))
}

func (m material) tls(t config.UpstreamTLS) (*tls.Config, error) {
	conf := &tls.Config{
		MinVersion:         tls.VersionTLS12,
		ServerName:         t.ServerName,
		InsecureSkipVerify: t.InsecureSkipVerify, //nolint:gosec // the operator wrote it
	}
	if m.ca != nil {
		conf.RootCAs = x509.NewCertPool()
		if !conf.RootCAs.AppendCertsFromPEM(m.ca) {
			return conf, fmt.Errorf("ca_file %s holds no certificate in PEM", t.CAFile)
		}
	}
	if m.cert != nil {
		pair, err := tls.X509KeyPair(m.cert, m.key)
		if err != nil {
			return conf, fmt.Errorf("cert_file and key_file: %w", err)
		}
		conf.Certificates = []tls.Certificate{pair}
	}
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
	key, err := config.ResolveSecret(u.def.APIKey, lookupEnv, readFile)
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
	return u.broken == nil && (u.def.APIKey.IsZero() || u.key.Load() != nil)
}

// answersProbes reports that the upstream's probes say nothing against waiting
// for it: they answer, or are not known.
func (u *upstream) answersProbes() bool {
	p := u.probed.Load()
	return p == nil || p.fails < probesToDie || u.goodSince(p.at)
}

// probeFails reports that the last probe failed and that no real request went
// well since.
func (u *upstream) probeFails() bool {
	p := u.probed.Load()
	return p != nil && p.err != nil && !u.goodSince(p.at)
}
