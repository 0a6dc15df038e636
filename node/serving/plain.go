package serving

import (
	"bytes"
	"errors"
	"io"
	"net/http"
	"sync"

	"github.com/dsnode/dsnode/cluster/cause"
	"github.com/dsnode/dsnode/node/openai"
	"github.com/dsnode/dsnode/node/upstream"
)

// maxAnswer bounds a plain body, which is held until it is whole.
const maxAnswer = 32 << 20

const (
	errTooLong = cause.Words("the answer is larger than 32 MiB")
	// errExhausted is DeepSeek's finish_reason insufficient_system_resource.
	errExhausted = cause.Words("insufficient system resource")
	errNotStream = cause.Words("a plain answer where a stream was asked for")
	errNoChoices = cause.Words("an answer without choices")
)

var plainBuffers = sync.Pool{New: func() any { b := make([]byte, 0, 16<<10); return &b }}

// plain reads a whole answer before anything is passed on: whatever is wrong with it,
// another server can still answer.
func (a *attempt) plain(resp *http.Response) outcome {
	buf := plainBuffers.Get().(*[]byte) //nolint:errcheck // the pool holds nothing else
	body, err := a.readBody(resp, (*buf)[:0])
	defer func() {
		if cap(body) <= 256<<10 {
			*buf = body[:0]
			plainBuffers.Put(buf)
		}
	}()
	if errors.Is(err, errTooLong) {
		return failed(upstream.BadAnswer, err)
	}
	if err != nil {
		return failed(upstream.Truncated, err)
	}
	shown, o := a.judgePlain(resp, body)
	if o.Result != upstream.OK {
		return o
	}
	a.content()
	a.head.Length = int64(len(shown))
	o.sent = true
	err = a.sink.Head(a.head)
	if err == nil && len(shown) > 0 {
		err = a.sink.Data(shown)
	}
	if err != nil {
		o.Result, o.Err = upstream.Cancelled, &sinkError{err}
	}
	return o
}

// readBody reads all of a body, bounded. DeepSeek sends white space before an answer
// to keep the connection alive; it moves no timer.
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
	e := a.r.Endpoint
	known := e.Completes || e.Embeds
	if !known && (len(body) == 0 || !isType(resp.Header, "application/json")) {
		return body, outcome{}
	}
	found, ok := openai.ScanAnswer(body)
	switch {
	case !ok && !known && openai.Valid(body):
		return body, outcome{} // a bare list, for example
	case !ok:
		return nil, failed(upstream.BadAnswer, a.described("no JSON object", resp, body, nil))
	case found.Error != openai.Span{}:
		return nil, a.errorInside(resp, body, found.Error.In(body))
	case !e.Completes:
	case a.r.Stream:
		return nil, failed(upstream.BadAnswer, errNotStream)
	case found.Choices == 0:
		return nil, failed(upstream.BadAnswer, errNoChoices)
	case found.Exhausted:
		return nil, failed(upstream.Exhausted, errExhausted)
	}
	if found.Usage != (openai.Span{}) {
		a.count(found.Usage.In(body))
	}
	if name := a.shownModel(); name != nil && found.Model != (openai.Span{}) {
		body = openai.Splice(body, openai.Edit{At: found.Model, With: name})
	}
	return body, outcome{}
}
