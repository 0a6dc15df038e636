package openai

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math/bits"
	"strings"
	"unicode/utf8"
)

// Span is a half-open range of bytes, zero for none.
type Span struct{ From, To int }

// In gives the span's bytes of a document.
func (at Span) In(doc []byte) []byte { return doc[at.From:at.To] }

const (
	// maxRequestDepth bounds the objects and arrays that are open at once in a
	// request, the body itself counted. Tool schemas need a dozen.
	maxRequestDepth = 128
	// maxAnswerDepth is the same for an answer.
	maxAnswerDepth = 256
)

// Scanner walks over one JSON text. It checks the whole grammar, decodes only
// what is asked for, and allocates nothing for a text that is well-formed.
//
// It doesn't check UTF-8. Every method that reads a value expects the scanner to
// stand at its first byte, and leaves it behind the last one.
type Scanner struct {
	b       []byte
	i       int
	keyAt   int // where the last key that was read begins
	depth   int // open objects and arrays
	deepest int // of depth
}

// At is the offset of the next byte.
func (s *Scanner) At() int { return s.i }

// BodyError says what is wrong with a body, and where.
type BodyError struct {
	At    int    // byte
	Param string // the member, when it is about one
	Text  string
}

func (e *BodyError) Error() string { return fmt.Sprintf("%s (at byte %d)", e.Text, e.At) }

func (s *Scanner) fail(want string) error {
	if s.i >= len(s.b) {
		return &BodyError{At: len(s.b), Text: "the JSON ends too early, " + want}
	}
	r, _ := utf8.DecodeRune(s.b[s.i:])
	return &BodyError{At: s.i, Text: fmt.Sprintf("the body is not valid JSON: unexpected %q, %s", r, want)}
}

func (s *Scanner) space() {
	for s.i < len(s.b) && isSpace[s.b[s.i]] {
		s.i++
	}
}

var isSpace = [256]bool{' ': true, '\t': true, '\n': true, '\r': true}

// next skips white space, and one byte when it is c.
func (s *Scanner) next(c byte) bool {
	s.space()
	return s.byte(c)
}

func (s *Scanner) byte(c byte) bool {
	if s.i < len(s.b) && s.b[s.i] == c {
		s.i++
		return true
	}
	return false
}

func (s *Scanner) begins(c byte) bool { return s.i < len(s.b) && s.b[s.i] == c }

func (s *Scanner) literal(w string) bool {
	if len(s.b)-s.i >= len(w) && string(s.b[s.i:s.i+len(w)]) == w {
		s.i += len(w)
		return true
	}
	return false
}

// end checks that only white space is left.
func (s *Scanner) end() error {
	s.space()
	if s.i != len(s.b) {
		return &BodyError{At: s.i, Text: "there is more after the JSON object"}
	}
	return nil
}

// object reads an object. member gets each key as it is written, without its
// quotes, and must read the value.
func (s *Scanner) object(member func(key []byte) error) error {
	if !s.byte('{') {
		return s.fail("want an object")
	}
	if s.depth++; s.depth > s.deepest {
		return s.tooDeep()
	}
	if s.next('}') {
		s.depth--
		return nil
	}
	for {
		key, err := s.key()
		if err != nil {
			return err
		}
		if err := member(key); err != nil {
			return err
		}
		if s.next(',') {
			continue
		}
		if !s.byte('}') {
			return s.fail("want a comma or the end of the object")
		}
		s.depth--
		return nil
	}
}

// array reads an array; element must read each value.
func (s *Scanner) array(element func() error) error {
	if !s.byte('[') {
		return s.fail("want an array")
	}
	if s.depth++; s.depth > s.deepest {
		return s.tooDeep()
	}
	if s.next(']') {
		s.depth--
		return nil
	}
	for {
		s.space()
		if err := element(); err != nil {
			return err
		}
		if s.next(',') {
			continue
		}
		if !s.byte(']') {
			return s.fail("want a comma or the end of the array")
		}
		s.depth--
		return nil
	}
}

// key reads `"…" :` and the white space around it.
func (s *Scanner) key() ([]byte, error) {
	s.space()
	s.keyAt = s.i
	if !s.begins('"') {
		return nil, s.fail("want a member's name")
	}
	if err := s.string(); err != nil {
		return nil, err
	}
	key := s.b[s.keyAt+1 : s.i-1]
	if !s.next(':') {
		return nil, s.fail("want a colon")
	}
	s.space()
	return key, nil
}

