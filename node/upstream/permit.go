package upstream

import (
	"context"
	"net/http"
	"net/url"
	"time"

	"github.com/dsnode/dsnode/cluster/config"
)

// Permit is the right to send one request to one server, and what must be known of
// the server for that. It goes back once, by Done or Withdraw.
type Permit struct {
	Upstream string // name in the configuration; "peer/SITE" of a peer
	Site     string
	Instance string // host:port of a discovered instance, empty otherwise
	Peer     string // the peer's node name; empty for a server of the own site
	Model    *Model // that is asked for: the request's, or a fallback
	// ServedAs is the quoted name that the server knows the model by, nil when that
	// is the model's own. A peer knows the model's own.
	ServedAs []byte
	Timeouts config.Timeouts

	fleet    *Fleet
	backend  *backend
	trial    bool
	client   http.RoundTripper
	instance *instance       // nil of a peer
	lost     context.Context // of a peer
}

// RoundTrip sends the request.
func (p *Permit) RoundTrip(req *http.Request) (*http.Response, error) { return p.client.RoundTrip(req) }

// URL is where the server has an endpoint. A peer's host is ignored by its client.
func (p *Permit) URL(endpoint string) *url.URL {
	if p.instance == nil {
		return &url.URL{Scheme: "http", Host: p.Peer, Path: endpoint}
	}
	return p.instance.url(endpoint)
}

// Authorization is the header's value, empty when the server needs none.
func (p *Permit) Authorization() string {
	if p.instance == nil {
		return ""
	}
	if key := p.instance.key.Load(); key != nil {
		return *key
	}
	return ""
}

// RefusesUsage reports that the server once refused stream_options.
func (p *Permit) RefusesUsage() bool { return p.instance != nil && p.instance.noUsage.Load() }

// UsageRefused notes that the server refused stream_options. It is false when that
// was known.
func (p *Permit) UsageRefused() bool { return p.instance != nil && !p.instance.noUsage.Swap(true) }

// Alive reports that nothing speaks against waiting for the server: its probes
// answer, or are not known. A peer's loss shows in Lost.
func (p *Permit) Alive() bool { return p.instance == nil || p.instance.answersProbes() }

// Lost ends when the peer is lost; nil of a server of the own site.
func (p *Permit) Lost() context.Context { return p.lost }

// Content tells that the server has shown content.
func (p *Permit) Content() {
	if p.trial {
		p.trial = false
		p.backend.trialSucceeded(p.fleet.o.Now())
	}
}

// Done gives the permit back with what came of it. latency is the time to the
// first content, zero when there was none.
func (p *Permit) Done(o Outcome, latency time.Duration) {
	p.backend.leave(p.fleet.o.Now(), p.trial, o, latency)
	if o.Result == Credentials && p.instance != nil {
		p.fleet.keyRefused(p.instance)
	}
}

// Withdraw gives the permit back unused.
func (p *Permit) Withdraw() { p.backend.withdraw(p.trial) }

// Broken reports whether the server's breaker is open now.
func (p *Permit) Broken() bool { return p.backend.open(p.fleet.o.Now()) }
