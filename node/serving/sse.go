package serving

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"sync"
)

// maxEvent bounds one server-sent event.
const maxEvent = 1 << 20

var errEventTooLarge = fmt.Errorf("event larger than %d bytes", maxEvent)

// event is one server-sent event. Its bytes are valid until the next call of
// next.
type event struct {
	raw  []byte // as it came, with its final blank line; always ends a line
	data []byte // data lines joined by \n; nil when there was none
	kind []byte // the event: field
	has  bool   // a data line was there, even an empty one
}

// eventReader cuts a stream into events. Lines end with \n, \r\n or \r. Where
// an event ends depends on the bytes alone, never on how they were chunked:
// a blank line is ended by \r at once, and a \n after it is dropped, unless
// the line before ended with \r\n, where the \n is waited for.
type eventReader struct {
	r       io.Reader
	buf     []byte
	start   int  // of the event not yet returned
	line    int  // start of the current line
	pos     int  // searched for a line end up to here
	end     int  // of the bytes read
	crlf    bool // the line before ended with \r\n
	skipLF  bool // the last event ended with a bare \r
	began   bool // past a byte order mark
	err     error
	scratch []byte // joined data of events with several data lines
	// before, unless nil, is called when more bytes have to be waited for. Its
	// error ends the stream.
	before func() error
}

var eventBuffers = sync.Pool{New: func() any { b := make([]byte, 16<<10); return &b }}

// newEventReader borrows a buffer; release gives it back.
func newEventReader(r io.Reader) *eventReader {
	b := eventBuffers.Get().(*[]byte) //nolint:errcheck // the pool holds nothing else
	return &eventReader{r: r, buf: *b}
}

func (e *eventReader) release() {
	if cap(e.buf) <= 64<<10 { // a big one was rare: let it go
		b := e.buf[:cap(e.buf)]
		eventBuffers.Put(&b)
	}
	e.buf = nil
}

// next returns the next event, comment-only ones included (has is false).
// io.EOF is a clean end; a last event that lacks its blank line is completed.
func (e *eventReader) next() (event, error) {
	for {
		if from, to, ok := e.cut(); ok {
			ev := e.parse(from, to)
			if len(ev.raw) == 0 {
				continue // blank lines only
			}
			return ev, nil
		}
		if e.err != nil {
			return e.last()
		}
		e.fill()
	}
}

// cut finds the end of the current event among the bytes at hand.
func (e *eventReader) cut() (from, to int, ok bool) {
	if !e.began && !e.pastMark() {
		return 0, 0, false
	}
	if e.skipLF && e.start < e.end {
		if e.buf[e.start] == '\n' {
			e.start++
			e.line, e.pos = e.start, e.start
		}
		e.skipLF = false
	}
	for e.pos < e.end {
		i := lineEnd(e.buf[e.pos:e.end])
		if i < 0 {
			e.pos = e.end
			return 0, 0, false
		}
		i += e.pos
		blank := i == e.line
		width, crlf := 1, false
		if e.buf[i] == '\r' && (!blank || e.crlf) {
			if i+1 == e.end && e.err == nil {
				e.pos = i
				return 0, 0, false
			}
			if i+1 < e.end && e.buf[i+1] == '\n' {
				width, crlf = 2, true
			}
		}
		if blank {
			e.skipLF = e.buf[i] == '\r' && width == 1
			from, to = e.start, i+width
			e.start, e.line, e.pos, e.crlf = to, to, to, false
			return from, to, true
		}
		e.line, e.pos, e.crlf = i+width, i+width, crlf
	}
	return 0, 0, false
}

// pastMark skips a byte order mark; false while too little is known.
func (e *eventReader) pastMark() bool {
	mark := []byte("\xef\xbb\xbf")
	have := e.buf[:e.end]
	if len(have) < len(mark) && bytes.HasPrefix(mark, have) && e.err == nil {
		return false
	}
	if bytes.HasPrefix(have, mark) {
		e.start, e.line, e.pos = len(mark), len(mark), len(mark)
	}
	e.began = true
	return true
}

func lineEnd(b []byte) int {
	n := bytes.IndexByte(b, '\n')
	if n < 0 {
		return bytes.IndexByte(b, '\r')
	}
	if r := bytes.IndexByte(b[:n], '\r'); r >= 0 {
		return r
	}
	return n
}

// fill reads more, making room first.
func (e *eventReader) fill() {
	if e.before != nil {
		if e.err = e.before(); e.err != nil {
			return
		}
	}
	if e.start > 0 {
		n := copy(e.buf, e.buf[e.start:e.end])
		e.line -= e.start
		e.pos -= e.start
		e.end, e.start = n, 0
	}
	if e.end == len(e.buf) {
		if len(e.buf) >= maxEvent+64 {
			e.err = errEventTooLarge
			e.end = 0
			e.line, e.pos = 0, 0
			return
		}
		grown := make([]byte, min(2*len(e.buf), maxEvent+64))
		copy(grown, e.buf[:e.end])
		e.buf = grown
	}
	for range 100 {
		n, err := e.r.Read(e.buf[e.end:])
		e.end += n
		if err != nil {
			e.err = err
			return
		}
		if n > 0 {
			return
		}
	}
	e.err = io.ErrNoProgress
}

// last hands out what stands after the last blank line of a stream that ended
// cleanly, some servers leave out the final one.
func (e *eventReader) last() (event, error) {
	rest := e.buf[e.start:e.end]
	if !errors.Is(e.err, io.EOF) || len(bytes.TrimRight(rest, "\r\n")) == 0 {
		e.start, e.end = 0, 0
		return event{}, e.err
	}
	whole := append(bytes.TrimRight(rest, "\r\n"), '\n', '\n')
	e.buf, e.start, e.end = whole, len(whole), len(whole)
	e.line, e.pos = e.end, e.end
	return e.parse(0, len(whole)), nil
}

// parse reads the fields of the event in buf[from:to].
func (e *eventReader) parse(from, to int) event {
	raw := e.buf[from:to]
	var ev event
	lines := 0
	for rest := raw; len(rest) > 0; {
		i := lineEnd(rest)
		if i < 0 {
			i = len(rest)
		}
		line := rest[:i]
		rest = rest[min(i+1, len(rest)):]
		if len(line) == 0 || line[0] == ':' {
			continue
		}
		name, value, _ := bytes.Cut(line, []byte(":"))
		if len(value) > 0 && value[0] == ' ' {
			value = value[1:]
		}
		switch string(name) {
		case "data":
			lines++
			ev.has = true
			switch lines {
			case 1:
				ev.data = value
			case 2:
				e.scratch = append(append(append(e.scratch[:0], ev.data...), '\n'), value...)
				ev.data = e.scratch
			default:
				e.scratch = append(append(e.scratch, '\n'), value...)
				ev.data = e.scratch
			}
		case "event":
			ev.kind = value
		}
	}
	if len(bytes.TrimRight(raw, "\r\n")) > 0 {
		ev.raw = raw
	}
	return ev
}
