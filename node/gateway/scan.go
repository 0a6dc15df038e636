package gateway

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math/bits"
	"strings"
	"unicode/utf8"

	"github.com/dsnode/dsnode/node/serving"
)

const (
	// maxDepth of objects and arrays, the body itself counted. Tool schemas
	// need a dozen.
	maxDepth = 128
	// maxMembers of an object that is checked for duplicates.
	maxMembers = 256
	maxModel   = 256 // bytes of a model's name
	maxChoices = 128 // n, as at OpenAI
	maxLabel   = 1024
)

// scanned is what the gateway reads of a body; all else passes untouched.
type scanned struct {
	model   []byte // decoded; may point into the body
	modelAt serving.Span
	stream  bool
	// The following are read for chat and completions only.
	choices   int
	usageAt   serving.Span
	wantUsage bool
	// deterministic: temperature is there and zero.
	deterministic bool
	// Who a request is for and which prompts share a prefix, decoded.
	safetyID, user, cacheKey []byte
}

// badBody says what is wrong with a body, and where.
type badBody struct {
	at    int    // byte
	param string // member, when it is about one
	text  string
}

func (e *badBody) Error() string { return fmt.Sprintf("%s (at byte %d)", e.text, e.at) }

// scan reads a body once. It is stricter than encoding/json, because parsers
// disagree where JSON is loose and a request must not be authorised as one
// model and run as another: duplicate members (also in another case) of the
// body and of stream_options, invalid UTF-8 and deep nesting are refused.
func scan(body []byte, full bool) (out scanned, err error) {
	if !utf8.Valid(body) {
		return out, badUTF8(body)
	}
	s := scanner{b: body}
	s.space()
	if s.i == len(body) {
		return out, &badBody{at: s.i, text: "the body is empty; it must be a JSON object"}
	}
	if body[s.i] != '{' {
		return out, &badBody{at: s.i, text: "the body must be a JSON object"}
	}
	if err := s.request(&out, full); err != nil {
		return out, err
	}
	s.space()
	if s.i != len(body) {
		return out, &badBody{at: s.i, text: "there is more after the JSON object"}
	}
	return out, nil
}

// request reads the object at i.
func (s *scanner) request(out *scanned, full bool) error {
	from := s.i
	out.choices = 1
	err := s.object(func(key []byte, at int) error {
		name := memberName(key)
		if name == "" || !full && name != "model" && name != "stream" {
			return s.skip()
		}
		if string(key) != name {
			return &badBody{at, name, fmt.Sprintf("member %q must be written %q", key, name)}
		}
		return s.member(out, name)
	})
	if err == nil && len(out.model) == 0 {
		err = &badBody{at: from, param: "model", text: "you must provide a model"}
	}
	return err
}

var memberNames = [...]string{
	"model", "stream", "n", "user", "stream_options", "prompt_cache_key", "safety_identifier", "temperature",
}

// memberName is the name of ours that a key matches in any case (encoding/json
// would take it), empty when it is none.
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

