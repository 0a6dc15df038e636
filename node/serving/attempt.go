package serving

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/dsnode/dsnode/cluster/cause"
	"github.com/dsnode/dsnode/node/openai"
	"github.com/dsnode/dsnode/node/upstream"
)

// maxRefusal bounds the body of an upstream's error.
const maxRefusal = 256 << 10

const headerRequestID = "X-Request-Id"

// attempt is one request to one server.
type attempt struct {
	r      Request
	permit upstream.Permit
	sink   Sink
	now    func() time.Time
	start  time.Time // of the request
	w      *watch
	head   Head
	first  time.Duration // from start to the first content, zero before
	held   bool          // the sink, a Batcher, holds events
	// stripUsage: the usage chunk was asked for without the client's knowledge.
	stripUsage bool
	in, out    int64 // tokens, as the upstream counted them
	peerTries  int   // attempts that a peer made
}

// run asks the server, passes its answer on, and gives the permit back. It returns
// when the answer is complete, has failed, or the client is gone.
func (a *attempt) run(ctx context.Context) outcome {
	limits := a.permit.Timeouts
	a.w = newWatch(ctx, limits, a.start.Add(limits.Total.D()), a.permit.Lost(), a.alive())
	asked := time.Now()
	o := a.ask()
	if o.Result != upstream.OK {
		a.explain(&o)
	}
	o.attempts = a.peerTries
	a.w.stop()
	latency := time.Duration(0)
	if a.first > 0 {
		latency = max(a.start.Add(a.first).Sub(asked), 1)
	}
	a.permit.Done(o.Outcome, latency)
	return o
}

// alive says whether a late answer is worth waiting for; nil: it is not.
func (a *attempt) alive() func() bool {
	if a.r.Stream || !a.r.Endpoint.Generates {
		return nil
	}
	return a.permit.Alive
}

// explain finds the true cause: an error of the connection often only follows from a
// timer or from the client's leaving. What came from the server it puts into own words:
// the log and the status of the upstream have them.
func (a *attempt) explain(o *outcome) {
	var gone *sinkError
	if errors.As(o.Err, &gone) {
		o.Result, o.Err = upstream.Cancelled, gone.err
		return
	}
	ended := context.Cause(a.w)
	var timer *timerError
	switch {
	case ended == nil:
		o.Err = cause.Of(o.Err)
	case errors.As(ended, &timer):
		o.Result, o.Err = timer.result, timer
	case errors.Is(ended, errPeerGone):
		o.Result, o.Err = upstream.PeerGone, errPeerGone
	default:
		o.Result, o.Err = upstream.Cancelled, ended
	}
}

// sinkError marks an error that came from the sink: the client has gone.
type sinkError struct{ err error }

func (e *sinkError) Error() string { return e.err.Error() }
func (e *sinkError) Unwrap() error { return e.err }

// ask makes one round trip.
func (a *attempt) ask() outcome {
	req, err := a.request()
	if err != nil {
		return failed(upstream.BadAnswer, err)
	}
	resp, err := a.permit.RoundTrip(req)
	if err != nil {
		return failed(upstream.JudgeError(err), err)
	}
	defer func() { _ = resp.Body.Close() }() // nothing to learn from it
	result := upstream.JudgeStatus(resp.StatusCode)
	if a.permit.Peer != "" {
		a.peerTries, _ = strconv.Atoi(resp.Header.Get(headerAttempts))
		if resp.Header.Get(headerUpstream) == "" {
			result = upstream.JudgePeerStatus(resp.StatusCode)
		}
	}
	if result != upstream.OK {
		o := a.refusal(resp, result)
		if a.refusesUsage(&o) {
			return a.ask()
		}
		return o
	}
	a.head.Status = resp.StatusCode
	a.head.Length = -1
	a.head.Header = passedOn(resp.Header)
	a.head.Stream = isType(resp.Header, "text/event-stream")
	a.label(resp.Header)
	if a.head.Stream {
		return a.stream(resp)
	}
	return a.plain(resp)
}

