package upstream

import (
	"errors"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// Result says how an attempt at one server ended. Its string is the metric's label
// and the log's.
type Result int

const (
	OK                   Result = iota
	Cancelled                   // the client went away
	ClientError                 // 4xx: every server would refuse this request
	NotServed                   // 404, 405 or 501: the server lacks the model or the endpoint
	RateLimited                 // 429
	Credentials                 // 401, 402, 403: our key there is wrong or has no money
	ServerFailed                // 5xx, 408, 3xx
	Refused                     // no connection
	Reset                       // the connection broke before any content
	BadAnswer                   // 200 with something that is no answer
	ErrorEvent                  // 200 with an error in the stream or the body
	Truncated                   // the answer ended early
	Exhausted                   // finish_reason insufficient_system_resource
	ConnectTimeout              // the four timers
	FirstTokenTimeout           //
	BetweenTokensTimeout        //
	TotalTimeout                //
	TooSlow                     // below the least pace
	PeerBusy                    // a peer can't answer either
	PeerGone                    // a peer was lost while it was asked
	Results                     // how many there are
)

// evidence is what a result says about a server's health.
type evidence int

const (
	neutral evidence = iota
	good
	bad
)

// verdicts judges each result. A client that hangs up says nothing about a server;
// 429 pauses it, but is no fault; a wrong key or a missing model is a fault of the
// configuration and not of the server's health. The total timer says that the
// request was long, not that this server, asked a second ago perhaps, is ill.
var verdicts = [Results]struct {
	name     string
	evidence evidence
}{
	OK:                   {"ok", good},
	Cancelled:            {"cancelled", neutral},
	ClientError:          {"client_error", neutral},
	NotServed:            {"not_served", neutral},
	RateLimited:          {"rate_limited", neutral},
	Credentials:          {"credentials", neutral},
	ServerFailed:         {"server_error", bad},
	Refused:              {"refused", bad},
	Reset:                {"reset", bad},
	BadAnswer:            {"bad_answer", bad},
	ErrorEvent:           {"error_event", bad},
	Truncated:            {"truncated", bad},
	Exhausted:            {"exhausted", bad},
	ConnectTimeout:       {"timeout_connect", bad},
	FirstTokenTimeout:    {"timeout_first_token", bad},
	BetweenTokensTimeout: {"timeout_between_tokens", bad},
	TotalTimeout:         {"timeout_total", neutral},
	TooSlow:              {"too_slow", bad},
	PeerBusy:             {"peer_busy", neutral},
	PeerGone:             {"peer_gone", bad},
}

func (r Result) String() string { return verdicts[r].name }

// Harmless reports that the result says nothing against the server.
func (r Result) Harmless() bool { return verdicts[r].evidence == neutral }

// blames reports whether the status shows the error as the server's last one.
func (r Result) blames() bool { return r != OK && r != Cancelled && r != ClientError }

// Outcome is what one attempt came to, as far as its server is concerned.
type Outcome struct {
	Result     Result
	Err        error         // the cause in own words (package cause), nil when there is none
	RetryAfter time.Duration // as the server asked, zero: it did not
}

const (
	// maxPause bounds how long a Retry-After can keep a server out.
	maxPause = 60 * time.Second
	// DefaultPause is that of a 429 without Retry-After.
	DefaultPause    = time.Second
	credentialPause = 10 * time.Second // a refused key is refused again
)

// pause says how long the server is not asked. Peers are never paused: what one of
// their models suffers from says nothing about the others.
func (o *Outcome) pause(b *backend) (time.Duration, bool) {
	if b.node != "" {
		return 0, false
	}
	switch o.Result {
	case RateLimited:
		if o.RetryAfter <= 0 {
			return DefaultPause, true
		}
		return min(o.RetryAfter, maxPause), true
	case Credentials:
		return credentialPause, true
	}
	return 0, false
}

// JudgeStatus sorts an upstream's HTTP status. OK means that the body decides.
//
// 400, 409, 413, 422 and other 4xx are about the request and go to the client.
// 404, 405 and 501 may be about the server (a model that isn't loaded, an endpoint
// that it lacks): another one is asked, and the refusal is the client's answer when
// no server does better. 408 is the server's own impatience. A redirect is never
// followed: it would carry the key elsewhere.
func JudgeStatus(code int) Result {
	switch {
	case code >= 200 && code < 300:
		return OK
	case code == http.StatusTooManyRequests:
		return RateLimited
	case code == http.StatusUnauthorized, code == http.StatusPaymentRequired, code == http.StatusForbidden:
		return Credentials
	case code == http.StatusNotFound, code == http.StatusMethodNotAllowed, code == http.StatusNotImplemented:
		return NotServed
	case code == http.StatusRequestTimeout:
		return ServerFailed
	case code >= 400 && code < 500:
		return ClientError
	}
	return ServerFailed
}

// JudgePeerStatus sorts a status that a peer's gateway wrote itself: the answer
// names no upstream. The peer is alive, and only a refusal of the request itself is
// for the client.
func JudgePeerStatus(code int) Result {
	switch {
	case code >= 200 && code < 300:
		return OK
	case code == http.StatusUnauthorized, code == http.StatusForbidden:
		return Credentials
	case code == http.StatusBadRequest, code == http.StatusRequestEntityTooLarge, code == http.StatusUnprocessableEntity:
		return ClientError
	}
	return PeerBusy
}

// JudgeError sorts an error of a round trip that brought no answer.
func JudgeError(err error) Result {
	var op *net.OpError
	dialling := errors.As(err, &op) && op.Op == "dial"
	switch {
	case dialling && op.Timeout(), strings.Contains(err.Error(), "TLS handshake timeout"):
		return ConnectTimeout
	case dialling:
		return Refused
	}
	return Reset
}

// RetryAfter reads the header's seconds or date, a minute at the most; zero when
// there is nothing usable.
func RetryAfter(h http.Header, now time.Time) time.Duration {
	v := h.Get("Retry-After")
	if v == "" {
		return 0
	}
	if s, err := strconv.ParseFloat(v, 64); err == nil {
		return time.Duration(min(max(s, 0), maxPause.Seconds()) * float64(time.Second))
	}
	if t, err := http.ParseTime(v); err == nil {
		return min(max(t.Sub(now), 0), maxPause)
	}
	return 0
}
