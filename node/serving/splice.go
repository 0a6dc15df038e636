package serving

import (
	"bytes"
	"encoding/json"
)

// edit replaces a span of a document; an empty span inserts.
type edit struct {
	at   Span
	with []byte
}

// splice applies edits, which must be ordered and not overlap, to a copy.
func splice(doc []byte, edits ...edit) []byte {
	size := len(doc)
	for _, e := range edits {
		size += len(e.with) - (e.at.To - e.at.From)
	}
	return spliceInto(make([]byte, 0, size), doc, edits...)
}

// spliceInto appends the edited document to dst.
func spliceInto(dst, doc []byte, edits ...edit) []byte {
	from := 0
	for _, e := range edits {
		dst = append(dst, doc[from:e.at.From]...)
		dst = append(dst, e.with...)
		from = e.at.To
	}
	return append(dst, doc[from:]...)
}

// quoted is s as a JSON string.
func quoted(s string) []byte {
	b, err := json.Marshal(s)
	if err != nil { // a string always marshals
		panic(err)
	}
	return b
}

// upstreamBody is the body that goes to an upstream: the client's bytes, with
// the model's name and the wish for usage changed where they must differ. With
// nothing to change it is the client's slice itself.
func upstreamBody(r *Request, model []byte, usage bool) []byte {
	var edits [2]edit
	n := 0
	if model != nil && !bytes.Equal(model, r.Body[r.ModelAt.From:r.ModelAt.To]) {
		edits[n] = edit{r.ModelAt, model}
		n++
	}
	if usage {
		if e, ok := usageEdit(r); ok {
			edits[n] = e
			n++
			if n == 2 && edits[0].at.From > e.at.From {
				edits[0], edits[1] = edits[1], edits[0]
			}
		}
	}
	if n == 0 {
		return r.Body
	}
	return splice(r.Body, edits[:n]...)
}

var (
	usageMember  = []byte(`"stream_options":{"include_usage":true},`)
	usageOptions = []byte(`{"include_usage":true}`)
	usageFirst   = []byte(`"include_usage":true,`)
	jsonTrue     = []byte(`true`)
)

// usageEdit asks for a usage chunk, keeping the client's other stream options.
func usageEdit(r *Request) (edit, bool) {
	if r.UsageAt == (Span{}) {
		// Every body has a model, so the object isn't empty and a comma fits.
		at := bytes.IndexByte(r.Body, '{') + 1
		return edit{Span{at, at}, usageMember}, at > 0
	}
	options := r.Body[r.UsageAt.From:r.UsageAt.To]
	if at, ok := memberSpan(options, "include_usage"); ok {
		at.From += r.UsageAt.From
		at.To += r.UsageAt.From
		return edit{at, jsonTrue}, true
	}
	inner := bytes.TrimSpace(options)
	switch {
	case bytes.Equal(inner, []byte("null")):
		return edit{r.UsageAt, usageOptions}, true
	case len(inner) < 2 || inner[0] != '{':
		return edit{}, false // the upstream shall refuse it in its own words
	case len(bytes.TrimSpace(inner[1:len(inner)-1])) == 0:
		return edit{r.UsageAt, usageOptions}, true
	}
	at := r.UsageAt.From + bytes.IndexByte(options, '{') + 1
	return edit{Span{at, at}, usageFirst}, true
}
