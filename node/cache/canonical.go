package cache

import (
	"bytes"
	"slices"
	"unicode/utf16"
	"unicode/utf8"
)

// maxDepth bounds the nesting of a request. The gateway refuses deeper ones.
const maxDepth = 128

// canonical writes JSON in one form that all spellings of a request share: without
// white space, with the members of objects sorted by name, and with as few escapes as
// possible. Numbers stay as they are spelt, since a model server may tell 1.0 from 1.
// Duplicate members keep their order. So two different requests never share a form.
type canonical struct {
	in      []byte
	i       int
	out     []byte
	members []member // of all open objects, innermost last
	scratch []byte
	// Cache.Key uses names and parts.
	names []byte
	parts [][]byte
}

// member is where `"name":value` stands in out, and where its name ends.
type member struct{ from, name, to int }

// object writes the canonical form of one object to out, without the top-level members
// that omit selects. It returns false if in is not a JSON object.
func (c *canonical) object(in []byte, omit func(name []byte) bool) bool {
	c.in, c.i = in, 0
	c.out, c.members = c.out[:0], c.members[:0]
	c.space()
	if c.i == len(in) || in[c.i] != '{' || !c.membersOf(1, omit) {
		return false
	}
	c.space()
	return c.i == len(in)
}

func (c *canonical) space() {
	for c.i < len(c.in) {
		switch c.in[c.i] {
		case ' ', '\t', '\n', '\r':
			c.i++
		default:
			return
		}
	}
}

// next skips white space and consumes b, if b comes next.
func (c *canonical) next(b byte) bool {
	c.space()
	if c.i < len(c.in) && c.in[c.i] == b {
		c.i++
		return true
	}
	return false
}

func (c *canonical) value(depth int) bool {
	c.space()
	if c.i == len(c.in) || depth > maxDepth {
		return false
	}
	switch b := c.in[c.i]; b {
	case '{':
		return c.membersOf(depth, nil)
	case '[':
		return c.elements(depth)
	case '"':
		return c.str()
	case 't':
		return c.literal("true")
	case 'f':
		return c.literal("false")
	case 'n':
		return c.literal("null")
	}
	return c.number()
}

func (c *canonical) literal(w string) bool {
	if !bytes.HasPrefix(c.in[c.i:], []byte(w)) {
		return false
	}
	c.out = append(c.out, w...)
	c.i += len(w)
	return true
}

// number copies everything that looks like a number. The model server checks its
// grammar.
func (c *canonical) number() bool {
	from := c.i
	for c.i < len(c.in) {
		switch b := c.in[c.i]; {
		case b >= '0' && b <= '9', b == '-', b == '+', b == '.', b == 'e', b == 'E':
			c.i++
			continue
		}
		break
	}
	c.out = append(c.out, c.in[from:c.i]...)
	return c.i > from
}

func (c *canonical) elements(depth int) bool {
	c.i++
	c.out = append(c.out, '[')
	if c.next(']') {
		c.out = append(c.out, ']')
		return true
	}
	for {
		if !c.value(depth + 1) {
			return false
		}
		switch {
		case c.next(','):
			c.out = append(c.out, ',')
		case c.next(']'):
			c.out = append(c.out, ']')
			return true
		default:
			return false
		}
	}
}

func (c *canonical) membersOf(depth int, omit func([]byte) bool) bool {
	c.i++
	c.out = append(c.out, '{')
	base, start := len(c.members), len(c.out)
	if c.next('}') {
		c.out = append(c.out, '}')
		return true
	}
	for {
		c.space()
		m := member{from: len(c.out)}
		if c.i == len(c.in) || c.in[c.i] != '"' || !c.str() || !c.next(':') {
			return false
		}
		m.name = len(c.out)
		c.out = append(c.out, ':')
		if !c.value(depth + 1) {
			return false
		}
		c.out = append(c.out, ',')
		m.to = len(c.out)
		if omit != nil && omit(c.out[m.from+1:m.name-1]) {
			c.out = c.out[:m.from]
		} else {
			c.members = append(c.members, m)
		}
		if c.next('}') {
			break
		}
		if !c.next(',') {
			return false
		}
	}
	c.sort(c.members[base:], start)
	c.members = c.members[:base]
	if len(c.out) > start {
		c.out = c.out[:len(c.out)-1] // the last comma
	}
	c.out = append(c.out, '}')
	return true
}

