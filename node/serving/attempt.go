package serving

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/dsnode/dsnode/node/openai"
)

const (
	// maxAnswer bounds a plain body, which is held until it is whole.
	maxAnswer = 32 << 20
	// maxRefusal bounds the body of an upstream's error.
	maxRefusal = 256 << 10
)

// Headers between peers.
const (
	// HeaderHops counts the peers that a forwarded request has passed.
	HeaderHops = "X-Dsnode-Hops"
	// HeaderPrincipal carries the Principal as JSON.
	HeaderPrincipal = "X-Dsnode-Principal"

	headerRequestID = "X-Request-Id"
	headerUpstream  = "X-Dsnode-Upstream"
	headerSite      = "X-Dsnode-Site"
	headerError     = "X-Dsnode-Error" // a door's own code
	headerAttempts  = "X-Dsnode-Attempts"
	// HeaderModel tells a peer which model answered, query-escaped: a fallback's
	// answer is not the asked model's.
	HeaderModel = "X-Dsnode-Model"
)

// attempt is one request to one backend.
type attempt struct {
	candidate
	w     *watch
	r     *Request
	sink  Sink
	held  bool // the sink, a Batcher, holds events
	now   func() time.Time
	start time.Time
	first time.Duration // to the first content, zero before
	head  Head
	// usage that was asked for on the client's behalf and is its no business
	stripUsage bool
	in, out    int64 // tokens, as the upstream counted them
	peerTries  int   // attempts that a peer made
}

// run asks and passes the answer on. It returns when the answer is complete,
// has failed, or the client is gone.
func (a *attempt) run() outcome {
	o := a.ask()
	if o.result != resultOK {
		a.explain(&o)
	}
	o.attempts = a.peerTries
	return o
}

// explain finds the true cause: an error of the connection is often only the
// echo of a timer or of the client's leaving.
func (a *attempt) explain(o *outcome) {
	var gone *sinkError
	if errors.As(o.err, &gone) {
		o.result, o.err = resultCancelled, gone.err
		return
	}
	cause := context.Cause(a.w)
	if cause == nil {
		return
	}
	var timer *timerError
	switch {
	case errors.As(cause, &timer):
		o.result, o.err = timer.result, timer
	case errors.Is(cause, errPeerGone):
		o.result, o.err = resultPeerGone, errPeerGone
	default:
		o.result, o.err = resultCancelled, cause
	}
}

func (a *attempt) ask() outcome {
	req, err := a.request()
	if err != nil {
		return outcome{result: resultBadAnswer, err: err}
	}
	resp, err := a.client.RoundTrip(req)
	if err != nil {
		return unreached(err)
	}
	defer func() { _ = resp.Body.Close() }() // nothing to learn from it
	result, ok := judgeStatus(resp.StatusCode)
	if a.peer != nil {
		a.peerTries, _ = strconv.Atoi(resp.Header.Get(headerAttempts))
		if resp.Header.Get(headerUpstream) == "" {
			result, ok = judgePeerStatus(resp.StatusCode)
		}
	}
	if !ok {
		o := a.refusal(resp, result)
		if a.refusesUsage(o) {
			return a.ask()
		}
		return o
	}
	a.setHead(resp)
	if a.head.Stream {
		return a.stream(resp)
	}
	return a.plain(resp)
}

// refusesUsage finds out that an old server doesn't know the stream_options
// that it was sent in the client's place. It is asked again without, and from
// then on.
func (a *attempt) refusesUsage(o outcome) bool {
	if !a.stripUsage || o.result != resultClientError || !bytes.Contains(o.status.Body, []byte("stream_options")) {
		return false
	}
	return !a.target.noUsage.Swap(true)
}

// unreached sorts an error of the transport.
func unreached(err error) outcome {
	var op *net.OpError
	if errors.As(err, &op) && op.Op == "dial" {
		if op.Timeout() {
			return outcome{result: resultConnectTimer, err: fmt.Errorf("%w: connect timer: %w", ErrTimeout, err)}
		}
		return outcome{result: resultRefused, err: err}
	}
	if strings.Contains(err.Error(), "TLS handshake timeout") {
		return outcome{result: resultConnectTimer, err: fmt.Errorf("%w: connect timer: %w", ErrTimeout, err)}
	}
	return outcome{result: resultReset, err: err}
}

// request builds what is sent. The body is a slice that stays whole, so the
// transport can send it again on another connection, and the client's
// connection plays no part in it (golang/go#40747).
func (a *attempt) request() (*http.Request, error) {
	h := make(http.Header, len(a.r.Header)+4)
	for k, v := range a.r.Header {
		h[k] = v
	}
	delete(h, "Accept-Encoding") // what is looked into must come plain
	h["Content-Type"] = jsonType
	if a.r.ID != "" {
		h[headerRequestID] = []string{a.r.ID}
	}
	var body []byte
	var to *url.URL
	if a.peer != nil {
		var err error
		if body, err = a.forward(h); err != nil {
			return nil, err
		}
		to = &url.URL{Scheme: "http", Host: a.peer.node, Path: a.r.Endpoint.Path}
	} else {
		if key := a.target.key.Load(); key != nil {
			h["Authorization"] = []string{*key}
		}
		a.stripUsage = a.r.Stream && !a.r.WantUsage && a.r.Endpoint.Completes
		body = a.r.BodyFor(a.wireModel(), a.stripUsage && !a.target.noUsage.Load())
		to = a.target.url(a.r.Endpoint.Path)
	}
	if h["X-Idempotency-Key"] == nil && h["Idempotency-Key"] == nil {
		// A name without a value is not sent. It lets the transport ask again when
		// a connection that it kept turns out to be closed by the server and no
		// byte of an answer has come: else that is an error for nothing.
		h["X-Idempotency-Key"] = []string{}
	}
	req := &http.Request{
		Method: http.MethodPost, URL: to, Host: to.Host,
		Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header: h, ContentLength: int64(len(body)),
		Body:    io.NopCloser(bytes.NewReader(body)),
		GetBody: func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(body)), nil },
	}
	return req.WithContext(a.w), nil
}

