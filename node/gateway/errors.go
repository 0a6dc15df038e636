package gateway

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/node/openai"
	"github.com/dsnode/dsnode/node/serving"
	"github.com/dsnode/dsnode/node/shares"
)

// failure is an error as a client sees it. Only this file and, for jobs, jobs_errors.go
// make them.
type failure struct {
	status     int
	kind       string // the type in OpenAI's error object
	code       string
	param      string // empty: null
	message    string
	retryAfter time.Duration
	// final: asking again makes no sense, or all upstreams were tried.
	final bool
	// hangUp: the connection can't be used again, part of a body is unread on it.
	hangUp bool
	// body replaces the error object: an upstream's own answer.
	body   []byte
	header http.Header
	// Which upstream refused, and after how many attempts.
	upstream, site string
	attempts       int
}

// statusGone is nginx's status for a client that has left; it is never sent.
const statusGone = 499

func invalid(status int, code, message string) *failure {
	return &failure{status: status, kind: openai.InvalidRequest, code: code, message: message, final: true}
}

func unknownRoute(r *http.Request) *failure {
	return invalid(http.StatusNotFound, "unknown_url", fmt.Sprintf("Unknown request URL: %s %s. Please check the URL for typos.", r.Method, printable(r.URL.Path)))
}

func wrongMethod(r *http.Request, rt *route) *failure {
	return invalid(http.StatusMethodNotAllowed, "method_not_allowed",
		fmt.Sprintf("Not allowed to %s on %s; it takes %s.", printable(r.Method), printable(r.URL.Path), strings.Join(rt.methods, ", ")))
}

func unknownModel(model string) *failure {
	f := invalid(http.StatusNotFound, "model_not_found",
		fmt.Sprintf("The model `%s` does not exist or you do not have access to it. GET /v1/models lists those that you can use.", printable(model)))
	f.param = "model"
	return f
}

func tooLarge(limit int64) *failure {
	f := invalid(http.StatusRequestEntityTooLarge, "request_too_large", fmt.Sprintf("The request body is larger than %d bytes.", limit))
	f.hangUp = true
	return f
}

func encodedBody(encoding string) *failure {
	f := invalid(http.StatusUnsupportedMediaType, "unsupported_content_encoding",
		fmt.Sprintf("The request body comes with Content-Encoding %s; send it as it is, uncompressed.", printable(encoding)))
	f.hangUp = true
	return f
}

func slowBody(got int) *failure {
	return &failure{
		status: http.StatusRequestTimeout, kind: openai.TimeoutError, code: "request_timeout", hangUp: true,
		message: fmt.Sprintf("The request body came too slowly: %d bytes so far.", got),
	}
}

func brokenBody() *failure {
	f := invalid(http.StatusBadRequest, "unreadable_body", "The request body ended early or can't be read.")
	f.hangUp = true
	return f
}

// shed is this node's own overload.
func shed(why string) *failure {
	return &failure{status: http.StatusServiceUnavailable, kind: openai.Overloaded, code: "overloaded", message: why, retryAfter: time.Second}
}

// tenantShare refuses what one tenant alone has too much of.
func tenantShare(e *shares.Error) *failure {
	return &failure{
		status: http.StatusTooManyRequests, kind: openai.RateLimit, code: "tenant_share", retryAfter: time.Second,
		message: sentence(e) + " Please try again when some of it has ended.",
	}
}

func nodeRemoved() *failure {
	return &failure{
		status: http.StatusServiceUnavailable, kind: openai.ServerError, code: "node_removed", retryAfter: time.Second,
		message: "This node was removed from its cluster and is about to end. Please use another node.",
	}
}

func badPeerRequest(why string) *failure {
	return invalid(http.StatusBadRequest, "bad_peer_request", why)
}

