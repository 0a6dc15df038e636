package modelsim

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strconv"
	"time"
)

// errFault ends an answer that failed because of the armed fault.
var errFault = errors.New("simulated fault")

// servePost serves the model endpoints; path is without /v1.
func (s *Server) servePost(w http.ResponseWriter, r *http.Request, path string) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if err != nil {
		writeError(w, http.StatusBadRequest, "invalid_request_error", "unreadable_body", err.Error())
		return
	}
	if !s.authorised(w, r) {
		return
	}
	known := path == "/chat/completions" || path == "/completions" || path == "/embeddings"
	q, err := s.parse(r, body, known)
	rec := s.record.open(r, "/v1"+path, q)
	c := &call{s: s, w: w, rc: http.NewResponseController(w), ctx: r.Context(), q: q, start: time.Now()}
	gone := true // stays true if the handler panics to cut the connection
	defer func() { s.record.close(rec, c.status, gone) }()

	f, hit := s.faults.take(false)
	if hit {
		c.fault = f
		s.record.fault(rec, f.Mode)
	}
	switch {
	case f.status() != 0:
		c.status = f.status()
		s.writeStatusFault(w, f)
		err = errFault
	case f.Mode == ResetBefore, f.Mode == Refuse:
		gone = false
		reset(w)
		return
	case err != nil:
		c.status = http.StatusBadRequest
		writeError(w, c.status, "invalid_request_error", "bad_request", err.Error())
		err = nil
	case !s.knows(q.name):
		c.status = http.StatusNotFound
		writeError(w, c.status, "invalid_request_error", "model_not_found", "The model `"+q.Model+"` does not exist")
	case path == "/embeddings":
		err = c.embed()
	case !known:
		sum := sha256.Sum256(body)
		err = c.plain(mustJSON(map[string]any{
			"object": "sim.echo", "endpoint": "/v1" + path, "model": q.Model, "sha256": hex.EncodeToString(sum[:]),
		}))
	default:
		err = c.complete(path == "/chat/completions", rec.ID)
	}
	gone = err != nil && !errors.Is(err, errFault)
	if errors.Is(err, errFault) {
		switch c.fault.Mode {
		case ResetAfter:
			_ = c.rc.Flush()
			reset(w)
		case TruncatedBody: // net/http closes the connection with FIN
			_ = c.rc.Flush()
			panic(http.ErrAbortHandler)
		}
	}
}

// call is one request and its answer.
type call struct {
	s      *Server
	w      http.ResponseWriter
	rc     *http.ResponseController
	ctx    context.Context
	q      *query
	fault  Fault
	start  time.Time
	status int
}

func (c *call) is(m Mode) bool { return c.fault.Mode == m }

// until sleeps until t. An error means that the client has disconnected.
func (c *call) until(t time.Time) error {
	d := time.Until(t)
	if d <= 0 {
		return c.ctx.Err()
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-c.ctx.Done():
		return c.ctx.Err()
	case <-timer.C:
		return nil
	}
}

// forever waits until the client disconnects. If keepAlive is not empty it is sent each
// interval.
func (c *call) forever(keepAlive string) error {
	for keepAlive != "" {
		if err := c.until(time.Now().Add(c.fault.interval())); err != nil {
			return err
		}
		if err := c.send([]byte(keepAlive)); err != nil {
			return err
		}
	}
	<-c.ctx.Done()
	return c.ctx.Err()
}

func (c *call) send(b []byte) error {
	if _, err := c.w.Write(b); err != nil {
		return err
	}
	return c.rc.Flush()
}

// due is when token i of an answer may be sent.
func (c *call) due(i int) time.Time {
	t := c.start.Add(c.q.pace.first)
	if c.q.pace.rate > 0 {
		t = t.Add(time.Duration(float64(i) / c.q.pace.rate * float64(time.Second)))
	}
	return t
}

func (c *call) complete(chat bool, number uint64) error {
	question := c.q.Messages
	if !chat {
		question = c.q.Prompt
	}
	if len(question) == 0 {
		c.status = http.StatusBadRequest
		writeError(c.w, c.status, "invalid_request_error", "missing_required_parameter", "messages or prompt is missing")
		return nil
	}
	answers := make([]*answer, c.q.N)
	for i := range answers {
		answers[i] = c.q.compose(question, i)
	}
	sum := sha256.Sum256(c.q.body)
	id := hex.EncodeToString(sum[:6]) + "-" + strconv.FormatUint(number, 10)
	v := encoder{chat: chat, created: c.start.Unix(), model: mustJSON(c.q.Model), question: question}
	if v.id = "cmpl-" + id; chat {
		v.id = "chatcmpl-" + id
	}
	if c.q.Stream {
		return c.stream(v, answers)
	}
	if c.q.pace.rate > 0 {
		if err := c.until(c.due(len(answers[0].tokens) - 1)); err != nil {
			return err
		}
	} else if err := c.until(c.due(0)); err != nil {
		return err
	}
	return c.plain(v.whole(answers, c.fault))
}

