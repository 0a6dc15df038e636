package serving

import (
	"bytes"
	"encoding/json"
	"testing"

	"pgregory.net/rapid"
)

func TestUpstreamBody(t *testing.T) {
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
		r := request("/v1/chat/completions", c.body, true)
		var model []byte
		if c.model != "" {
			model = quoted(c.model)
		}
		before := bytes.Clone(r.Body)
		got := upstreamBody(r, model, c.usage)
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
		got := splice(doc, edit{Span{len(a), len(a) + len(b)}, p}, edit{Span{len(a) + len(b) + len(c), len(doc) - len(e)}, q})
		if want := bytes.Join([][]byte{a, p, c, q, e}, nil); !bytes.Equal(got, want) {
			t.Fatalf("got %q want %q", got, want)
		}
	})
}

func TestJoin(t *testing.T) {
	for _, c := range []struct{ base, endpoint, want string }{
		{"http://x/v1", "/v1/chat/completions", "http://x/v1/chat/completions"},
		{"http://x/v1/", "/v1/chat/completions", "http://x/v1/chat/completions"},
		{"http://x:80", "/v1/embeddings", "http://x:80/v1/embeddings"},
		{"https://api.deepseek.com", "/v1/chat/completions", "https://api.deepseek.com/v1/chat/completions"},
		{"https://api.deepseek.com/beta", "/v1/completions", "https://api.deepseek.com/beta/completions"},
		{"http://x/api/v1", "/v1/rerank", "http://x/api/v1/rerank"},
		{"http://x/v1", "/tokenize", "http://x/tokenize"},
		{"http://x/api/v1", "/tokenize", "http://x/api/tokenize"},
	} {
		b, err := parseBase(c.base)
		if err != nil {
			t.Fatal(err)
		}
		if got := b.join(c.endpoint).String(); got != c.want {
			t.Errorf("%s + %s = %s", c.base, c.endpoint, got)
		}
	}
	for _, bad := range []string{"", "x/v1", "ftp://x", "http://", "http://[x"} {
		if _, err := parseBase(bad); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}