// explain turns an error of the pipeline, the parser or the key check into what the
// client is told. It is nil for a client that has gone.
func explain(err error, model string) *failure {
	var (
		body   *openai.BodyError
		busy   *serving.BusyError
		status *serving.StatusError
	)
	switch {
	case errors.As(err, &body):
		f := invalid(http.StatusBadRequest, "invalid_body", "The request body is invalid: "+printable(body.Error())+".")
		f.param = printable(body.Param)
		return f
	case errors.As(err, &status):
		return upstreamRefused(status)
	case errors.As(err, &busy):
		f := &failure{status: http.StatusServiceUnavailable, kind: openai.Overloaded, code: "overloaded", retryAfter: max(busy.RetryAfter, time.Second), attempts: busy.Attempts}
		f.message = "The model is overloaded now. Please try again later."
		if errors.Is(err, serving.ErrNoUpstream) {
			f.kind, f.code = openai.ServerError, "no_upstream"
			f.message = fmt.Sprintf("No model server can answer for `%s` now. Please try again later.", printable(model))
		}
		return f
	case errors.Is(err, agreed.ErrKeyMissing):
		return badKey("You didn't provide an API key. Send it in an Authorization header: Authorization: Bearer YOUR_KEY.")
	case errors.Is(err, agreed.ErrKeyUnknown):
		return badKey("Incorrect API key provided.")
	case errors.Is(err, agreed.ErrKeyExpired), errors.Is(err, agreed.ErrKeyRevoked):
		return badKey("This key can't be used: " + err.Error() + ".")
	case errors.Is(err, ErrKeyUnknowable):
		return &failure{status: http.StatusServiceUnavailable, kind: openai.ServerError, code: "auth_unavailable", retryAfter: time.Second, message: "API keys can't be checked now. Please try again later."}
	case errors.Is(err, ErrKeysStale):
		return &failure{
			status: http.StatusServiceUnavailable, kind: openai.ServerError, code: "auth_stale", retryAfter: 5 * time.Second,
			message: "This node has been cut off from its cluster for too long to check API keys (access.stale_for). Please try another site.",
		}
	case errors.Is(err, serving.ErrUnknownModel):
		return unknownModel(model)
	case errors.Is(err, serving.ErrNoUpstream):
		return &failure{
			status: http.StatusServiceUnavailable, kind: openai.ServerError, code: "no_upstream", retryAfter: time.Second,
			message: fmt.Sprintf("No model server can answer for `%s` now. Please try again later.", printable(model)),
		}
	case errors.Is(err, serving.ErrOverloaded):
		return shed("The model is overloaded now. Please try again later.")
	case errors.Is(err, serving.ErrNotCached):
		return &failure{
			status: http.StatusGatewayTimeout, kind: openai.InvalidRequest, code: "not_cached", final: true, header: http.Header{"X-Dsnode-Cache": {string(serving.Miss)}},
			message: "The answer is not in the cache, and X-Dsnode-Cache: only asks for nothing else.",
		}
	case errors.Is(err, serving.ErrLagging):
		return &failure{
			status: http.StatusServiceUnavailable, kind: openai.Overloaded, code: "reader_too_slow", retryAfter: time.Second,
			message: "The answer is shared with others and can't be held for this connection any longer. Please try again.",
		}
	case errors.Is(err, serving.ErrTimeout), errors.Is(err, context.DeadlineExceeded):
		return &failure{status: http.StatusGatewayTimeout, kind: openai.TimeoutError, code: "upstream_timeout", message: "The model server did not answer in time.", final: true}
	case errors.Is(err, serving.ErrHopLimit):
		return &failure{status: http.StatusLoopDetected, kind: openai.ServerError, code: "hop_limit", message: "The request has passed too many nodes.", final: true}
	case errors.Is(err, serving.ErrTruncated):
		return &failure{status: http.StatusBadGateway, kind: openai.ServerError, code: "upstream_truncated", message: "The model server ended its answer early.", final: true}
	case errors.Is(err, serving.ErrUpstreamFailed):
		return &failure{status: http.StatusBadGateway, kind: openai.ServerError, code: "upstream_failed", message: "The model server failed to answer.", final: true}
	case errors.Is(err, context.Canceled):
		return nil
	}
	return &failure{status: http.StatusInternalServerError, kind: openai.ServerError, code: "internal_error", message: "The server had an error while processing your request."}
}

func badKey(message string) *failure {
	return invalid(http.StatusUnauthorized, "invalid_api_key", message)
}

// upstreamRefused passes an upstream's refusal on: status, body and the headers that the
// pipeline kept. A body that has not OpenAI's shape becomes the message of one that has.
func upstreamRefused(e *serving.StatusError) *failure {
	f := &failure{
		status: e.Status, kind: openai.InvalidRequest, code: "upstream_refused", header: e.Header,
		upstream: e.Upstream, site: e.Site, attempts: e.Attempts,
		message: "The model server refused the request.",
	}
	switch e.Status {
	case http.StatusRequestTimeout, http.StatusConflict, http.StatusTooManyRequests:
	default:
		f.final = true
	}
	if e.Status == http.StatusTooManyRequests {
		f.kind = openai.RateLimit
	}
	text := bytes.TrimSpace(e.Body)
	if _, shaped := openai.ErrorObject(e.Body); shaped {
		f.body = e.Body
	} else if len(text) > 0 {
		f.message = printable(string(text))
	}
	return f
}

// printable cuts a client's or an upstream's text, and makes it valid UTF-8.
func printable(s string) string {
	const limit = 1000
	if len(s) > limit {
		s = s[:limit] + "…"
	}
	return strings.ToValidUTF8(s, "�")
}

// json is the body of the error.
func (f *failure) json() []byte {
	if f.body != nil {
		return f.body
	}
	e := openai.Error{Message: f.message, Type: f.kind, Code: f.code, Param: f.param}
	return e.Body()
}

// event is the error inside a stream.
func (f *failure) event() []byte {
	var one bytes.Buffer
	_ = json.Compact(&one, f.json()) // an upstream's body is JSON too, and may span lines
	e := openai.Event{Data: one.Bytes()}
	return e.Append(nil)
}

// write sends the error in place of an answer. Nothing may have been sent.
func (f *failure) write(w http.ResponseWriter, head bool) error {
	h := w.Header()
	for k, v := range f.header {
		h[k] = v
	}
	body := f.json()
	h["Content-Type"] = jsonType
	h["Content-Length"] = []string{strconv.Itoa(len(body))}
	if f.retryAfter > 0 {
		h["Retry-After"] = []string{strconv.Itoa(int(math.Ceil(f.retryAfter.Seconds())))}
	}
	if f.final {
		h["X-Should-Retry"] = []string{"false"}
	}
	if f.hangUp {
		h["Connection"] = closeConnection
	}
	if f.status == http.StatusUnauthorized {
		h["Www-Authenticate"] = []string{"Bearer"}
	}
	w.WriteHeader(f.status)
	if head {
		return nil
	}
	_, err := w.Write(body)
	return err
}

var jsonType = []string{"application/json"}
