package gateway

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/dsnode/dsnode/node/openai"
	"github.com/dsnode/dsnode/node/serving"
)

// exchange is one request and its answer. infer reads the request and has it answered;
// answer.go is the sink that the answer goes to.
type exchange struct {
	g     *Gateway
	w     http.ResponseWriter
	r     *http.Request
	rc    http.ResponseController
	from  caller
	start time.Time
	id    string // X-Request-Id
	held  int64  // bytes that it has in Gateway.held
	share share  // of its tenant
	// values are header values of the answer: one allocation for all.
	values [headerValues]string

	// mu guards all below, and every use of w and rc while the pipeline works: the
	// sink's calls and the keep-alive timer exclude each other. It is held during
	// writes to the client, each of which ends within Options.WriteTimeout.
	mu      sync.Mutex
	started bool  // the status line was sent
	headed  bool  // Head was called
	stream  bool  // the answer is a stream
	ended   bool  // the pipeline is done; a late timer does nothing
	status  int   // sent
	gone    error // why the client can't be reached
	idle    *time.Timer
	writeBy time.Time // the deadline that w has
}

// infer answers a request for a model, and counts it in the metrics.
func (x *exchange) infer(rt *route, index int) {
	g, cfg := x.g, x.g.config()
	table := g.metrics.table(cfg)
	asked := table.unknown
	x.identify()
	if !g.enter() {
		x.refuse(g.shed(shedInFlight))
		g.metrics.done(asked, index, http.StatusServiceUnavailable, x.start)
		return
	}
	defer g.leave()
	defer x.release()

	req, f := x.request(rt, cfg.Limits.BodyBytes)
	if f != nil {
		status := f.status
		if x.r.Context().Err() != nil {
			status = statusGone
		}
		x.refuse(f)
		g.metrics.done(asked, index, status, x.start)
		return
	}
	if known, ok := table.byName[req.Model]; ok {
		asked = known
	}
	status, abort := x.answer(&req)
	g.metrics.done(asked, index, status, x.start)
	if abort {
		panic(http.ErrAbortHandler)
	}
}

// The header values that differ from answer to answer.
const (
	valueID = iota
	valueUpstream
	valueAttempts
	valueSite
	valueNode
	valueLength
	valueCache
	valueAge
	headerValues
)

// value keeps one value for the answer's header.
func (x *exchange) value(i int, v string) []string {
	x.values[i] = v
	return x.values[i : i+1 : i+1]
}

// identify puts the names of the request and of this node into the answer's header.
func (x *exchange) identify() {
	x.id = first(x.r.Header, "X-Request-Id")
	if !saneID(x.id) {
		x.id = newID()
	}
	h := x.w.Header()
	h["X-Request-Id"] = x.value(valueID, x.id)
	h["X-Dsnode-Site"] = x.g.site
	h["X-Dsnode-Node"] = x.g.node
}

// newID is "req_" and 128 random bits in hexadecimal.
func newID() string {
	const prefix = "req_"
	var bits [16]byte
	binary.BigEndian.PutUint64(bits[:8], rand.Uint64()) //nolint:gosec // a name, not a secret
	binary.BigEndian.PutUint64(bits[8:], rand.Uint64()) //nolint:gosec // a name, not a secret
	var id [len(prefix) + 2*len(bits)]byte
	hex.Encode(id[copy(id[:], prefix):], bits[:])
	return string(id[:])
}

// saneID reports whether an id may be used in headers and logs, here and upstream.
func saneID(id string) bool {
	if id == "" || len(id) > 128 {
		return false
	}
	for i := range len(id) {
		if c := id[i]; c <= ' ' || c > '~' || c == '"' || c == '\\' {
			return false
		}
	}
	return true
}

// request reads and checks what the client sent.
func (x *exchange) request(rt *route, limit int64) (req serving.Request, f *failure) {
	req.ID, req.Header = x.id, forwarded(x.r.Header)
	if req.Principal, req.Hops, f = x.authenticate(); f != nil {
		return req, f
	}
	if f = x.enterShare(req.Principal); f != nil {
		return req, f
	}
	body, f := x.readBody(limit)
	if f != nil {
		return req, f
	}
	var err error
	if req.Request, err = openai.Parse(rt.endpoint, body); err != nil {
		return req, explain(err, "")
	}
	if req.Cache, f = cacheMode(x.r.Header); f != nil {
		return req, f
	}
	if count := first(x.r.Header, "X-Stainless-Retry-Count"); count != "" {
		if n, err := strconv.Atoi(count); err == nil && n > 0 {
			req.RetryCount = n
		}
	}
	return req, nil
}

