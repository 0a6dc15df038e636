package openai

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"
)

const (
	maxMembers = 256 // of an object that is checked for duplicates
	maxModel   = 256 // bytes of a model's name
	maxChoices = 128 // n, as at OpenAI
	maxLabel   = 1024
)

// Request is what is read of a request's body. All else in the body passes
// through untouched, so it is never decoded as a whole.
type Request struct {
	Endpoint *Endpoint
	Body     []byte // nobody changes it
	Model    string // as the client wrote it
	ModelAt  Span   // the model's string, quotes included
	Stream   bool
	// PromptAt is what tells prompts apart: the value of prompt_cache_key, else of
	// messages or prompt.
	PromptAt Span
	// The following are read for endpoints that complete only.
	Choices       int  // n, 1 when absent
	UsageAt       Span // the value of stream_options
	WantUsage     bool // stream_options.include_usage
	Deterministic bool // temperature is there and zero
}

// Parse reads a body once. The error is a *BodyError, whose text is for people.
//
// It is stricter than encoding/json, because parsers disagree where JSON is loose
// and a request must not be authorised as one model and run as another:
// duplicate members (also in another case) of the body and of stream_options,
// invalid UTF-8 and deep nesting are refused.
func Parse(e *Endpoint, body []byte) (Request, error) {
	r := Request{Endpoint: e, Body: body}
	s := NewScanner(body)
	if err := s.start(); err != nil {
		return r, err
	}
	if err := s.request(&r, e.Completes); err != nil {
		return r, err
	}
	return r, s.end()
}

// NewScanner makes a scanner for what a client sent.
func NewScanner(text []byte) Scanner { return Scanner{b: text, deepest: maxRequestDepth} }

// Document reads the whole text, which must be one JSON object, as strictly as
// Parse. member gets each key and where it begins, and must read the value.
func (s *Scanner) Document(member func(key []byte, at int) error) error {
	if err := s.start(); err != nil {
		return err
	}
	if err := s.unique(member); err != nil {
		return err
	}
	return s.end()
}

// start goes to the object that the text must be.
func (s *Scanner) start() error {
	if !utf8.Valid(s.b) {
		return badUTF8(s.b)
	}
	s.space()
	switch {
	case s.i == len(s.b):
		return &BodyError{At: s.i, Text: "the body is empty; it must be a JSON object"}
	case !s.begins('{'):
		return &BodyError{At: s.i, Text: "the body must be a JSON object"}
	}
	return nil
}

func badUTF8(text []byte) error {
	at := 0
	for at < len(text) {
		r, n := utf8.DecodeRune(text[at:])
		if r == utf8.RuneError && n == 1 {
			break
		}
		at += n
	}
	return &BodyError{At: at, Text: "the body is not valid UTF-8"}
}

// unique reads an object that must mean the same to every parser: keys are
// decoded, and none may come twice.
func (s *Scanner) unique(member func(key []byte, at int) error) error {
	var buf [24][]byte // most bodies have fewer members
	seen := buf[:0]
	return s.object(func(raw []byte) error {
		at := s.keyAt
		key, err := s.decoded(raw, at)
		if err != nil {
			return err
		}
		for _, k := range seen {
			if bytes.Equal(k, key) {
				return &BodyError{at, string(key), fmt.Sprintf("member %q is given twice", key)}
			}
		}
		if len(seen) == maxMembers {
			return &BodyError{At: at, Text: fmt.Sprintf("an object has more than %d members", maxMembers)}
		}
		seen = append(seen, key)
		return member(key, at)
	})
}

// request reads the object of a request. all: also the members of endpoints that
// complete.
func (s *Scanner) request(r *Request, all bool) error {
	from := s.i
	r.Choices = 1
	var cacheKey Span
	err := s.unique(func(key []byte, at int) error {
		value := s.i
		if err := s.member(r, key, at, all); err != nil {
			return err
		}
		if string(s.b[value:s.i]) == "null" {
			return nil
		}
		switch string(key) {
		case "prompt_cache_key":
			cacheKey = Span{value, s.i}
		case "messages", "prompt":
			r.PromptAt = Span{value, s.i}
		}
		return nil
	})
	if err == nil && r.Model == "" {
		err = &BodyError{At: from, Param: "model", Text: "you must provide a model"}
	}
	if cacheKey != (Span{}) {
		r.PromptAt = cacheKey
	}
	return err
}