// stream sends the tokens at the configured pace, and fails after Fault.After of them.
func (c *call) stream(v encoder, answers []*answer) error {
	h := c.w.Header()
	h["Content-Type"] = []string{"text/event-stream; charset=utf-8"}
	h["Cache-Control"] = []string{"no-cache"}
	c.status = http.StatusOK
	c.w.WriteHeader(c.status)
	var buf []byte
	for i := range answers {
		buf = v.role(buf, i)
	}
	if err := c.send(buf); err != nil {
		return err
	}
	if c.is(RoleOnlyThenEnd) {
		return c.send([]byte(done))
	}
	n := len(answers[0].tokens)
	fails := -1
	if c.fault.Mode != "" && !c.is(MissingDone) && !c.is(SlowDrip) {
		fails = min(c.fault.After, n)
	}
	for i := 0; ; i++ {
		if i == fails {
			return c.failStream(v, answers, i)
		}
		if i == n {
			break
		}
		due := c.due(i)
		if c.is(SlowDrip) {
			due = c.start.Add(c.fault.interval() * time.Duration(i+1))
		}
		if err := c.until(due); err != nil {
			return err
		}
		buf = buf[:0]
		for k, a := range answers {
			if i < len(a.tokens) {
				buf = v.token(buf, k, a, i)
			}
		}
		if err := c.send(buf); err != nil {
			return err
		}
	}
	buf = buf[:0]
	for k, a := range answers {
		buf = v.finish(buf, k, a.finish)
	}
	if c.q.StreamOptions.IncludeUsage {
		buf = v.usage(buf, measure(v.question, answers))
	}
	if !c.is(MissingDone) {
		buf = append(buf, done...)
	}
	return c.send(buf)
}

func (c *call) failStream(v encoder, answers []*answer, i int) error {
	switch c.fault.Mode {
	case Stall:
		return c.forever("")
	case StallComments:
		return c.forever(": keep-alive\n\n")
	case BadJSON:
		return c.send([]byte("data: {\"id\":\"" + v.id + "\",\"choices\":[{\"index\":0,\"delta\":{\"content\n\n" + done))
	case SilentEnd:
		return nil
	case ErrorEvent:
		return c.send([]byte("data: " + errorBody + "\n\n"))
	case InsufficientResource:
		return c.send(append(v.finish(nil, 0, string(InsufficientResource)), done...))
	case TruncatedBody:
		whole := v.token(nil, 0, answers[0], min(i, len(answers[0].tokens)-1))
		if err := c.send(whole[:len(whole)/2]); err != nil {
			return err
		}
	}
	return errFault // the caller cuts the connection
}

const (
	done      = "data: [DONE]\n\n"
	errorBody = `{"error":{"message":"simulated error","type":"server_error","param":null,"code":"simulated"}}`
)

// plain sends a JSON body, changed as the fault requires.
func (c *call) plain(body []byte) error {
	switch c.fault.Mode {
	case Stall:
		return c.forever("")
	case BadJSON:
		body = body[:len(body)-2]
	case SilentEnd:
		body = nil
	case ErrorEvent:
		body = []byte(errorBody)
	}
	h := c.w.Header()
	h["Content-Type"] = []string{"application/json"}
	c.status = http.StatusOK
	if c.is(StallComments) {
		c.w.WriteHeader(c.status)
		return c.forever("\n")
	}
	h["Content-Length"] = []string{strconv.Itoa(len(body))}
	c.w.WriteHeader(c.status)
	switch c.fault.Mode {
	case ResetAfter, TruncatedBody:
		if err := c.send(body[:len(body)/2]); err != nil {
			return err
		}
		return errFault
	case SlowDrip:
		for i := range body {
			if err := c.until(c.start.Add(c.fault.interval() * time.Duration(i+1))); err != nil {
				return err
			}
			if err := c.send(body[i : i+1]); err != nil {
				return err
			}
		}
		return nil
	}
	_, err := c.w.Write(body)
	return err
}

func mustJSON(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil { // values are of types that always marshal
		panic(err)
	}
	return b
}
