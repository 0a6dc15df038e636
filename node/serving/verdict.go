package serving

import (
	"errors"
	"net/http"
	"time"
)

// result says how an attempt at one backend ended: the metric's label and the
// word in the log.
type result int

const (
	resultOK            result = iota
	resultCancelled            // the client went away
	resultClientError          // 4xx: this request is refused by everybody
	resultNotServed            // 404, 405 or 501: this backend lacks the model or the endpoint
	resultRateLimited          // 429
	resultCredentials          // 401, 402, 403: our key there is wrong or has no money
	resultServerError          // 5xx, 408, 3xx
	resultRefused              // no connection
	resultReset                // the connection broke before any content
	resultBadAnswer            // 200 with something that is no answer
	resultErrorEvent           // 200 with an error in the stream or the body
	resultTruncated            // the answer ended early
	resultExhausted            // finish_reason insufficient_system_resource
	resultConnectTimer         // the four timers
	resultFirstToken           //
	resultBetweenTokens        //
	resultTotal                //
	resultTooSlow              // below the least pace
	resultPeerBusy             // a peer can't answer either
	resultPeerGone             // a peer was lost while it was asked
	results
)

// effect is what a result means for the backend and for the request.
type effect struct {
	name    string
	breaker evidence
	next    bool  // another backend may do better, if nothing was sent yet
	err     error // what the client's error wraps when this was the last word
}

type evidence int

const (
	neutral evidence = iota
	good
	bad
)

// effects is the whole judgement on failures. A client that hangs up says
// nothing of an upstream; 429 pauses it but is no fault; a wrong key or a
// missing model is a fault of the configuration and not of the server's health.
var effects = [results]effect{
	resultOK:            {"ok", good, false, nil},
	resultCancelled:     {"cancelled", neutral, false, nil},
	resultClientError:   {"client_error", neutral, false, nil},
	resultNotServed:     {"not_served", neutral, true, ErrUpstreamFailed},
	resultRateLimited:   {"rate_limited", neutral, true, ErrOverloaded},
	resultCredentials:   {"credentials", neutral, true, ErrNoUpstream},
	resultServerError:   {"server_error", bad, true, ErrUpstreamFailed},
	resultRefused:       {"refused", bad, true, ErrNoUpstream},
	resultReset:         {"reset", bad, true, ErrUpstreamFailed},
	resultBadAnswer:     {"bad_answer", bad, true, ErrUpstreamFailed},
	resultErrorEvent:    {"error_event", bad, true, ErrUpstreamFailed},
	resultTruncated:     {"truncated", bad, true, ErrTruncated},
	resultExhausted:     {"exhausted", bad, true, ErrUpstreamFailed},
	resultConnectTimer:  {"timeout_connect", bad, true, ErrTimeout},
	resultFirstToken:    {"timeout_first_token", bad, true, ErrTimeout},
	resultBetweenTokens: {"timeout_between_tokens", bad, true, ErrTimeout},
	resultTooSlow:       {"too_slow", bad, true, ErrTimeout},
	// The total timer says that the request was long, not that this upstream,
	// perhaps asked a second ago, is ill. And no time is left for another.
	resultTotal:    {"timeout_total", neutral, false, ErrTimeout},
	resultPeerBusy: {"peer_busy", neutral, true, ErrNoUpstream},
	resultPeerGone: {"peer_gone", bad, true, ErrNoUpstream},
}

func (r result) String() string { return effects[r].name }

// judgeStatus sorts an upstream's HTTP status. ok means that the body decides.
//
// 400, 409, 413, 422 and other 4xx are about the request and go to the client.
// 404, 405 and 501 may be about the backend (a model that isn't loaded, an
// endpoint it lacks): another is asked, and the refusal is the client's answer
// when nobody does better. 408 is the server's own impatience. A redirect is
// never followed: it would carry the key elsewhere.
func judgeStatus(code int) (result, bool) {
	switch {
	case code >= 200 && code < 300:
		return resultOK, true
	case code == http.StatusTooManyRequests:
		return resultRateLimited, false
	case code == http.StatusUnauthorized, code == http.StatusPaymentRequired, code == http.StatusForbidden:
		return resultCredentials, false
	case code == http.StatusNotFound, code == http.StatusMethodNotAllowed, code == http.StatusNotImplemented:
		return resultNotServed, false
	case code == http.StatusRequestTimeout:
		return resultServerError, false
	case code >= 400 && code < 500:
		return resultClientError, false
	}
	return resultServerError, false
}

// judgePeerStatus sorts a status that a peer's own door wrote (its answer names
// no upstream): the peer is alive, and only a refusal of the request itself is
// for the client.
func judgePeerStatus(code int) (result, bool) {
	switch {
	case code >= 200 && code < 300:
		return resultOK, true
	case code == http.StatusUnauthorized, code == http.StatusForbidden:
		return resultCredentials, false
	case code == http.StatusBadRequest, code == http.StatusRequestEntityTooLarge, code == http.StatusUnprocessableEntity:
		return resultClientError, false
	}
	return resultPeerBusy, false
}

// outcome is what one attempt came to.
type outcome struct {
	result     result
	sent       bool  // Head reached the sink: nobody else may answer now
	err        error // the cause, for the log and for the client's error
	retryAfter time.Duration
	status     *StatusError // a refusal that the client may see
	attempts   int          // upstream attempts that a peer made
	overloaded bool         // a peer has upstreams, but no room
}

// sinkError marks an error that came from the sink: the client has gone.
type sinkError struct{ err error }

func (e *sinkError) Error() string { return e.err.Error() }
func (e *sinkError) Unwrap() error { return e.err }

var errNoContent = errors.New("the stream ended without content")
