package serving

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"

	"github.com/dsnode/dsnode/node/openai"
)

var plainBuffers = sync.Pool{New: func() any { b := make([]byte, 0, 16<<10); return &b }}

// plain reads a whole answer before anything is passed on, so that whatever is
// wrong with it can still be another upstream's turn.
func (a *attempt) plain(resp *http.Response) outcome {
	buf := plainBuffers.Get().(*[]byte) //nolint:errcheck // the pool holds nothing else
	body, err := a.readBody(resp, (*buf)[:0])
	defer func() {
		if cap(body) <= 256<<10 {
			*buf = body[:0]
			plainBuffers.Put(buf)
		}
	}()
	if err != nil {
		if errors.Is(err, errTooLong) {
			return outcome{result: resultBadAnswer, err: err}
		}
		return outcome{result: resultTruncated, err: fmt.Errorf("%w: %w", ErrTruncated, err)}
	}
	shown, o := a.judgePlain(resp, body)
	if o.result != resultOK {
		return o
	}
	a.reached()
	a.head.Length = int64(len(shown))
	if err := a.sink.Head(a.head); err != nil {
		return outcome{result: resultCancelled, sent: true, err: &sinkError{err}}
	}
	if len(shown) > 0 {
		if err := a.sink.Data(shown); err != nil {
			return outcome{result: resultCancelled, sent: true, err: &sinkError{err}}
		}
	}
	return outcome{result: resultOK, sent: true}
}

var errTooLong = fmt.Errorf("answer larger than %d bytes", maxAnswer)

// readBody reads all of it, bounded. Leading white space is a keep-alive
// (DeepSeek) and moves no timer.
func (a *attempt) readBody(resp *http.Response, body []byte) ([]byte, error) {
	if n := resp.ContentLength; n > maxAnswer {
		return body, errTooLong
	} else if n >= int64(cap(body)) {
		body = make([]byte, 0, n+1) // one more, so that the end is seen without growing
	}
	began := false
	for {
		if len(body) == cap(body) {
			if len(body) >= maxAnswer {
				return body, errTooLong
			}
			body = append(body, 0)[:len(body)]
		}
		n, err := resp.Body.Read(body[len(body):cap(body)])
		body = body[:len(body)+n]
		if !began && n > 0 {
			if len(bytes.TrimLeft(body, " \t\r\n")) == 0 {
				body = body[:0]
			} else {
				began = true
			}
		}
		if began && n > 0 && err == nil {
			a.w.progress()
		}
		if errors.Is(err, io.EOF) {
			return body, nil
		}
		if err != nil {
			return body, err
		}
	}
}

// judgePlain looks into a 2xx body and gives what the client is shown.
func (a *attempt) judgePlain(resp *http.Response, body []byte) ([]byte, outcome) {
	known := a.r.Endpoint.Completes || a.r.Endpoint.Embeds
	isJSON := isType(resp.Header, "application/json")
	if !known && (!isJSON || len(body) == 0) {
		return body, outcome{}
	}
	found, ok := openai.ScanAnswer(body)
	switch {
	case !ok && !known && openai.Valid(body):
		return body, outcome{} // a bare list, say
	case !ok:
		return nil, outcome{result: resultBadAnswer, err: fmt.Errorf("%w: the answer is no JSON object: %s", ErrUpstreamFailed, excerpt(body))}
	case found.Error != openai.Span{}:
		return nil, a.errorInside(body, found.Error.In(body))
	case !a.r.Endpoint.Completes:
	case a.r.Stream:
		return nil, outcome{result: resultBadAnswer, err: fmt.Errorf("%w: a plain answer where a stream was asked for", ErrUpstreamFailed)}
	case !found.HasChoices || found.Choices == 0:
		return nil, outcome{result: resultBadAnswer, err: fmt.Errorf("%w: an answer without choices", ErrUpstreamFailed)}
	case found.Exhausted:
		return nil, outcome{result: resultExhausted, err: fmt.Errorf("%w: insufficient system resource", ErrUpstreamFailed)}
	}
	if found.Usage != (openai.Span{}) {
		a.count(found.Usage.In(body))
	}
	if name := a.shownModel(); name != nil && found.Model != (openai.Span{}) {
		body = openai.Splice(body, openai.Edit{At: found.Model, With: name})
	}
	return body, outcome{}
}

// shownModel is the name that the client sees, nil when the answer's own
// stands. A server's private name for a model would tell which one answered.
// For a fallback it is the fallback's public name: the client may know.
func (a *attempt) shownModel() []byte {
	if a.peer != nil || a.target.serves == nil {
		return nil
	}
	return a.model.quoted
}

// errorInside judges an error that came under a 200: about the request itself
// (the client's to see) or about the server.
func (a *attempt) errorInside(document, member []byte) outcome {
	kind, code := openai.ErrorKind(member)
	err := fmt.Errorf("%w: error under a 200: %s", ErrUpstreamFailed, excerpt(member))
	status := 0
	switch {
	case code == "400" || code == "413" || code == "422":
		status = http.StatusBadRequest
	case code == "429":
		return outcome{result: resultRateLimited, err: err}
	case code == "" || code == "null" || strings.TrimLeft(code, "0123456789") != "":
		if strings.HasPrefix(kind, "invalid_request") || kind == "BadRequestError" {
			status = http.StatusBadRequest
		}
	}
	if status == 0 {
		return outcome{result: resultErrorEvent, err: err}
	}
	return outcome{result: resultClientError, err: err, status: &StatusError{
		Status: status, Header: http.Header{"Content-Type": jsonType}, Body: bytes.Clone(document),
		Upstream: a.head.Upstream, Site: a.head.Site, Attempts: a.head.Attempts,
	}}
}
