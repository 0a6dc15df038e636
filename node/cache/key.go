package cache

import (
	"encoding/base64"
	"sync"
)

// Key names one answer: an HMAC of everything that the answer depends on. It
// tells nothing of it.
type Key [32]byte

// String is the key as operators and Cache-Status write it: 43 characters.
func (k Key) String() string { return base64.RawURLEncoding.EncodeToString(k[:]) }

// Append is String for those who have a buffer.
func (k Key) Append(b []byte) []byte { return base64.RawURLEncoding.AppendEncode(b, k[:]) }

// IsZero: it is no key.
func (k Key) IsZero() bool { return k == Key{} }

// ParseKey reads what String wrote; false for anything else.
func ParseKey(text string) (k Key, ok bool) {
	b, err := base64.RawURLEncoding.DecodeString(text)
	if err != nil || len(b) != len(k) {
		return k, false
	}
	return Key(b), true
}

// Shape is the form that an answer has on the wire. Each is kept by itself.
type Shape string

// The shapes.
const (
	Plain  Shape = "plain"
	Stream Shape = "stream"
)

// Question is what an answer depends on.
type Question struct {
	// Owner is who may see the answer: a tenant, or a key without one.
	Owner    string
	Endpoint string // canonical path
	Model    string // as asked for, after any split
	Revision string // of the weights, "" when none is configured
	Shape    Shape
	// Headers are those of the request's that may change an answer, as
	// alternating names and values.
	Headers []string
	Body    []byte // JSON
}

const (
	keyPurpose = "cache key v1"
	// maxPooled bounds the buffers that are kept for the next request.
	maxPooled = 256 << 10
)

var forms = sync.Pool{New: func() any { return &canonical{} }}

// key gives the question's key; false when it can't have one: the body is no
// JSON object, or nothing is agreed on yet.
func (c *Cache) key(q *Question) (Key, bool) {
	mac := c.mac()
	if mac == nil {
		return Key{}, false
	}
	form := forms.Get().(*canonical) //nolint:errcheck,forcetypeassert // the pool holds nothing else
	defer func() {
		if cap(form.out) <= maxPooled {
			form.in = nil
			forms.Put(form)
		}
	}()
	if !form.object(q.Body, q.omits) {
		return Key{}, false
	}
	form.names, form.parts = form.names[:0], form.parts[:0]
	for _, s := range [...]string{q.Owner, q.Endpoint, q.Model, q.Revision, string(q.Shape)} {
		form.part(s)
	}
	for _, h := range q.Headers {
		form.part(h)
	}
	return Key(mac.Sum(append(form.parts, form.out)...)), true
}

// part adds a text to what the key is made of. Parts that were added before keep
// the bytes they have when names grows and moves.
func (c *canonical) part(s string) {
	from := len(c.names)
	c.names = append(c.names, s...)
	c.parts = append(c.parts, c.names[from:])
}

// omits says which members of a body say only how the answer travels. Of a
// stream, its options change the chunks.
func (q *Question) omits(name []byte) bool {
	switch string(name) {
	case "stream":
		return true
	case "stream_options":
		return q.Shape == Plain
	}
	return false
}