// request builds what is sent. The body is a slice that stays whole, so the transport
// can send it again on another connection, and the client's connection plays no part
// in it (golang/go#40747).
func (a *attempt) request() (*http.Request, error) {
	h := make(http.Header, len(a.r.Header)+4)
	for k, v := range a.r.Header {
		h[k] = v
	}
	delete(h, "Accept-Encoding") // the answer is read on its way, so it must come uncompressed
	h["Content-Type"] = jsonType
	if a.r.ID != "" {
		h[headerRequestID] = []string{a.r.ID}
	}
	var body []byte
	if a.permit.Peer != "" {
		var err error
		if body, err = a.forward(h); err != nil {
			return nil, err
		}
	} else {
		if key := a.permit.Authorization(); key != "" {
			h["Authorization"] = []string{key}
		}
		a.stripUsage = a.r.Stream && !a.r.WantUsage && a.r.Endpoint.Completes
		body = a.r.BodyFor(a.modelName(), a.stripUsage && !a.permit.RefusesUsage())
	}
	if h["X-Idempotency-Key"] == nil && h["Idempotency-Key"] == nil {
		// A name without a value is not sent. It lets the transport send the request
		// again when a kept connection turns out to be closed by the server and no
		// byte of an answer has come.
		h["X-Idempotency-Key"] = []string{}
	}
	to := a.permit.URL(a.r.Endpoint.Path)
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

// modelName is the quoted name that the body must carry, nil when the client's stays.
func (a *attempt) modelName() []byte {
	if a.permit.ServedAs != nil {
		return a.permit.ServedAs
	}
	if a.permit.Model.Name != a.r.Model {
		return a.permit.Model.Quoted
	}
	return nil
}

// shownModel is the quoted name that the client sees, nil when the answer's own stays.
// A server's private name for a model would tell which server answered. The public
// name of a fallback may be seen.
func (a *attempt) shownModel() []byte {
	if a.permit.ServedAs == nil {
		return nil
	}
	return a.permit.Model.Quoted
}

// refusesUsage finds out that an old server doesn't know the stream_options that it
// was sent without the client's knowledge. It is asked again without them, and from
// then on.
func (a *attempt) refusesUsage(o *outcome) bool {
	return a.stripUsage && o.Result == upstream.ClientError && bytes.Contains(o.status.Body, []byte("stream_options")) &&
		a.permit.UsageRefused()
}

// label says whose answer it is.
func (a *attempt) label(h http.Header) {
	if a.permit.Peer != "" {
		a.labelPeer(h)
		return
	}
	a.head.Upstream, a.head.Site, a.head.Model = a.permit.Upstream, a.permit.Site, a.permit.Model.Name
}

// refusal reads an answer that is no 2xx.
func (a *attempt) refusal(resp *http.Response, result upstream.Result) outcome {
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxRefusal))
	if err != nil && result == upstream.ClientError {
		return failed(upstream.Truncated, err)
	}
	o := failed(result, a.described(result.String(), resp, body, body))
	o.RetryAfter = upstream.RetryAfter(resp.Header, a.now())
	o.overloaded = resp.Header.Get(HeaderError) == "overloaded"
	if result == upstream.ClientError || result == upstream.NotServed {
		a.label(resp.Header)
		o.status = a.statusError(resp.StatusCode, passedOn(resp.Header), body)
	}
	return o
}

func (a *attempt) statusError(status int, h http.Header, body []byte) *StatusError {
	return &StatusError{
		Status: status, Header: h, Body: body,
		Upstream: a.head.Upstream, Site: a.head.Site, Attempts: a.head.Attempts,
	}
}

// errorInside judges an error that came under a 200. It is about the request itself,
// and for the client, or about the server.
func (a *attempt) errorInside(resp *http.Response, document, member []byte) outcome {
	kind, code := openai.ErrorKind(member)
	numeric := code != "" && strings.Trim(code, "0123456789") == ""
	refused := strings.HasPrefix(kind, "invalid_request") || kind == "BadRequestError"
	o := failed(upstream.ErrorEvent, a.described("error under a 200", resp, document, member))
	switch {
	case code == "429":
		o.Result = upstream.RateLimited
	case code == "400", code == "413", code == "422", !numeric && refused:
		o.Result = upstream.ClientError
		o.status = a.statusError(http.StatusBadRequest, http.Header{"Content-Type": jsonType}, bytes.Clone(document))
	}
	return o
}

// content notes the first content.
func (a *attempt) content() {
	a.first = time.Since(a.start)
	a.permit.Content()
}

// count takes an upstream's own token count. A peer has counted its own.
func (a *attempt) count(usage []byte) {
	if a.permit.Peer == "" {
		a.in, a.out = openai.Usage(usage)
	}
}

func isType(h http.Header, want string) bool {
	t, _, _ := strings.Cut(h.Get("Content-Type"), ";")
	return strings.EqualFold(strings.TrimSpace(t), want)
}

// passedOn keeps what of an answer's header is for the client.
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

// described is all that logs and statuses tell of an answer: an error's text often repeats
// the request. failing is where its error object is.
func (a *attempt) described(what string, resp *http.Response, body, failing []byte) *cause.Answer {
	if object, ok := openai.ErrorObject(failing); ok {
		failing = object
	}
	_, code := openai.ErrorKind(failing)
	return &cause.Answer{
		What: what, Status: resp.StatusCode, Type: cause.ContentType(resp.Header), Length: len(body), Code: openai.KnownCode(code),
	}
}
