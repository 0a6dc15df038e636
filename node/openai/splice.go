package openai

import (
	"bytes"
	"encoding/json"
	"slices"
)

// Edit replaces a span of a document; an empty span inserts.
type Edit struct {
	At   Span
	With []byte
}

// Splice applies edits, which must not overlap, to a copy. It puts them in order.
func Splice(doc []byte, edits ...Edit) []byte {
	size := len(doc)
	for _, e := range edits {
		size += len(e.With) - (e.At.To - e.At.From)
	}
	return spliceInto(make([]byte, 0, size), doc, edits...)
}

// spliceInto appends the edited document to dst.
func spliceInto(dst, doc []byte, edits ...Edit) []byte {
	slices.SortFunc(edits, func(a, b Edit) int { return a.At.From - b.At.From })
	from := 0
	for _, e := range edits {
		dst = append(dst, doc[from:e.At.From]...)
		dst = append(dst, e.With...)
		from = e.At.To
	}
	return append(dst, doc[from:]...)
}

// Quote gives s as a JSON string.
func Quote(s string) []byte {
	b, err := json.Marshal(s)
	if err != nil { // a string always marshals
		panic(err)
	}
	return b
}

// BodyFor is the body for a server that knows the model by another name (quoted,
// nil: the client's), with a chunk of usage asked for when usage is set. All else
// is byte for byte the client's; with nothing to change it is Body itself.
func (r *Request) BodyFor(model []byte, usage bool) []byte {
	var edits [2]Edit
	n := 0
	if model != nil && !bytes.Equal(model, r.ModelAt.In(r.Body)) {
		edits[n] = Edit{r.ModelAt, model}
		n++
	}
	if usage {
		if e, ok := r.usageEdit(); ok {
			edits[n] = e
			n++
		}
	}
	if n == 0 {
		return r.Body
	}
	return Splice(r.Body, edits[:n]...)
}

var (
	usageMember  = []byte(`"stream_options":{"include_usage":true},`)
	usageOptions = []byte(`{"include_usage":true}`)
	usageFirst   = []byte(`"include_usage":true,`)
	jsonTrue     = []byte(`true`)
)

// usageEdit asks for a usage chunk, keeping the client's other stream options.
func (r *Request) usageEdit() (Edit, bool) {
	if r.UsageAt == (Span{}) {
		// Every body has a model, so the object isn't empty and a comma fits.
		at := bytes.IndexByte(r.Body, '{') + 1
		return Edit{Span{at, at}, usageMember}, at > 0
	}
	options := r.UsageAt.In(r.Body)
	if at, ok := Member(options, "include_usage"); ok {
		at.From += r.UsageAt.From
		at.To += r.UsageAt.From
		return Edit{at, jsonTrue}, true
	}
	inner := bytes.TrimSpace(options)
	switch {
	case bytes.Equal(inner, []byte("null")):
		return Edit{r.UsageAt, usageOptions}, true
	case len(inner) < 2 || inner[0] != '{':
		return Edit{}, false // the server shall refuse it in its own words
	case len(bytes.TrimSpace(inner[1:len(inner)-1])) == 0:
		return Edit{r.UsageAt, usageOptions}, true
	}
	at := r.UsageAt.From + bytes.IndexByte(options, '{') + 1
	return Edit{Span{at, at}, usageFirst}, true
}
