package serving

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"

	"github.com/dsnode/dsnode/node/openai"
)

const (
	// maxHeld bounds what is kept of a stream before its first content.
	maxHeld = 256 << 10
	// afterDone is how long the end of a finished stream is waited for, so that
	// its connection can be used again.
	afterDone = 50 * time.Millisecond
)

// held are events that wait for the first content.
type held struct {
	bytes []byte
	ends  []int
}

var heldBuffers = sync.Pool{New: func() any { return &held{bytes: make([]byte, 0, 1024), ends: make([]int, 0, 4)} }}

// relay passes one stream on.
type relay struct {
	*attempt
	wait    *held // nil once Head was called
	sent    bool
	scratch []byte // a rewritten event
	// What every chunk of one stream must agree on, quoted as it came.
	id, created, model []byte
	all                openai.Answer // the choices of all events
}

func (a *attempt) stream(resp *http.Response) outcome {
	events := openai.NewEventReader(resp.Body, a.flush)
	defer events.Release()
	if !a.r.Endpoint.Completes {
		return a.streamAnything(events)
	}
	s := relay{attempt: a, wait: heldBuffers.Get().(*held), model: a.shownModel()} //nolint:errcheck // the pool holds nothing else
	defer s.letGo()
	o := s.run(events)
	o.sent = s.sent
	return o
}

func (s *relay) letGo() {
	if s.wait != nil && cap(s.wait.bytes) <= 64<<10 {
		s.wait.bytes, s.wait.ends = s.wait.bytes[:0], s.wait.ends[:0]
		heldBuffers.Put(s.wait)
	}
	s.wait = nil
}

// run reads events until the answer is complete or has failed.
func (s *relay) run(events *openai.EventReader) outcome {
	for {
		ev, err := events.Next()
		if err != nil {
			return s.ended(err)
		}
		if len(ev.Data) == 0 {
			continue // comments and empty events move no timer and say nothing
		}
		if bytes.Equal(ev.Data, openai.DoneData) {
			if !s.all.Complete() {
				return s.truncated(errors.New("[DONE] came before a finish_reason"))
			}
			if err := s.finish(ev.Raw); err != nil {
				return outcome{result: resultCancelled, err: err}
			}
			s.w.atMost(afterDone)
			events.Drain()
			return outcome{result: resultOK}
		}
		if o := s.chunk(ev); o.result != resultOK {
			return o
		}
	}
}

// chunk judges one event and passes it on or holds it.
func (s *relay) chunk(ev openai.Event) outcome {
	found, ok := openai.ScanAnswer(ev.Data)
	switch {
	case !ok:
		return outcome{result: resultBadAnswer, err: fmt.Errorf("%w: an event is no JSON object: %s", ErrUpstreamFailed, excerpt(ev.Data))}
	case found.Error != openai.Span{}:
		return s.errorInside(ev.Data, found.Error.In(ev.Data))
	case string(ev.Kind) == "error":
		return s.errorInside(ev.Data, ev.Data)
	case found.Exhausted:
		return outcome{result: resultExhausted, err: fmt.Errorf("%w: insufficient system resource", ErrUpstreamFailed)}
	}
	if found.Usage != (openai.Span{}) {
		s.count(found.Usage.In(ev.Data))
		if found.Choices == 0 && found.HasChoices && s.stripUsage {
			return outcome{}
		}
	}
	s.all.Join(&found)
	begins := found.Content || found.Finished()
	if begins {
		s.w.content(found.Tokens())
	}
	raw := s.uniform(ev, &found)
	if s.wait == nil {
		return s.pass(raw)
	}
	if !begins {
		if len(s.wait.bytes)+len(raw) > maxHeld {
			return outcome{result: resultBadAnswer, err: fmt.Errorf("%w: %d bytes without content", ErrUpstreamFailed, maxHeld)}
		}
		s.wait.bytes = append(s.wait.bytes, raw...)
		s.wait.ends = append(s.wait.ends, len(s.wait.bytes))
		return outcome{}
	}
	return s.begin(raw)
}

// begin is the point of no return: the head, what was held, the first content.
func (s *relay) begin(raw []byte) outcome {
	s.reached()
	s.w.committed()
	s.sent = true
	if err := s.sink.Head(s.head); err != nil {
		return outcome{result: resultCancelled, err: &sinkError{err}}
	}
	from := 0
	for _, to := range s.wait.ends {
		if o := s.pass(s.wait.bytes[from:to]); o.result != resultOK {
			return o
		}
		from = to
	}
	s.letGo()
	return s.pass(raw)
}

