package gateway

import (
	"errors"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/dsnode/dsnode/node/serving"
)

var (
	errNoAnswer      = errors.New("the pipeline returned no answer and no error")
	errPlainInStream = errors.New("a plain answer for a stream that has begun")
	errClosed        = errors.New("the answer is over")
)

var (
	streamType  = []string{"text/event-stream"}
	noCache     = []string{"no-cache"}
	noBuffering = []string{"no"}
	keepAlive   = []byte(": keep-alive\n\n")
)

// countedByHTTP is the size up to which net/http finds out the Content-Length of an
// answer that is written at once: its buffer's. For an answer from the cache that saves
// the ninth header, with which the header's map would have to grow, twice.
const countedByHTTP = 2 << 10

// Head begins the answer.
func (x *exchange) Head(h serving.Head) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	if err := x.usable(); err != nil {
		return err
	}
	x.headed = true
	if x.idle != nil {
		x.idle.Stop()
	}
	if x.started { // keep-alives were sent before the content
		if !h.Stream {
			return errPlainInStream
		}
		return nil
	}
	to := x.w.Header()
	for k, v := range h.Header {
		to[k] = v
	}
	if h.Upstream != "" {
		to["X-Dsnode-Upstream"] = x.value(valueUpstream, h.Upstream)
	}
	to["X-Dsnode-Attempts"] = x.value(valueAttempts, strconv.Itoa(h.Attempts))
	if h.Site != "" && h.Site != x.g.o.Site {
		to["X-Dsnode-Site"] = x.value(valueSite, h.Site)
	}
	if h.Node != "" && h.Node != x.g.o.Node {
		to["X-Dsnode-Node"] = x.value(valueNode, h.Node)
	}
	x.labelCache(&h)
	if h.Stream {
		x.startStream(h.Status)
		return nil
	}
	if h.Length > countedByHTTP || h.Length >= 0 && !h.Whole {
		to["Content-Length"] = x.value(valueLength, strconv.FormatInt(h.Length, 10))
	}
	x.begin(h.Status)
	return nil
}

// cacheLabels are the values of X-Dsnode-Cache, shared by all answers.
var cacheLabels = map[serving.CacheStatus][]string{
	serving.HitLocal: {string(serving.HitLocal)}, serving.HitShared: {string(serving.HitShared)}, serving.Stale: {string(serving.Stale)},
	serving.Coalesced: {string(serving.Coalesced)}, serving.Miss: {string(serving.Miss)}, serving.Bypass: {string(serving.Bypass)},
}

// labelCache says what the cache had to do with the answer. A peer is told which model
// answered: it keeps the answer, unless a fallback gave it.
func (x *exchange) labelCache(h *serving.Head) {
	to := x.w.Header()
	if x.from == peers {
		if h.Model != "" {
			to[serving.HeaderModel] = []string{url.QueryEscape(h.Model)}
		}
		return
	}
	c := &h.Cache
	if label, ok := cacheLabels[c.Status]; ok {
		to["X-Dsnode-Cache"] = label
	}
	if c.Key.IsZero() {
		return
	}
	// RFC 9211. The key is what dsnode cache purge --key takes.
	b := make([]byte, 0, 128)
	b = append(b, "dsnode; hit; ttl="...)
	b = strconv.AppendInt(b, int64(c.Left/time.Second), 10)
	b = append(c.Key.Append(append(b, `; key="`...)), `"; detail=`...)
	b = append(b, c.Status...)
	to["Cache-Status"] = x.value(valueCache, string(b))
	to["Age"] = x.value(valueAge, strconv.FormatInt(int64(c.Age/time.Second), 10))
}

// Data sends a piece of a body, or one event, which it flushes.
func (x *exchange) Data(b []byte) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	if err := x.usable(); err != nil {
		return err
	}
	return x.put(b)
}

// Hold takes an event that Flush sends.
func (x *exchange) Hold(b []byte) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	if err := x.usable(); err != nil {
		return err
	}
	return x.write(b)
}

// Flush sends what Hold took.
func (x *exchange) Flush() error {
	x.mu.Lock()
	defer x.mu.Unlock()
	if err := x.usable(); err != nil {
		return err
	}
	return x.flush()
}

// usable returns why nothing can be sent, nil when something can; x.mu is held.
func (x *exchange) usable() error {
	if x.ended {
		return errClosed
	}
	return x.gone
}

// put writes and, in a stream, flushes; x.mu is held, as in the next two.
func (x *exchange) put(b []byte) error {
	if err := x.write(b); err != nil || !x.stream {
		return err
	}
	return x.flush()
}

func (x *exchange) write(b []byte) error {
	x.extendWrite(time.Now())
	_, err := x.w.Write(b)
	if err != nil {
		x.gone = err
	}
	return err
}

func (x *exchange) flush() error {
	err := x.rc.Flush()
	if err != nil {
		x.gone = err
	}
	return err
}

func (x *exchange) begin(status int) {
	x.started, x.status = true, status
	x.w.WriteHeader(status)
}

func (x *exchange) startStream(status int) {
	h := x.w.Header()
	h["Content-Type"] = streamType
	h["Cache-Control"] = noCache
	h["X-Accel-Buffering"] = noBuffering
	x.stream = true
	x.begin(status)
}

// extendWrite sets the deadline of the next write. Streams write often, so it moves at
// most once a second.
func (x *exchange) extendWrite(now time.Time) {
	by := now.Add(x.g.o.WriteTimeout)
	if by.Sub(x.writeBy) < time.Second && x.g.o.WriteTimeout > 2*time.Second {
		return
	}
	x.writeBy = by
	_ = x.rc.SetWriteDeadline(by) // a recorder in a test has none
}

// holdHeaders keeps a stream's headers back until Head, so that another upstream can
// still answer with another status. Proxies and clients have timeouts, so after
// Options.HoldHeaders it sends 200 and a comment, and another comment each interval
// until content comes. An AfterFunc costs no goroutine until it fires, and x.mu orders
// it with the sink's calls.
func (x *exchange) holdHeaders() {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.idle = time.AfterFunc(x.g.o.HoldHeaders, x.sendKeepAlive)
}

func (x *exchange) sendKeepAlive() {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.ended || x.headed || x.gone != nil {
		return
	}
	if !x.started {
		x.startStream(http.StatusOK)
	}
	if x.put(keepAlive) == nil {
		x.idle.Reset(x.g.o.HoldHeaders)
	}
}
