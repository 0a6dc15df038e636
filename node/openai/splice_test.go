package openai

import (
	"bytes"
	"encoding/json"
	"testing"

	"pgregory.net/rapid"
)

func TestBodyFor(t *testing.T) {
	for _, c := range []struct {
		name, body, model string
		usage             bool
		want              string
	}{
		{"nothing to do", `{"model":"m","a":1}`, "", false, `{"model":"m","a":1}`},
		{"same model", `{"model":"m"}`, "m", false, `{"model":"m"}`},
		{"model", `{ "a" : [1, 2] , "model" : "m" , "b":"m"}`, "deepseek-ai/V3", false, `{ "a" : [1, 2] , "model" : "deepseek-ai/V3" , "b":"m"}`},
		{"model to quote", `{"model":"m"}`, `a"b`, false, `{"model":"a\"b"}`},
		{"usage", `{"model":"m"}`, "", true, `{"stream_options":{"include_usage":true},"model":"m"}`},
		{"usage after space", ` {"model":"m"}`, "", true, ` {"stream_options":{"include_usage":true},"model":"m"}`},
		{"usage and model", `{"model":"m","x":0}`, "n", true, `{"stream_options":{"include_usage":true},"model":"n","x":0}`},
		{"options null", `{"model":"m","stream_options":null}`, "n", true, `{"model":"n","stream_options":{"include_usage":true}}`},
		{"options first", `{"stream_options":{ },"model":"m"}`, "n", true, `{"stream_options":{"include_usage":true},"model":"n"}`},
		{"options false", `{"model":"m","stream_options":{"include_usage": false ,"b":2}}`, "", true, `{"model":"m","stream_options":{"include_usage": true ,"b":2}}`},
		{"options other", `{"model":"m","stream_options": {"b":2}}`, "", true, `{"model":"m","stream_options": {"include_usage":true,"b":2}}`},
		{"options wrong", `{"model":"m","stream_options":7}`, "", true, `{"model":"m","stream_options":7}`},
	} {
		var r Request
		r.Body = []byte(c.body)
		r.ModelAt, _ = Member(r.Body, "model")
		r.UsageAt, _ = Member(r.Body, "stream_options")
		var model []byte
		if c.model != "" {
			model = Quote(c.model)
		}
		before := bytes.Clone(r.Body)
		got := r.BodyFor(model, c.usage)
		if string(got) != c.want {
			t.Errorf("%s: %s", c.name, got)
		}
		if !bytes.Equal(r.Body, before) {
			t.Errorf("%s: the client's body was changed", c.name)
		}
		if !json.Valid(got) {
			t.Errorf("%s: no JSON", c.name)
		}
	}
}

func TestSplice(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a, b, c := rapid.SliceOf(rapid.Byte()).Draw(t, "a"), rapid.SliceOf(rapid.Byte()).Draw(t, "b"), rapid.SliceOf(rapid.Byte()).Draw(t, "c")
		d, e := rapid.SliceOf(rapid.Byte()).Draw(t, "d"), rapid.SliceOf(rapid.Byte()).Draw(t, "e")
		doc := bytes.Join([][]byte{a, b, c, d, e}, nil)
		p, q := rapid.SliceOf(rapid.Byte()).Draw(t, "p"), rapid.SliceOf(rapid.Byte()).Draw(t, "q")
		edits := []Edit{{Span{len(a), len(a) + len(b)}, p}, {Span{len(a) + len(b) + len(c), len(doc) - len(e)}, q}}
		if len(b) > 0 && rapid.Bool().Draw(t, "other order") { // two at one place go in as they come
			edits[0], edits[1] = edits[1], edits[0]
		}
		got := Splice(doc, edits...)
		if want := bytes.Join([][]byte{a, p, c, q, e}, nil); !bytes.Equal(got, want) {
			t.Fatalf("got %q want %q", got, want)
		}
	})
}