func (s *relay) pass(raw []byte) outcome {
	if err := s.send(raw); err != nil {
		return outcome{result: resultCancelled, err: err}
	}
	return outcome{}
}

// send gives an event to the client. Until flush, a sink may keep it for the
// company of those that came with it.
func (a *attempt) send(event []byte) (err error) {
	from := a.w.beginWrite()
	if b, ok := a.sink.(Batcher); ok {
		a.held = true
		err = b.Hold(event)
	} else {
		err = a.sink.Data(event)
	}
	a.w.endWrite(from)
	if err != nil {
		return &sinkError{err}
	}
	return nil
}

// flush lets the client have what was sent, before more is waited for.
func (a *attempt) flush() error {
	b, ok := a.sink.(Batcher)
	if !ok || !a.held {
		return nil
	}
	a.held = false
	from := a.w.beginWrite()
	err := b.Flush()
	a.w.endWrite(from)
	if err != nil {
		return &sinkError{err}
	}
	return nil
}

// uniform gives the event as the client sees it: one id, created and model in
// the whole stream, and the model under its public name. Mostly that is the
// event as it came.
func (s *relay) uniform(ev openai.Event, found *openai.Answer) []byte {
	var edits [3]openai.Edit
	n := 0
	add := func(at openai.Span, want *[]byte) {
		if at == (openai.Span{}) {
			return
		}
		have := at.In(ev.Data)
		switch {
		case *want == nil:
			*want = bytes.Clone(have)
		case !bytes.Equal(have, *want):
			edits[n] = openai.Edit{At: at, With: *want}
			n++
		}
	}
	add(found.ID, &s.id)
	add(found.Created, &s.created)
	add(found.Model, &s.model)
	if n == 0 {
		return ev.Raw
	}
	s.scratch = ev.Append(s.scratch[:0], edits[:n]...)
	return s.scratch
}

// finish ends the answer towards the client.
func (s *relay) finish(done []byte) error {
	if err := s.sink.Data(done); err != nil {
		return &sinkError{err}
	}
	return nil
}

// ended judges a stream that stopped without [DONE].
func (s *relay) ended(err error) outcome {
	switch {
	case errors.Is(err, openai.ErrEventTooLarge):
		return outcome{result: resultBadAnswer, err: fmt.Errorf("%w: %w", ErrUpstreamFailed, err)}
	case !errors.Is(err, io.EOF):
		if s.wait != nil {
			return outcome{result: resultReset, err: fmt.Errorf("%w: %w", ErrUpstreamFailed, err)}
		}
		return s.truncated(err)
	case !s.all.Complete():
		return s.truncated(errNoFinish)
	}
	if err := s.finish(openai.DoneEvent); err != nil { // some servers leave it out
		return outcome{result: resultCancelled, err: err}
	}
	return outcome{result: resultOK}
}

var errNoFinish = errors.New("the stream ended without a finish_reason")

func (s *relay) truncated(why error) outcome {
	return outcome{result: resultTruncated, err: fmt.Errorf("%w: %w", ErrTruncated, why)}
}

// streamAnything passes a stream on whose grammar is not ours to know: its
// first event is its first content, its end is the end of the body.
func (a *attempt) streamAnything(events *openai.EventReader) outcome {
	sent := false
	for {
		ev, err := events.Next()
		switch {
		case err != nil && !sent && errors.Is(err, io.EOF):
			return outcome{result: resultTruncated, err: fmt.Errorf("%w: %w", ErrTruncated, errNoContent)}
		case errors.Is(err, io.EOF):
			if err := a.flush(); err != nil {
				return outcome{result: resultCancelled, sent: true, err: err}
			}
			return outcome{result: resultOK, sent: true}
		case err != nil && !sent:
			return outcome{result: resultReset, err: fmt.Errorf("%w: %w", ErrUpstreamFailed, err)}
		case err != nil:
			return outcome{result: resultTruncated, sent: true, err: fmt.Errorf("%w: %w", ErrTruncated, err)}
		case !ev.HasData:
			continue
		}
		a.w.progress()
		if !sent {
			found, ok := openai.ScanAnswer(ev.Data)
			switch {
			case ok && found.Error != openai.Span{}:
				return a.errorInside(ev.Data, found.Error.In(ev.Data))
			case string(ev.Kind) == "error":
				return a.errorInside(ev.Data, ev.Data)
			}
			sent = true
			a.reached()
			a.w.committed()
			if err := a.sink.Head(a.head); err != nil {
				return outcome{result: resultCancelled, sent: true, err: &sinkError{err}}
			}
		}
		if err := a.send(ev.Raw); err != nil {
			return outcome{result: resultCancelled, sent: true, err: err}
		}
	}
}