// cacheMode reads what the client wants of the cache. An unknown value is refused: it
// might mean the opposite of the default.
func cacheMode(h http.Header) (serving.CacheMode, *failure) {
	values := h["X-Dsnode-Cache"]
	if len(values) == 0 {
		return "", nil
	}
	switch mode := serving.CacheMode(values[0]); mode {
	case serving.CacheStore, serving.CacheNoStore, serving.CacheOnly, serving.CacheRefresh:
		if len(values) == 1 {
			return mode, nil
		}
	}
	return "", invalid(http.StatusBadRequest, "invalid_cache_mode", "X-Dsnode-Cache must be one of store, no-store, only and refresh.")
}

// forwarded keeps the headers that the upstream gets, nil when there are none. The
// values are shared with the request: nobody changes them.
func forwarded(h http.Header) (out http.Header) {
	for _, k := range [...]string{
		"User-Agent", "Accept", "Accept-Language", "Openai-Beta", "Anthropic-Version", "Anthropic-Beta", "Traceparent", "Tracestate",
	} {
		if v, ok := h[k]; ok {
			if out == nil {
				out = make(http.Header, 4)
			}
			out[k] = v
		}
	}
	return out
}

// answer has the pipeline answer. It returns the status for the metrics (of a stream
// that failed on its way, that of the failure), and whether the connection must be
// aborted: the only way to tell that a plain body is not whole.
func (x *exchange) answer(req *serving.Request) (status int, abort bool) {
	if req.Stream && x.from == clients {
		x.holdHeaders()
	}
	err := x.g.o.Server.Serve(x.r.Context(), *req, x)
	x.mu.Lock()
	defer x.mu.Unlock()
	x.ended = true
	if x.idle != nil {
		x.idle.Stop()
	}
	if err == nil && !x.headed {
		err = errNoAnswer
	}
	if err == nil {
		return x.status, false
	}
	f := explain(err, req.Model)
	if f == nil || x.gone != nil || x.r.Context().Err() != nil {
		return statusGone, true
	}
	x.logFailure(f, req, err)
	switch {
	case !x.started:
		x.send(f)
	case x.stream:
		x.extendWrite(time.Now())
		if _, err := x.w.Write(f.event()); err != nil {
			return f.status, true
		}
	default:
		return f.status, true
	}
	return f.status, false
}

// logFailure logs why a request failed: at debug level what clients can cause at will,
// and overload, because a flood of requests must not become a flood of lines.
func (x *exchange) logFailure(f *failure, req *serving.Request, err error) {
	level := slog.LevelWarn
	if f.status < http.StatusInternalServerError || f.kind == openai.Overloaded {
		level = slog.LevelDebug
	}
	x.g.log.LogAttrs(context.WithoutCancel(x.r.Context()), level, "request failed",
		slog.String("request", x.id), slog.String("endpoint", req.Endpoint.Path), slog.String("model", x.known(req.Model)),
		slog.Int("status", f.status), slog.String("code", f.code), slog.Any("err", err))
}

// known is a model's name for the log: a client could write anything there, so only a
// configured one is taken.
func (x *exchange) known(model string) string {
	if _, ok := x.g.metrics.table(x.g.config()).byName[model]; ok {
		return model
	}
	return "unknown"
}

// refuse sends an error in place of an answer.
func (x *exchange) refuse(f *failure) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.send(f)
}

// send writes an error answer; x.mu is held.
func (x *exchange) send(f *failure) {
	h := x.w.Header()
	if x.from == peers {
		h[serving.HeaderError] = []string{f.code}
	}
	if f.attempts > 0 {
		h["X-Dsnode-Attempts"] = []string{strconv.Itoa(f.attempts)}
	}
	if f.upstream != "" {
		h["X-Dsnode-Upstream"] = []string{f.upstream}
		if f.site != "" {
			h["X-Dsnode-Site"] = []string{f.site}
		}
	}
	x.extendWrite(time.Now())
	x.started = true
	_ = f.write(x.w, x.r.Method == http.MethodHead) // a client that has gone can't be told
}
