// Package serving turns one request into one answer: it picks an upstream,
// asks it, watches it, and asks another one when that fails before the client
// has seen anything. Doors (node/gateway, the peer door, later node/jobs) call
// Pipeline.Serve; start reading there.
package serving

import (
	"context"
	"net/http"

	"github.com/dsnode/dsnode/node/openai"
)

// Request is one client call, parsed once. The pipeline never changes Body;
// what must differ upstream (the model's name, stream options) is spliced into
// a copy, so unknown members pass byte for byte.
type Request struct {
	openai.Request
	ID string // X-Request-Id
	// Header holds what goes on upstream (User-Agent, Accept …), nothing of
	// hop-by-hop or of authorisation.
	Header    http.Header
	Principal Principal
	// Cache is what the client wants of the cache, "" when it did not say.
	Cache CacheMode
	// Hops counts the peers that this request has passed; a request with one
	// hop is answered by the site's own upstreams or not at all.
	Hops int
	// RetryCount is the client's x-stainless-retry-count, for the retry budget.
	RetryCount int
}

// Principal is who asks.
type Principal struct {
	KeyID  string   `json:"key_id,omitempty"` // empty: anonymous
	Tenant string   `json:"tenant,omitempty"`
	Models []string `json:"models,omitempty"` // empty: all
}

// Head is what is known of an answer when its first content arrives.
type Head struct {
	Status   int
	Header   http.Header // Content-Type and what else is passed on; nobody changes it
	Length   int64       // -1 unknown
	Whole    bool        // the next Data is all of a plain answer
	Stream   bool
	Upstream string // name in the configuration
	Site     string // whose upstream it was
	Node     string // the peer that answered, empty when it was this node
	Attempts int    // upstream attempts, this one included; 0: nobody was asked
	// Model is the configured name that was answered for, a fallback's when one
	// stood in; "" unknown.
	Model string
	Cache Cached
}

// Sink takes an answer. Calls come from one goroutine. An error from it means
// that the client has gone: the pipeline cancels the upstream and returns it.
type Sink interface {
	// Head comes once, before any Data. Until it was called the pipeline may
	// still turn to another upstream; after it, never.
	Head(Head) error
	// Data is a piece of a plain body, or one whole SSE event with its final
	// blank line. The bytes are valid only during the call.
	Data([]byte) error
}

// Batcher is a Sink that can keep events back for a moment. What an upstream
// sent in one piece then goes to the client in one piece: on a busy machine
// several events share a write. No event is kept while another is waited for.
type Batcher interface {
	Sink
	// Hold is Data for an event; Flush, or a Data, comes soon.
	Hold([]byte) error
	// Flush sends what was held.
	Flush() error
}

// Server is the pipeline's seam: a request in, a sink for events out. An error
// before Head was called is the client's answer, an error after it is an error
// event in a stream and a broken connection for a plain body.
type Server interface {
	Serve(ctx context.Context, r *Request, s Sink) error
}

// Peer is a living node of another site, as the pool sees it.
type Peer struct {
	Node string
	Site string
	// Client reaches the peer's door over mutual TLS; the URL's host is ignored.
	Client http.RoundTripper
	// Draining peers are asked last.
	Draining bool
	// Dead holds the upstreams that the peer itself can't reach now.
	Dead map[string]bool
}

// Peers lists the living nodes of other sites, read on each request that no
// upstream of the own site can answer. It must not block.
type Peers func() []Peer
