// Package serving answers requests: it takes one through a chain of stages, the last
// of which asks model servers until one has answered. Who has requests (the gateway
// for clients and for peers, jobs) calls Server.Serve of the Pipeline that New makes;
// start reading at New in pipeline.go. Each stage has a file.
package serving

import (
	"context"
	"net/http"
	"slices"

	"github.com/dsnode/dsnode/node/openai"
	"github.com/dsnode/dsnode/node/upstream"
)

// Server is the seam between stages: a request in, a sink for events out. An error
// before Head was called is the client's answer. An error after it is an error event
// in a stream, and a broken connection for a plain body.
//
// The error is nil when the sink has got a complete answer. Otherwise it wraps one of
// this package's sentinels, or is a *StatusError or *BusyError, or what the sink or
// ctx ended with.
type Server interface {
	Serve(ctx context.Context, r Request, s Sink) error
}

// Request is one client call, parsed once. It is a value: a stage that changes it
// changes the copy that it passes on. What fields point to (Body, Header …) is shared,
// and nobody changes it.
type Request struct {
	openai.Request
	ID string // X-Request-Id
	// Header holds what goes on upstream (User-Agent, Accept …), and nothing
	// hop-by-hop or about authorisation.
	Header    http.Header
	Principal Principal
	// Cache is what the client wants of the cache, empty when it did not say.
	Cache CacheMode
	// Hops counts the peers that this request has passed. A request with one hop is
	// answered by the site's own upstreams or not at all.
	Hops int
	// RetryCount is the client's x-stainless-retry-count, for the retry budget.
	RetryCount int

	// table is the configuration that the whole request is served by, and model what
	// is asked for in it. The first stage sets both.
	table *upstream.Table
	model *upstream.Model
	// cached goes into the answer's Head.
	cached CacheStatus
}

// MaxHops is how many peers a request may pass.
const MaxHops = 1

// Principal is who asks.
type Principal struct {
	KeyID  string   `json:"key_id,omitempty"` // empty: anonymous
	Tenant string   `json:"tenant,omitempty"`
	Models []string `json:"models,omitempty"` // empty: all
}

// Allows reports whether the principal may use a model.
func (p *Principal) Allows(model string) bool {
	return len(p.Models) == 0 || slices.Contains(p.Models, model)
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
	Attempts int    // upstream attempts, this one included; 0: no server was asked
	// Model is the configured name of the model that answered, a fallback's when one
	// stood in; empty: unknown.
	Model string
	Cache Cached
}

// Sink takes an answer. Calls come from one goroutine. An error from it means that
// the client has gone: the upstream's work is cancelled, and Serve returns the error.
type Sink interface {
	// Head comes once, before any Data. Until then another upstream may still be
	// asked; after it, never.
	Head(Head) error
	// Data is a piece of a plain body, or one whole event with its final blank line.
	// The bytes are valid only during the call.
	Data([]byte) error
}

// Batcher is a Sink that can buffer events. Those that an upstream sent in one piece
// then go to the client in one piece: on a busy machine several events share a write.
// No event is buffered while the next one is waited for.
type Batcher interface {
	Sink
	// Hold is Data for an event that the next Flush or Data sends.
	Hold([]byte) error
	// Flush sends what was held.
	Flush() error
}
