package openai

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"sync"
)

// MaxEvent bounds one server-sent event.
const MaxEvent = 1 << 20

// ErrEventTooLarge ends a stream with an event beyond MaxEvent.
var ErrEventTooLarge = fmt.Errorf("event larger than %d bytes", MaxEvent)

// DoneData is the data of the event that ends a stream of choices, DoneEvent the
// whole event.
var (
	DoneData  = []byte("[DONE]")
	DoneEvent = []byte("data: [DONE]\n\n")
)

// Event is one server-sent event. Its bytes are valid until the next call of
// Next.
type Event struct {
	Raw     []byte // as it came, with its final blank line; always ends a line
	Data    []byte // data lines joined by \n
	HasData bool   // a data line was there, even an empty one
	Kind    []byte // the event: field
}

// Append appends the event with its data edited. The data must be JSON: line ends
// within it, which would end a data line, become spaces.
func (ev *Event) Append(dst []byte, edits ...Edit) []byte {
	if len(ev.Kind) > 0 {
		dst = append(append(append(dst, "event: "...), ev.Kind...), '\n')
	}
	dst = append(dst, "data: "...)
	from := len(dst)
	dst = spliceInto(dst, ev.Data, edits...)
	for i := from; i < len(dst); i++ {
		if dst[i] == '\n' || dst[i] == '\r' {
			dst[i] = ' '
		}
	}
	return append(dst, "\n\n"...)
}

// EventReader cuts a stream into events. Lines end with \n, \r\n or \r. Where
// an event ends depends on the bytes alone, never on how they were chunked:
// \r ends a blank line at once, and a \n after it is dropped. Only when the line
// before ended with \r\n does the reader wait for the \n.
type EventReader struct {
	r       io.Reader
	wait    func() error
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
}

var eventBuffers = sync.Pool{New: func() any { b := make([]byte, 16<<10); return &b }}

// NewEventReader borrows a buffer; Release gives it back. wait, unless nil, is
// called before each read from r; its error ends the stream.
func NewEventReader(r io.Reader, wait func() error) *EventReader {
	b := eventBuffers.Get().(*[]byte) //nolint:errcheck // the pool holds nothing else
	return &EventReader{r: r, wait: wait, buf: *b}
}

// Release gives the buffer back. Events are no longer valid then.
func (e *EventReader) Release() {
	if cap(e.buf) <= 64<<10 { // a big one is rare and not kept
		b := e.buf[:cap(e.buf)]
		eventBuffers.Put(&b)
	}
	e.buf = nil
}

// Next returns the next event, comments without data included. io.EOF is a clean
// end; a last event that lacks its blank line is completed.
func (e *EventReader) Next() (Event, error) {
	for {
		if from, to, ok := e.cut(); ok {
			ev := e.parse(from, to)
			if len(ev.Raw) == 0 {
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

// Drain reads and drops what little may be left of a stream that is over, so that
// its connection can be used again.
func (e *EventReader) Drain() {
	if e.err != nil {
		return
	}
	var rest [512]byte
	for range 8 {
		if _, err := e.r.Read(rest[:]); err != nil {
			return
		}
	}
}

// cut finds the end of the current event among the bytes at hand.
func (e *EventReader) cut() (from, to int, ok bool) {
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

// pastMark skips a byte order mark; false while too few bytes have come.
func (e *EventReader) pastMark() bool {
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

// fill reads more, after it has made room.
func (e *EventReader) fill() {
	if e.wait != nil {
		if e.err = e.wait(); e.err != nil {
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
		if len(e.buf) >= MaxEvent+64 {
			e.err = ErrEventTooLarge
			e.end = 0
			e.line, e.pos = 0, 0
			return
		}
		grown := make([]byte, min(2*len(e.buf), MaxEvent+64))
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

// last returns what stands after the last blank line of a stream that ended
// cleanly: some servers leave out the final blank line.
func (e *EventReader) last() (Event, error) {
	rest := e.buf[e.start:e.end]
	if !errors.Is(e.err, io.EOF) || len(bytes.TrimRight(rest, "\r\n")) == 0 {
		e.start, e.end = 0, 0
		return Event{}, e.err
	}
	whole := append(bytes.TrimRight(rest, "\r\n"), '\n', '\n')
	e.buf, e.start, e.end = whole, len(whole), len(whole)
	e.line, e.pos = e.end, e.end
	return e.parse(0, len(whole)), nil
}

// parse reads the fields of the event in buf[from:to].
func (e *EventReader) parse(from, to int) Event {
	raw := e.buf[from:to]
	var ev Event
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
			ev.HasData = true
			switch lines {
			case 1:
				ev.Data = value
			case 2:
				e.scratch = append(append(append(e.scratch[:0], ev.Data...), '\n'), value...)
				ev.Data = e.scratch
			default:
				e.scratch = append(append(e.scratch, '\n'), value...)
				ev.Data = e.scratch
			}
		case "event":
			ev.Kind = value
		}
	}
	if len(bytes.TrimRight(raw, "\r\n")) > 0 {
		ev.Raw = raw
	}
	return ev
}
