package serving

// maxDepth bounds the nesting of an upstream's JSON; deeper is malformed.
const maxDepth = 256

// answer is what one pass over an upstream's JSON finds: a whole plain body or
// the data of one stream event. Spans are raw values (strings with quotes) and
// zero when the member is absent.
type answer struct {
	id, created, model Span
	usage              Span // present and not null
	errAt              Span // top-level "error", present and not null
	hasChoices         bool
	choices            int
	text               int    // bytes of that, as JSON has them
	content            bool   // some choice carries text, reasoning, a refusal or a tool call
	seen, finished     uint64 // bit per choice index (0..63): met, has a finish_reason
	exhausted          bool   // finish_reason insufficient_system_resource (DeepSeek)
}

// scanAnswer reads one JSON object without decoding or allocating. It checks
// the whole grammar, so a truncated or garbled body is never ok. Bytes after
// the object other than white space are not ok either.
func scanAnswer(b []byte) (a answer, ok bool) {
	s := scanner{b: b}
	s.space()
	good := s.object(0, func(key []byte) bool {
		switch string(key) {
		case "id":
			return s.take(&a.id)
		case "created":
			return s.take(&a.created)
		case "model":
			return s.take(&a.model)
		case "usage":
			return s.takePresent(&a.usage)
		case "error":
			return s.takePresent(&a.errAt)
		case "choices":
			return s.choices(&a)
		}
		return s.value(1)
	})
	if !good {
		return a, false
	}
	s.space()
	return a, s.i == len(b)
}

// tokens are the counts of a usage object; the second pair of names is that of
// /v1/messages and /v1/responses.
func scanUsage(b []byte) (in, out int64) {
	s := scanner{b: b}
	s.space()
	s.object(0, func(key []byte) bool {
		switch string(key) {
		case "prompt_tokens", "input_tokens":
			return s.integer(&in)
		case "completion_tokens", "output_tokens":
			return s.integer(&out)
		}
		return s.value(1)
	})
	return in, out
}

// memberSpan finds a member's raw value in a JSON object.
func memberSpan(b []byte, name string) (Span, bool) {
	s := scanner{b: b}
	var at Span
	found := false
	s.space()
	ok := s.object(0, func(key []byte) bool {
		if string(key) == name && !found {
			found = true
			return s.take(&at)
		}
		return s.value(1)
	})
	return at, ok && found
}

// validJSON reports whether b is exactly one JSON value.
func validJSON(b []byte) bool {
	s := scanner{b: b}
	s.space()
	if !s.value(0) {
		return false
	}
	s.space()
	return s.i == len(b)
}

type scanner struct {
	b []byte
	i int
}

func (s *scanner) space() {
	for s.i < len(s.b) {
		switch s.b[s.i] {
		case ' ', '\n', '\r', '\t':
			s.i++
		default:
			return
		}
	}
}

func (s *scanner) eat(c byte) bool {
	if s.i < len(s.b) && s.b[s.i] == c {
		s.i++
		return true
	}
	return false
}

// object reads an object; each member's value is read by the callback, which
// gets the raw key without quotes.
func (s *scanner) object(depth int, member func(key []byte) bool) bool {
	if depth > maxDepth || !s.eat('{') {
		return false
	}
	s.space()
	if s.eat('}') {
		return true
	}
	for {
		from := s.i
		if !s.str() {
			return false
		}
		key := s.b[from+1 : s.i-1]
		s.space()
		if !s.eat(':') {
			return false
		}
		s.space()
		if !member(key) {
			return false
		}
		s.space()
		if s.eat('}') {
			return true
		}
		if !s.eat(',') {
			return false
		}
		s.space()
	}
}

func (s *scanner) array(depth int, element func() bool) bool {
	if depth > maxDepth || !s.eat('[') {
		return false
	}
	s.space()
	if s.eat(']') {
		return true
	}
	for {
		if !element() {
			return false
		}
		s.space()
		if s.eat(']') {
			return true
		}
		if !s.eat(',') {
			return false
		}
		s.space()
	}
}

// value skips any value, checking it.
func (s *scanner) value(depth int) bool {
	if s.i >= len(s.b) {
		return false
	}
	switch c := s.b[s.i]; c {
	case '{':
		return s.object(depth, func([]byte) bool { return s.value(depth + 1) })
	case '[':
		return s.array(depth, func() bool { return s.value(depth + 1) })
	case '"':
		return s.str()
	case 't':
		return s.word("true")
	case 'f':
		return s.word("false")
	case 'n':
		return s.word("null")
	default:
		return s.number()
	}
}

