package cache

import (
	"encoding/base64"
	"sync"
)

// Key identifies one answer. It is an HMAC of everything that the answer depends on, so
// it reveals nothing of that.
type Key [32]byte

// String is the key as operators and the header Cache-Status write it: 43 characters.
func (k Key) String() string { return base64.RawURLEncoding.EncodeToString(k[:]) }

// Append appends String to a buffer.
func (k Key) Append(b []byte) []byte { return base64.RawURLEncoding.AppendEncode(b, k[:]) }

// IsZero reports whether k is the zero key, which no question has.
func (k Key) IsZero() bool { return k == Key{} }

// ParseKey reads what String wrote. False: text is something else.
func ParseKey(text string) (k Key, ok bool) {
	b, err := base64.RawURLEncoding.DecodeString(text)
	if err != nil || len(b) != len(k) {
		return k, false
	}
	return Key(b), true
}

// Shape is the form of an answer on the wire. The shapes have separate entries.
type Shape string

const (
	Plain  Shape = "plain"
	Stream Shape = "stream"
)

// Question is everything that an answer depends on.
type Question struct {
	// Owner is the tenant that may see the answer, or an API key without a tenant.
	Owner    string
	Endpoint string // canonical path
	Model    string // as requested, after any split
	Revision string // of the weights, "" when none is configured
	Shape    Shape
	// Headers are the request's headers that may change an answer: names and values
	// alternate.
	Headers []string
	Body    []byte // JSON
}

const (
	keyPurpose = "cache key v1"
	// maxPooled bounds the buffers that are reused.
	maxPooled = 256 << 10
)

var forms = sync.Pool{New: func() any { return &canonical{} }}

// Key gives a question's key. False: the body is not a JSON object, or the cluster has
// not agreed on a secret yet.
func (c *Cache) Key(q *Question) (Key, bool) {
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

// part appends a text to parts. When names grows, earlier parts keep pointing to the old
// array, which still has their bytes.
func (c *canonical) part(s string) {
	from := len(c.names)
	c.names = append(c.names, s...)
	c.parts = append(c.parts, c.names[from:])
}

// omits says which top-level members do not change an answer: those that only say
// whether it is streamed. The options of a stream change its chunks.
func (q *Question) omits(name []byte) bool {
	switch string(name) {
	case "stream":
		return true
	case "stream_options":
		return q.Shape == Plain
	}
	return false
}
