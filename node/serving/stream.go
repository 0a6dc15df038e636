package serving

import (
	"bytes"
	"errors"
	"io"
	"net/http"
	"sync"
	"time"

	"github.com/dsnode/dsnode/cluster/cause"
	"github.com/dsnode/dsnode/node/openai"
	"github.com/dsnode/dsnode/node/upstream"
)

const (
	// maxHeld bounds what is kept of a stream before its first content.
	maxHeld = 256 << 10
	// afterDone is how long the end of a finished stream is waited for, so that its
	// connection can be used again.
	afterDone = 50 * time.Millisecond
)

const (
	errNoContent   = cause.Words("the stream ended without content")
	errNoFinish    = cause.Words("the stream ended without a finish_reason")
	errEarlyDone   = cause.Words("[DONE] came before a finish_reason")
	errLongSilence = cause.Words("256 KiB of events without content")
	errLongEvent   = cause.Words("an event is larger than 1 MiB")
)

// held are events that wait for the first content.
type held struct {
	bytes []byte
	ends  []int
}

var heldBuffers = sync.Pool{New: func() any { return &held{bytes: make([]byte, 0, 1024), ends: make([]int, 0, 4)} }}

// relay passes on one stream of choices.
type relay struct {
	*attempt
	resp    *http.Response
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
		return a.streamUnknown(resp, events)
	}
	s := relay{attempt: a, resp: resp, wait: heldBuffers.Get().(*held), model: a.shownModel()} //nolint:errcheck // the pool holds nothing else
	defer s.releaseHeld()
	o := s.run(events)
	o.sent = s.sent
	return o
}

func (s *relay) releaseHeld() {
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
			continue // comments and empty events move no timer and are not passed on
		}
		if bytes.Equal(ev.Data, openai.DoneData) {
			if !s.all.Complete() {
				return failed(upstream.Truncated, errEarlyDone)
			}
			o := s.finish(ev.Raw)
			if o.Result == upstream.OK {
				s.w.atMost(afterDone)
				events.Drain()
			}
			return o
		}
		if o := s.chunk(&ev); o.Result != upstream.OK {
			return o
		}
	}
}

// chunk judges one event and passes it on or holds it.
func (s *relay) chunk(ev *openai.Event) outcome {
	found, ok := openai.ScanAnswer(ev.Data)
	switch {
	case !ok:
		return failed(upstream.BadAnswer, s.described("an event is no JSON object", s.resp, ev.Data, nil))
	case found.Error != openai.Span{}:
		return s.errorInside(s.resp, ev.Data, found.Error.In(ev.Data))
	case string(ev.Kind) == "error":
		return s.errorInside(s.resp, ev.Data, ev.Data)
	case found.Exhausted:
		return failed(upstream.Exhausted, errExhausted)
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
		return sunk(s.send(raw))
	}
	if !begins {
		if len(s.wait.bytes)+len(raw) > maxHeld {
			return failed(upstream.BadAnswer, errLongSilence)
		}
		s.wait.bytes = append(s.wait.bytes, raw...)
		s.wait.ends = append(s.wait.ends, len(s.wait.bytes))
		return outcome{}
	}
	return sunk(s.begin(raw))
}

// begin sends the head, what was held, and the first content. From here on no other
// server can answer.
func (s *relay) begin(raw []byte) error {
	s.content()
	s.w.committed()
	s.sent = true
	if err := s.sink.Head(s.head); err != nil {
		return err
	}
	from := 0
	for _, to := range s.wait.ends {
		if err := s.send(s.wait.bytes[from:to]); err != nil {
			return err
		}
		from = to
	}
	s.releaseHeld()
	return s.send(raw)
}

// sunk is the outcome of a call of the sink: its error means that the client has gone.
func sunk(err error) outcome {
	if err != nil {
		return failed(upstream.Cancelled, &sinkError{err})
	}
	return outcome{}
}

// send gives an event to the client. A Batcher may keep it until flush, to send it
// together with others that came with it.
func (a *attempt) send(event []byte) (err error) {
	from := a.w.beginWrite()
	if b, ok := a.sink.(Batcher); ok {
		a.held = true
		err = b.Hold(event)
	} else {
		err = a.sink.Data(event)
	}
	a.w.endWrite(from)
	return err
}

// flush sends what the sink holds, before more is waited for.
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

// uniform gives the event as the client sees it: one id, created and model in the
// whole stream, and the model under its public name. Mostly that is the event as it
// came.
func (s *relay) uniform(ev *openai.Event, found *openai.Answer) []byte {
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
func (s *relay) finish(done []byte) outcome { return sunk(s.sink.Data(done)) }

// ended judges a stream that stopped without [DONE].
func (s *relay) ended(err error) outcome {
	switch {
	case errors.Is(err, openai.ErrEventTooLarge):
		return failed(upstream.BadAnswer, errLongEvent)
	case !errors.Is(err, io.EOF) && s.wait != nil:
		return failed(upstream.Reset, err)
	case !errors.Is(err, io.EOF):
		return failed(upstream.Truncated, err)
	case !s.all.Complete():
		return failed(upstream.Truncated, errNoFinish)
	}
	return s.finish(openai.DoneEvent) // some servers leave it out
}

// streamUnknown passes on a stream whose format is not known: its first event is its
// first content, its end is the end of the body.
func (a *attempt) streamUnknown(resp *http.Response, events *openai.EventReader) (o outcome) {
	sent := false
	defer func() { o.sent = sent }()
	for {
		ev, err := events.Next()
		switch {
		case errors.Is(err, io.EOF) && !sent:
			return failed(upstream.Truncated, errNoContent)
		case errors.Is(err, io.EOF):
			if err := a.flush(); err != nil {
				return failed(upstream.Cancelled, err)
			}
			return outcome{}
		case errors.Is(err, openai.ErrEventTooLarge):
			return failed(upstream.BadAnswer, errLongEvent)
		case err != nil && !sent:
			return failed(upstream.Reset, err)
		case err != nil:
			return failed(upstream.Truncated, err)
		case !ev.HasData:
			continue
		}
		a.w.progress()
		if !sent {
			found, ok := openai.ScanAnswer(ev.Data)
			switch {
			case ok && found.Error != openai.Span{}:
				return a.errorInside(resp, ev.Data, found.Error.In(ev.Data))
			case string(ev.Kind) == "error":
				return a.errorInside(resp, ev.Data, ev.Data)
			}
			sent = true
			a.content()
			a.w.committed()
			if err := a.sink.Head(a.head); err != nil {
				return sunk(err)
			}
		}
		if err := a.send(ev.Raw); err != nil {
			return sunk(err)
		}
	}
}