func (s *scanner) word(w string) bool {
	if len(s.b)-s.i < len(w) || string(s.b[s.i:s.i+len(w)]) != w {
		return false
	}
	s.i += len(w)
	return true
}

// str skips a string. UTF-8 is not checked: what an upstream wrote is passed
// on as it is.
func (s *scanner) str() bool {
	if !s.eat('"') {
		return false
	}
	b := s.b
	for i := s.i; i < len(b); i++ {
		switch c := b[i]; {
		case c == '"':
			s.i = i + 1
			return true
		case c == '\\':
			i++
			if i >= len(b) {
				return false
			}
			switch b[i] {
			case '"', '\\', '/', 'b', 'f', 'n', 'r', 't':
			case 'u':
				if i+4 >= len(b) || !isHex(b[i+1]) || !isHex(b[i+2]) || !isHex(b[i+3]) || !isHex(b[i+4]) {
					return false
				}
				i += 4
			default:
				return false
			}
		case c < 0x20:
			return false
		}
	}
	return false
}

func isHex(c byte) bool {
	return c >= '0' && c <= '9' || c >= 'a' && c <= 'f' || c >= 'A' && c <= 'F'
}

func (s *scanner) digits() bool {
	from := s.i
	for s.i < len(s.b) && s.b[s.i] >= '0' && s.b[s.i] <= '9' {
		s.i++
	}
	return s.i > from
}

func (s *scanner) number() bool {
	s.eat('-')
	if !s.eat('0') && !s.digits() {
		return false
	}
	if s.eat('.') && !s.digits() {
		return false
	}
	if s.eat('e') || s.eat('E') {
		if !s.eat('+') {
			s.eat('-')
		}
		return s.digits()
	}
	return true
}

func (s *scanner) take(at *Span) bool {
	from := s.i
	if !s.value(1) {
		return false
	}
	*at = Span{from, s.i}
	return true
}

// takePresent is take for a member where null says the same as nothing.
func (s *scanner) takePresent(at *Span) bool {
	var v Span
	if !s.take(&v) {
		return false
	}
	if string(s.b[v.From:v.To]) != "null" {
		*at = v
	}
	return true
}

// integer reads a number's leading integer part; anything else is skipped and
// leaves n alone.
func (s *scanner) integer(n *int64) bool {
	from := s.i
	if !s.value(1) {
		return false
	}
	var v int64
	for _, c := range s.b[from:s.i] {
		if c < '0' || c > '9' {
			return true
		}
		if v > 1<<50 { // no server counts that far
			return true
		}
		v = v*10 + int64(c-'0')
	}
	*n = v
	return true
}

func (s *scanner) choices(a *answer) bool {
	if s.i < len(s.b) && s.b[s.i] != '[' {
		return s.value(1)
	}
	a.hasChoices = true
	return s.array(1, func() bool {
		a.choices++
		return s.choice(a)
	})
}

func (s *scanner) choice(a *answer) bool {
	if s.i < len(s.b) && s.b[s.i] != '{' {
		return s.value(2)
	}
	var index int64
	finished := false
	ok := s.object(2, func(key []byte) bool {
		switch string(key) {
		case "index":
			return s.integer(&index)
		case "delta", "message":
			return s.message(a)
		case "text":
			return s.content(a)
		case "finish_reason":
			var at Span
			if !s.takePresent(&at) {
				return false
			}
			finished = finished || at != Span{}
			if string(s.b[at.From:at.To]) == `"insufficient_system_resource"` {
				a.exhausted = true
			}
			return true
		}
		return s.value(3)
	})
	bit := uint64(1) << min(uint64(index), 63) //nolint:gosec // integer never yields a negative
	a.seen |= bit
	if finished {
		a.finished |= bit
	}
	return ok
}

// message reads a delta or a message. Role-only and empty ones are no content.
func (s *scanner) message(a *answer) bool {
	if s.i < len(s.b) && s.b[s.i] != '{' {
		return s.value(3)
	}
	return s.object(3, func(key []byte) bool {
		switch string(key) {
		case "content", "reasoning_content", "reasoning", "refusal", "tool_calls", "function_call", "audio":
			return s.content(a)
		}
		return s.value(4)
	})
}

// content reads a value that is content unless it is null or empty.
func (s *scanner) content(a *answer) bool {
	var at Span
	if !s.take(&at) {
		return false
	}
	switch string(s.b[at.From:at.To]) {
	case "null", `""`, "[]", "{}":
	default:
		a.content = true
		a.text += at.To - at.From - 2
	}
	return true
}

// tokens guesses how many an event holds: four bytes of text each, and one at
// the least. Servers send one in an event, or a few at a time.
func (a *answer) tokens() int { return max(1, a.text/4) }