func (s *Scanner) tooDeep() error {
	return &BodyError{At: s.i, Text: fmt.Sprintf("the JSON is nested deeper than %d levels", s.deepest)}
}

// skip reads any value.
func (s *Scanner) skip() error {
	if s.i == len(s.b) {
		return s.fail("want a value")
	}
	switch s.b[s.i] {
	case '"':
		return s.string()
	case '{', '[':
		return s.skipNested()
	case 't', 'f', 'n':
		if !s.literal("true") && !s.literal("false") && !s.literal("null") {
			return s.fail("want a value")
		}
		return nil
	}
	return s.number()
}

// skipNested reads an object or an array without recursion: its depth is up to
// who wrote it.
func (s *Scanner) skipNested() error {
	var closing [maxAnswerDepth]byte // the bracket that ends each open level
	open := 0
	for {
		s.space()
		if s.begins('{') || s.begins('[') {
			if s.depth+open == s.deepest {
				return s.tooDeep()
			}
			end := s.b[s.i] + 2 // in ASCII both brackets close two further on
			s.i++
			if !s.next(end) {
				closing[open] = end
				open++
				if end == '}' {
					if _, err := s.key(); err != nil {
						return err
					}
				}
				continue
			}
		} else if err := s.skip(); err != nil {
			return err
		}
		for open > 0 && s.next(closing[open-1]) {
			open--
		}
		if open == 0 {
			return nil
		}
		if !s.next(',') {
			return s.fail("want a comma or a closing bracket")
		}
		if closing[open-1] == '}' {
			if _, err := s.key(); err != nil {
				return err
			}
		}
	}
}

const (
	ones  = 0x0101010101010101
	highs = 0x8080808080808080
)

// string reads a string, eight bytes at a time: nearly all of a body is text.
func (s *Scanner) string() error {
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
			return s.fail("in a string")
		}
		switch {
		case b[i] == '"':
			s.i++
			return nil
		case b[i] < 0x20:
			return s.fail("control characters in strings must be escaped")
		}
		if err := s.escape(); err != nil {
			return err
		}
		i = s.i
	}
}

// escape reads a backslash and what belongs to it.
func (s *Scanner) escape() error {
	if s.i++; s.i == len(s.b) {
		return s.fail("in a string")
	}
	switch s.b[s.i] {
	case '"', '\\', '/', 'b', 'f', 'n', 'r', 't':
	case 'u':
		for range 4 {
			if s.i++; s.i == len(s.b) || !isHex(s.b[s.i]) {
				return s.fail("want four hexadecimal digits")
			}
		}
	default:
		return s.fail("no such escape")
	}
	s.i++
	return nil
}

func isHex(c byte) bool {
	return '0' <= c && c <= '9' || 'a' <= c && c <= 'f' || 'A' <= c && c <= 'F'
}

// decoded gives the text of a string that stands, without its quotes, at from.
// Without escapes it is a part of the body.
func (s *Scanner) decoded(raw []byte, from int) ([]byte, error) {
	if bytes.IndexByte(raw, '\\') < 0 {
		return raw, nil
	}
	var text string
	if err := json.Unmarshal(s.b[from:from+len(raw)+2], &text); err != nil {
		return nil, &BodyError{At: from, Text: "the string can't be read"}
	}
	// Half a surrogate pair becomes U+FFFD here and something else elsewhere.
	if strings.ContainsRune(text, utf8.RuneError) {
		return nil, &BodyError{At: from, Text: "the string has an escape that is no character"}
	}
	return []byte(text), nil
}

func (s *Scanner) number() error {
	s.byte('-')
	if !s.byte('0') && !s.digits() {
		return s.fail("want a value")
	}
	if s.byte('.') && !s.digits() {
		return s.fail("want a digit")
	}
	if s.byte('e') || s.byte('E') {
		if !s.byte('+') {
			s.byte('-')
		}
		if !s.digits() {
			return s.fail("want a digit")
		}
	}
	return nil
}

func (s *Scanner) digits() bool {
	from := s.i
	for s.i < len(s.b) && '0' <= s.b[s.i] && s.b[s.i] <= '9' {
		s.i++
	}
	return s.i > from
}