var jsonType = []string{"application/json"}

// wireModel is the model's name that the body must carry, nil when the
// client's stands.
func (a *attempt) wireModel() []byte {
	if a.target.serves != nil {
		return a.target.serves
	}
	if a.model.name != a.r.Model {
		return a.model.quoted
	}
	return nil
}

// forward adds what a peer must know. It gets the client's body; only for a
// fallback the name in it is the fallback's, which the client's key need not
// allow: the configuration does.
func (a *attempt) forward(h http.Header) ([]byte, error) {
	who, body := a.r.Principal, a.r.Body
	if a.model.name != a.r.Model {
		body = a.r.BodyFor(a.model.quoted, false)
		if len(who.Models) > 0 {
			who.Models = append([]string{a.model.name}, who.Models...)
		}
	}
	principal, err := json.Marshal(who)
	if err != nil {
		return nil, fmt.Errorf("encode principal: %w", err)
	}
	h[HeaderPrincipal] = []string{string(principal)}
	h[HeaderHops] = []string{strconv.Itoa(a.r.Hops + 1)}
	return body, nil
}

// patience says for how long an answer may stay away after the first token's
// timer; nil: no longer.
func (a *attempt) patience() func() bool {
	switch {
	case a.r.Stream || !a.r.Endpoint.Generates:
		return nil
	case a.peer != nil: // whose end ends the attempt, and whose node judges the upstream
		return func() bool { return true }
	}
	return a.target.answersProbes
}

// setHead prepares what the sink is told before the first data.
func (a *attempt) setHead(resp *http.Response) {
	a.head.Status = resp.StatusCode
	a.head.Length = -1
	a.head.Header = passedOn(resp.Header)
	a.head.Stream = isType(resp.Header, "text/event-stream")
	a.label(resp.Header)
}

// label says whose answer it is.
func (a *attempt) label(h http.Header) {
	if a.peer == nil {
		a.head.Upstream, a.head.Site, a.head.Model = a.permit.b.name, a.permit.b.site, a.model.name
		return
	}
	a.head.Model, _ = url.QueryUnescape(h.Get(HeaderModel)) // "", unknown, when it can't be read
	a.head.Upstream, a.head.Site, a.head.Node = h.Get(headerUpstream), h.Get(headerSite), a.peer.node
	if a.head.Site == "" {
		a.head.Site = a.peer.site
	}
	a.head.Attempts += max(a.peerTries, 1) - 1
}

func isType(h http.Header, want string) bool {
	t, _, _ := strings.Cut(h.Get("Content-Type"), ";")
	return strings.EqualFold(strings.TrimSpace(t), want)
}

// passedOn keeps what of an answer's header is the client's business.
func passedOn(h http.Header) http.Header {
	kept := make(http.Header, 2)
	for k, v := range h {
		switch {
		case k == "Content-Type", k == "Content-Language", k == "Content-Disposition", k == "Retry-After",
			k == "X-Should-Retry", k == "X-Dsnode-Degraded", k == "X-Dsnode-Variant",
			strings.HasPrefix(k, "Openai-"), strings.HasPrefix(k, "Anthropic-"), strings.HasPrefix(k, "X-Ratelimit-"):
			kept[k] = v
		}
	}
	return kept
}

// refusal reads an answer that is no 2xx.
func (a *attempt) refusal(resp *http.Response, result result) outcome {
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxRefusal))
	if err != nil && result == resultClientError {
		return outcome{result: resultTruncated, err: fmt.Errorf("%w: %w", ErrTruncated, err)}
	}
	o := outcome{result: result, retryAfter: retryAfter(resp.Header, a.now())}
	o.overloaded = resp.Header.Get(headerError) == "overloaded"
	o.err = fmt.Errorf("%s: status %d: %s", result, resp.StatusCode, excerpt(body))
	if result == resultClientError || result == resultNotServed {
		a.label(resp.Header)
		o.status = &StatusError{
			Status: resp.StatusCode, Header: passedOn(resp.Header), Body: body,
			Upstream: a.head.Upstream, Site: a.head.Site, Attempts: a.head.Attempts,
		}
	}
	return o
}

// excerpt is the start of an error body, for the log.
func excerpt(b []byte) string {
	const limit = 200
	if len(b) > limit {
		b = b[:limit]
	}
	return strings.ToValidUTF8(strings.TrimSpace(string(b)), "?")
}

// retryAfter reads seconds or a date; zero when there is nothing usable.
func retryAfter(h http.Header, now time.Time) time.Duration {
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

// reached notes the first content.
func (a *attempt) reached() {
	a.first = time.Since(a.start)
	a.permit.prosper(a.now())
}

// count takes an upstream's own token count. A peer has counted its own.
func (a *attempt) count(usage []byte) {
	if a.peer == nil {
		a.in, a.out = openai.Usage(usage)
	}
}
