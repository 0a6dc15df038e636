package openai

// Answer is what one pass over a server's JSON finds: a whole plain body, or the
// data of one event. Spans are raw values (strings with their quotes) and zero
// when the member is absent.
type Answer struct {
	ID, Created, Model Span
	Usage              Span // present and not null
	Error              Span // present and not null
	HasChoices         bool
	Choices            int
	Content            bool   // some choice has text, reasoning, a refusal or a tool call
	Exhausted          bool   // finish_reason insufficient_system_resource (DeepSeek)
	seen, finished     uint64 // a bit for each choice's index, 63 for all from there on
	text               int    // bytes of content, as JSON has them
}

// Finished reports whether some choice has a finish_reason.
func (a *Answer) Finished() bool { return a.finished != 0 }

// Complete reports whether choices are there, and all have a finish_reason.
func (a *Answer) Complete() bool { return a.finished != 0 && a.seen&^a.finished == 0 }

// Join adds the choices of a later event of the same answer.
func (a *Answer) Join(later *Answer) {
	a.seen |= later.seen
	a.finished |= later.finished
}

// Tokens guesses how many an event holds: four bytes of text each, and one at the
// least. Servers send one in an event, or a few at a time.
func (a *Answer) Tokens() int { return max(1, a.text/4) }

// ScanAnswer reads one JSON object. ok is false for anything else: a truncated or
// garbled body never passes.
func ScanAnswer(b []byte) (a Answer, ok bool) {
	s := answerScanner(b)
	s.space()
	err := s.object(func(key []byte) error {
		switch string(key) {
		case "id":
			return s.take(&a.ID)
		case "created":
			return s.take(&a.Created)
		case "model":
			return s.take(&a.Model)
		case "usage":
			return s.takePresent(&a.Usage)
		case "error":
			return s.takePresent(&a.Error)
		case "choices":
			return s.choices(&a)
		}
		return s.skip()
	})
	return a, err == nil && s.end() == nil
}

func answerScanner(b []byte) Scanner { return Scanner{b: b, deepest: maxAnswerDepth} }

// Usage reads the token counts of a usage object. The second pair of names is that
// of /v1/messages and /v1/responses.
func Usage(b []byte) (in, out int64) {
	s := answerScanner(b)
	_ = s.object(func(key []byte) error { // what can't be read counts nothing
		switch string(key) {
		case "prompt_tokens", "input_tokens":
			return s.integer(&in)
		case "completion_tokens", "output_tokens":
			return s.integer(&out)
		}
		return s.skip()
	})
	return in, out
}

// Member finds a member's raw value in a JSON object.
func Member(b []byte, name string) (at Span, ok bool) {
	s := answerScanner(b)
	s.space()
	err := s.object(func(key []byte) error {
		if string(key) == name && at == (Span{}) {
			return s.take(&at)
		}
		return s.skip()
	})
	return at, err == nil && at != Span{}
}

// Valid reports whether b is exactly one JSON value.
func Valid(b []byte) bool {
	s := answerScanner(b)
	s.space()
	return s.skip() == nil && s.end() == nil
}

func (s *Scanner) take(at *Span) error {
	from := s.i
	err := s.skip()
	*at = Span{from, s.i}
	return err
}

// takePresent is take for a member where null says the same as nothing.
func (s *Scanner) takePresent(at *Span) error {
	if s.literal("null") {
		return nil
	}
	return s.take(at)
}

// integer reads a whole number that is not negative. Anything else leaves n alone.
func (s *Scanner) integer(n *int64) error {
	from := s.i
	if err := s.skip(); err != nil {
		return err
	}
	var v int64
	for _, c := range s.b[from:s.i] {
		if c < '0' || c > '9' || v > 1<<50 { // no server counts that far
			return nil
		}
		v = v*10 + int64(c-'0')
	}
	*n = v
	return nil
}

func (s *Scanner) choices(a *Answer) error {
	if !s.begins('[') {
		return s.skip()
	}
	a.HasChoices = true
	return s.array(func() error {
		a.Choices++
		return s.choice(a)
	})
}

func (s *Scanner) choice(a *Answer) error {
	if !s.begins('{') {
		return s.skip()
	}
	var index int64
	var finish Span
	err := s.object(func(key []byte) error {
		switch string(key) {
		case "index":
			return s.integer(&index)
		case "delta", "message":
			return s.message(a)
		case "text":
			return s.content(a)
		case "finish_reason":
			return s.takePresent(&finish)
		}
		return s.skip()
	})
	bit := uint64(1) << min(uint64(index), 63) //nolint:gosec // integer never yields a negative
	a.seen |= bit
	if finish != (Span{}) {
		a.finished |= bit
		a.Exhausted = a.Exhausted || string(finish.In(s.b)) == `"insufficient_system_resource"`
	}
	return err
}

// message reads a delta or a message. One with a role alone has no content.
func (s *Scanner) message(a *Answer) error {
	if !s.begins('{') {
		return s.skip()
	}
	return s.object(func(key []byte) error {
		switch string(key) {
		case "content", "reasoning_content", "reasoning", "refusal", "tool_calls", "function_call", "audio":
			return s.content(a)
		}
		return s.skip()
	})
}

// content reads a value that is content unless it is null or empty.
func (s *Scanner) content(a *Answer) error {
	var at Span
	if err := s.take(&at); err != nil {
		return err
	}
	switch string(at.In(s.b)) {
	case "null", `""`, "[]", "{}":
	default:
		a.Content = true
		a.text += at.To - at.From - 2
	}
	return nil
}
