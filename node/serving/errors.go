package serving

import (
	"errors"
	"fmt"
	"time"
)

// What a request can fail with before any content. The gateway alone picks status,
// type and message.
var (
	ErrUnknownModel   = errors.New("unknown model")
	ErrNoUpstream     = errors.New("no upstream can answer")
	ErrOverloaded     = errors.New("overloaded")
	ErrTimeout        = errors.New("upstream timed out")
	ErrHopLimit       = errors.New("hop limit reached")
	ErrTruncated      = errors.New("upstream ended the answer early")
	ErrUpstreamFailed = errors.New("upstream failed")
	ErrNotCached      = errors.New("not in the cache") // of a request for the cache alone
)

// BusyError says when it is worth asking again.
type BusyError struct {
	Err        error // ErrOverloaded or ErrNoUpstream
	RetryAfter time.Duration
	Attempts   int // upstream attempts that were made
}

func (e *BusyError) Error() string { return fmt.Sprintf("%v, retry after %s", e.Err, e.RetryAfter) }

// Unwrap gives the sentinel.
func (e *BusyError) Unwrap() error { return e.Err }

// StatusError is an upstream's own refusal of this request (4xx): passed to the client
// with its status and body, never retried.
type StatusError struct {
	Status int
	Header map[string][]string
	Body   []byte
	// Who refused: the upstream's name, its site, and the attempts up to it.
	Upstream string
	Site     string
	Attempts int
}

func (e *StatusError) Error() string { return fmt.Sprintf("upstream answered %d", e.Status) }