// sort sorts by name the members ms, which out holds from start on.
func (c *canonical) sort(ms []member, start int) {
	byName := func(a, b member) int { return bytes.Compare(c.out[a.from:a.name], c.out[b.from:b.name]) }
	if slices.IsSortedFunc(ms, byName) {
		return
	}
	slices.SortStableFunc(ms, byName)
	c.scratch = append(c.scratch[:0], c.out[start:]...)
	at := start
	for _, m := range ms {
		at += copy(c.out[at:], c.scratch[m.from-start:m.to-start])
	}
}

// str reads the string at i, with its quotes.
func (c *canonical) str() bool {
	rest := c.in[c.i+1:]
	end := bytes.IndexByte(rest, '"')
	if end < 0 {
		return false
	}
	c.out = append(c.out, '"')
	if escape := bytes.IndexByte(rest[:end], '\\'); escape >= 0 {
		c.out = append(c.out, rest[:escape]...)
		c.i += 1 + escape
		return c.escaped()
	}
	c.out = append(c.out, rest[:end+1]...)
	c.i += end + 2
	return true
}

// escaped reads the rest of a string, from its first backslash on.
func (c *canonical) escaped() bool {
	for c.i < len(c.in) {
		b := c.in[c.i]
		if b != '\\' {
			c.i++
			c.out = append(c.out, b)
			if b == '"' {
				return true
			}
			continue
		}
		if c.i+1 == len(c.in) {
			return false
		}
		b = c.in[c.i+1]
		c.i += 2
		switch b {
		case '"', '\\', 'b', 'f', 'n', 'r', 't':
			c.out = append(c.out, '\\', b)
		case '/':
			c.out = append(c.out, '/')
		case 'u':
			if !c.unicode() {
				return false
			}
		default:
			return false
		}
	}
	return false
}

const hexDigits = "0123456789abcdef"

// unicode reads the four digits after \u, and the second half of a surrogate pair.
func (c *canonical) unicode() bool {
	r, ok := c.hex4()
	if !ok {
		return false
	}
	if utf16.IsSurrogate(r) {
		at := c.i
		if bytes.HasPrefix(c.in[at:], []byte(`\u`)) {
			c.i += 2
			second, ok := c.hex4()
			if !ok {
				return false
			}
			if pair := utf16.DecodeRune(r, second); pair != utf8.RuneError {
				c.out = utf8.AppendRune(c.out, pair)
				return true
			}
			c.i = at
		}
		// A lone surrogate is not a character. It stays escaped.
		c.hexEscape(r)
		return true
	}
	switch r {
	case '"', '\\':
		c.out = append(c.out, '\\', byte(r))
	case '\b':
		c.out = append(c.out, `\b`...)
	case '\f':
		c.out = append(c.out, `\f`...)
	case '\n':
		c.out = append(c.out, `\n`...)
	case '\r':
		c.out = append(c.out, `\r`...)
	case '\t':
		c.out = append(c.out, `\t`...)
	default:
		if r < ' ' {
			c.hexEscape(r)
		} else {
			c.out = utf8.AppendRune(c.out, r)
		}
	}
	return true
}

func (c *canonical) hexEscape(r rune) {
	c.out = append(c.out, '\\', 'u', hexDigits[r>>12&15], hexDigits[r>>8&15], hexDigits[r>>4&15], hexDigits[r&15])
}

func (c *canonical) hex4() (r rune, ok bool) {
	if len(c.in)-c.i < 4 {
		return 0, false
	}
	for _, b := range c.in[c.i : c.i+4] {
		switch {
		case b >= '0' && b <= '9':
			r = r<<4 | rune(b-'0')
		case b >= 'a' && b <= 'f':
			r = r<<4 | rune(b-'a'+10)
		case b >= 'A' && b <= 'F':
			r = r<<4 | rune(b-'A'+10)
		default:
			return 0, false
		}
	}
	c.i += 4
	return r, true
}