// member reads the value of one member.
func (s *Scanner) member(r *Request, key []byte, at int, all bool) error {
	name := memberName(key)
	if name == "" || !all && name != "model" && name != "stream" {
		return s.skip()
	}
	if string(key) != name {
		return &BodyError{at, name, fmt.Sprintf("member %q must be written %q", key, name)}
	}
	from := s.i
	if s.literal("null") {
		if name == "stream_options" {
			r.UsageAt = Span{from, s.i}
		}
		return nil
	}
	var err error
	switch name {
	case "model":
		r.Model, err = s.Text(name, maxModel)
		r.ModelAt = Span{from, s.i}
	case "stream":
		r.Stream, err = s.boolean(name)
	case "n":
		r.Choices, err = s.Whole(name, 1, maxChoices)
	case "user", "safety_identifier", "prompt_cache_key":
		_, err = s.text(name, maxLabel)
	case "temperature":
		err = s.skip() // what is no number is the model server's to refuse
		r.Deterministic = err == nil && isZero(s.b[from:s.i])
	case "stream_options":
		err = s.streamOptions(r)
		r.UsageAt = Span{from, s.i}
	}
	return err
}

var memberNames = [...]string{
	"model", "stream", "n", "user", "stream_options", "prompt_cache_key", "safety_identifier", "temperature",
}

// memberName is the name in memberNames that a key matches in any case, as
// encoding/json would take it; empty when it matches none.
func memberName(key []byte) string {
	if len(key) > 32 {
		return ""
	}
	for _, name := range memberNames {
		if string(key) == name {
			return name
		}
	}
	for _, name := range memberNames {
		if strings.EqualFold(string(key), name) {
			return name
		}
	}
	return ""
}

func (s *Scanner) streamOptions(r *Request) error {
	if !s.begins('{') {
		return &BodyError{s.i, "stream_options", "stream_options must be an object"}
	}
	return s.unique(func(key []byte, at int) (err error) {
		const usage = "include_usage"
		if len(key) > 32 || !strings.EqualFold(string(key), usage) {
			return s.skip()
		}
		if string(key) != usage {
			return &BodyError{at, "stream_options", fmt.Sprintf("member %q must be written %q", key, usage)}
		}
		if !s.literal("null") {
			r.WantUsage, err = s.boolean("stream_options.include_usage")
		}
		return err
	})
}

// isZero reports whether a JSON value is the number zero, however it is written.
func isZero(value []byte) bool {
	for i, c := range value {
		switch {
		case c == '0', c == '.', c == '-' && i == 0:
		case c == 'e' || c == 'E':
			return i > 0
		default:
			return false
		}
	}
	return true
}

// Request reads a request that is the value of a member. Its spans are in its own
// Body. The param of an error begins with the member's name.
func (s *Scanner) Request(param string) (Request, error) {
	from := s.i
	if !s.begins('{') {
		return Request{}, &BodyError{from, param, param + " must be an object, the request itself"}
	}
	var r Request
	if err := s.request(&r, true); err != nil {
		if bad := (*BodyError)(nil); errors.As(err, &bad) {
			bad.Param = strings.TrimSuffix(param+"."+bad.Param, ".")
		}
		return Request{}, err
	}
	r.Body = s.b[from:s.i:s.i]
	for _, at := range [...]*Span{&r.ModelAt, &r.PromptAt, &r.UsageAt} {
		if *at != (Span{}) {
			at.From, at.To = at.From-from, at.To-from
		}
	}
	return r, nil
}

// Text reads a string of at most most bytes.
func (s *Scanner) Text(param string, most int) (string, error) {
	text, err := s.text(param, most)
	return string(text), err
}

func (s *Scanner) text(param string, most int) ([]byte, error) {
	at := s.i
	if !s.begins('"') {
		return nil, &BodyError{at, param, param + " must be a string"}
	}
	if err := s.string(); err != nil {
		return nil, err
	}
	text, err := s.decoded(s.b[at+1:s.i-1], at)
	if err == nil && len(text) > most {
		return nil, &BodyError{at, param, fmt.Sprintf("%s is longer than %d bytes", param, most)}
	}
	return text, err
}

// OneOf reads a string that must be one of a list.
func (s *Scanner) OneOf(param string, list []string) (string, error) {
	at := s.i
	text, err := s.text(param, 64)
	if err != nil {
		return "", err
	}
	if i := slices.Index(list, string(text)); i >= 0 {
		return list[i], nil
	}
	return "", &BodyError{at, param, param + " must be one of " + strings.Join(list, ", ")}
}

// Whole reads a whole number from least to most.
func (s *Scanner) Whole(param string, least, most int) (int, error) {
	from, n := s.i, 0
	if err := s.number(); err != nil {
		return 0, &BodyError{from, param, param + " must be a whole number"}
	}
	for _, c := range s.b[from:s.i] {
		if c < '0' || c > '9' {
			return 0, &BodyError{from, param, param + " must be a whole number"}
		}
		n = min(n*10+int(c-'0'), most+1)
	}
	if n < least || n > most {
		return 0, &BodyError{from, param, fmt.Sprintf("%s must be between %d and %d", param, least, most)}
	}
	return n, nil
}

func (s *Scanner) boolean(param string) (bool, error) {
	switch {
	case s.literal("true"):
		return true, nil
	case s.literal("false"):
		return false, nil
	}
	return false, &BodyError{s.i, param, param + " must be true or false"}
}