func (s *scanner) member(out *scanned, name string) (err error) {
	s.space()
	from := s.i
	if s.literal("null") {
		if name == "stream_options" {
			out.usageAt = serving.Span{From: from, To: s.i}
		}
		return nil
	}
	switch name {
	case "model":
		out.model, err = s.text(name, maxModel)
		out.modelAt = serving.Span{From: from, To: s.i}
	case "stream":
		out.stream, err = s.boolean(name)
	case "n":
		out.choices, err = s.count(name, maxChoices)
	case "user":
		out.user, err = s.text(name, maxLabel)
	case "safety_identifier":
		out.safetyID, err = s.text(name, maxLabel)
	case "prompt_cache_key":
		out.cacheKey, err = s.text(name, maxLabel)
	case "temperature":
		// What is no number is the model server's to refuse.
		err = s.skip()
		out.deterministic = err == nil && isZero(s.b[from:s.i])
	case "stream_options":
		if s.i == len(s.b) || s.b[s.i] != '{' {
			return &badBody{s.i, name, "stream_options must be an object"}
		}
		err = s.object(func(key []byte, at int) error {
			const usage = "include_usage"
			if len(key) > 32 || !strings.EqualFold(string(key), usage) {
				return s.skip()
			}
			if string(key) != usage {
				return &badBody{at, name, fmt.Sprintf("member %q must be written %q", key, usage)}
			}
			s.space()
			if s.literal("null") {
				return nil
			}
			var err error
			out.wantUsage, err = s.boolean("stream_options.include_usage")
			return err
		})
		out.usageAt = serving.Span{From: from, To: s.i}
	}
	return err
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

func badUTF8(body []byte) error {
	at := 0
	for at < len(body) {
		r, n := utf8.DecodeRune(body[at:])
		if r == utf8.RuneError && n == 1 {
			break
		}
		at += n
	}
	return &badBody{at: at, text: "the body is not valid UTF-8"}
}

// scanner walks over JSON text that is valid UTF-8.
type scanner struct {
	b     []byte
	i     int
	depth int // open objects whose members are being read by object
}

func (s *scanner) fail(what string) error {
	if s.i >= len(s.b) {
		return &badBody{at: len(s.b), text: "the JSON ends too early, " + what}
	}
	r, _ := utf8.DecodeRune(s.b[s.i:])
	return &badBody{at: s.i, text: fmt.Sprintf("the body is not valid JSON: unexpected %q, %s", r, what)}
}

func (s *scanner) space() {
	for s.i < len(s.b) {
		switch s.b[s.i] {
		case ' ', '\t', '\n', '\r':
			s.i++
		default:
			return
		}
	}
}

// next skips white space and one byte when it is c.
func (s *scanner) next(c byte) bool {
	s.space()
	if s.i < len(s.b) && s.b[s.i] == c {
		s.i++
		return true
	}
	return false
}

func (s *scanner) literal(w string) bool {
	if len(s.b)-s.i >= len(w) && string(s.b[s.i:s.i+len(w)]) == w {
		s.i += len(w)
		return true
	}
	return false
}

// object reads the object at i. member is called with each decoded key and
// where it stands, and must read the value.
func (s *scanner) object(member func(key []byte, at int) error) error {
	if s.depth++; s.depth > maxDepth {
		return s.tooDeep()
	}
	s.i++
	if s.next('}') {
		s.depth--
		return nil
	}
	var room [24][]byte // most bodies have fewer members
	seen := room[:0]
	for {
		s.space()
		at := s.i
		key, err := s.key()
		if err != nil {
			return err
		}
		for _, k := range seen {
			if bytes.Equal(k, key) {
				return &badBody{at, string(key), fmt.Sprintf("member %q stands there twice", key)}
			}
		}
		if len(seen) == maxMembers {
			return &badBody{at: at, text: fmt.Sprintf("an object has more than %d members", maxMembers)}
		}
		seen = append(seen, key)
		if err := member(key, at); err != nil {
			return err
		}
		switch {
		case s.next(','):
		case s.next('}'):
			s.depth--
			return nil
		default:
			return s.fail("want a comma or the end of the object")
		}
	}
}

// key reads `"…" :` and decodes it.
func (s *scanner) key() ([]byte, error) {
	if s.i == len(s.b) || s.b[s.i] != '"' {
		return nil, s.fail("want a member's name")
	}
	key, err := s.decoded()
	if err != nil {
		return nil, err
	}
	if !s.next(':') {
		return nil, s.fail("want a colon")
	}
	return key, nil
}

func (s *scanner) tooDeep() error {
	return &badBody{at: s.i, text: fmt.Sprintf("the JSON is nested deeper than %d levels", maxDepth)}
}

// skip validates one value without looking at what it says.
func (s *scanner) skip() error {
	var stack [maxDepth]byte // closing bracket of each open level
	open := 0
	for {
		s.space()
		if s.i == len(s.b) {
			return s.fail("want a value")
		}
		switch c := s.b[s.i]; c {
		case '"':
			if _, err := s.str(); err != nil {
				return err
			}
		case '{', '[':
			if s.depth+open == maxDepth {
				return s.tooDeep()
			}
			s.i++
			stack[open] = c + 2 // in ASCII both close two further on
			open++
			if s.next(c + 2) {
				open--
				break
			}
			if c == '{' {
				if err := s.skipKey(); err != nil {
					return err
				}
			}
			continue
		case 't', 'f', 'n':
			if !s.literal("true") && !s.literal("false") && !s.literal("null") {
				return s.fail("want a value")
			}
		default:
			if err := s.number(); err != nil {
				return err
			}
		}
		for open > 0 && s.next(stack[open-1]) {
			open--
		}
		if open == 0 {
			return nil
		}
		if !s.next(',') {
			return s.fail("want a comma or a closing bracket")
		}
		if stack[open-1] == '}' {
			if err := s.skipKey(); err != nil {
				return err
			}
		}
	}
}

func (s *scanner) skipKey() error {
	s.space()
	if s.i == len(s.b) || s.b[s.i] != '"' {
		return s.fail("want a member's name")
	}
	if _, err := s.str(); err != nil {
		return err
	}
	if !s.next(':') {
		return s.fail("want a colon")
	}
	return nil
}

const (
	ones  = 0x0101010101010101
	highs = 0x8080808080808080
)

// str reads the string at i and tells whether it has escapes. Eight bytes at a
// time: nearly all of a body is text.
func (s *scanner) str() (escaped bool, err error) {
	b, i := s.b, s.i+1
	for {
		for i+8 <= len(b) {
			w := binary.LittleEndian.Uint64(b[i:])
			q, e := w^('"'*ones), w^('\\'*ones)
			// The lowest high bit marks the first quote, backslash or control
			// character; what the borrows mark lies above it.
			m := ((q-ones)&^q | (e-ones)&^e | (w-0x20*ones)&^w) & highs
			if m != 0 {
				i += bits.TrailingZeros64(m) / 8
				break
			}
			i += 8
		}
		for i < len(b) && b[i] != '"' && b[i] != '\\' && b[i] >= 0x20 {
			i++
		}
		if s.i = i; i == len(b) {
			return escaped, s.fail("in a string")
		}
		switch {
		case b[i] == '"':
			s.i++
			return escaped, nil
		case b[i] < 0x20:
			return escaped, s.fail("control characters in strings must be escaped")
		}
		escaped = true
		if s.i++; s.i == len(b) {
			return escaped, s.fail("in a string")
		}
		switch b[s.i] {
		case '"', '\\', '/', 'b', 'f', 'n', 'r', 't':
			i = s.i + 1
		case 'u':
			for k := 1; k <= 4; k++ {
				if s.i++; s.i == len(b) || !isHex(b[s.i]) {
					return escaped, s.fail("want four hexadecimal digits")
				}
			}
			i = s.i + 1
		default:
			return escaped, s.fail("no such escape")
		}
	}
}

func isHex(c byte) bool {
	return '0' <= c && c <= '9' || 'a' <= c && c <= 'f' || 'A' <= c && c <= 'F'
}

// decoded reads the string at i; without escapes it is a part of the body.
func (s *scanner) decoded() ([]byte, error) {
	from := s.i
	escaped, err := s.str()
	if err != nil {
		return nil, err
	}
	raw := s.b[from:s.i]
	if !escaped {
		return raw[1 : len(raw)-1], nil
	}
	var text string
	if err := json.Unmarshal(raw, &text); err != nil {
		return nil, &badBody{at: from, text: "the string can't be read"}
	}
	// Half a surrogate pair becomes U+FFFD here and something else elsewhere.
	if strings.ContainsRune(text, utf8.RuneError) {
		return nil, &badBody{at: from, text: "the string has an escape that is no character"}
	}
	return []byte(text), nil
}

// text reads a string member of at most most bytes.
func (s *scanner) text(param string, most int) ([]byte, error) {
	if s.i == len(s.b) || s.b[s.i] != '"' {
		return nil, &badBody{s.i, param, param + " must be a string"}
	}
	at := s.i
	text, err := s.decoded()
	if err == nil && len(text) > most {
		return nil, &badBody{at, param, fmt.Sprintf("%s is longer than %d bytes", param, most)}
	}
	return text, err
}

func (s *scanner) boolean(param string) (bool, error) {
	switch {
	case s.literal("true"):
		return true, nil
	case s.literal("false"):
		return false, nil
	}
	return false, &badBody{s.i, param, param + " must be true or false"}
}

// count reads a whole number from 1 to most.
func (s *scanner) count(param string, most int) (int, error) { return s.whole(param, 1, most) }

func (s *scanner) whole(param string, least, most int) (int, error) {
	from, n := s.i, 0
	if err := s.number(); err != nil {
		return 0, &badBody{from, param, param + " must be a whole number"}
	}
	for _, c := range s.b[from:s.i] {
		if c < '0' || c > '9' {
			return 0, &badBody{from, param, param + " must be a whole number"}
		}
		n = min(n*10+int(c-'0'), most+1)
	}
	if n < least || n > most {
		return 0, &badBody{from, param, fmt.Sprintf("%s must be between %d and %d", param, least, most)}
	}
	return n, nil
}

func (s *scanner) number() error {
	s.skipByte("-")
	switch {
	case s.i < len(s.b) && s.b[s.i] == '0':
		s.i++
	case !s.digits():
		return s.fail("want a value")
	}
	if s.skipByte(".") && !s.digits() {
		return s.fail("want a digit")
	}
	if s.skipByte("eE") {
		s.skipByte("+-")
		if !s.digits() {
			return s.fail("want a digit")
		}
	}
	return nil
}

func (s *scanner) skipByte(set string) bool {
	if s.i < len(s.b) && strings.IndexByte(set, s.b[s.i]) >= 0 {
		s.i++
		return true
	}
	return false
}

func (s *scanner) digits() bool {
	from := s.i
	for s.i < len(s.b) && '0' <= s.b[s.i] && s.b[s.i] <= '9' {
		s.i++
	}
	return s.i > from
}
