package cache

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"pgregory.net/rapid"
)

// Requests, and for every member of OpenAI's requests and a few of vLLM's and DeepSeek's
// a value that the request does not have.
var (
	chatBase  = `{"model":"m","messages":[{"role":"system","content":"be brief"},{"role":"user","content":"hi"}],"temperature":0}`
	chatOther = map[string]string{
		"messages":    `[{"role":"system","content":"be long"},{"role":"user","content":"hi"}]`,
		"temperature": `0.0`, "audio": `{"voice":"x"}`, "frequency_penalty": `1`, "function_call": `"none"`, "functions": `[{"name":"f"}]`,
		"logit_bias": `{"5":1}`, "logprobs": `true`, "max_completion_tokens": `5`, "max_tokens": `5`, "metadata": `{"a":"b"}`,
		"modalities": `["text"]`, "n": `2`, "parallel_tool_calls": `false`, "prediction": `{"type":"content"}`, "presence_penalty": `1`,
		"prompt_cache_key": `"k"`, "reasoning_effort": `"low"`, "response_format": `{"type":"json_object"}`, "safety_identifier": `"s"`,
		"seed": `7`, "service_tier": `"flex"`, "stop": `["x"]`, "store": `true`, "tool_choice": `"auto"`,
		"tools": `[{"type":"function","function":{"name":"f","parameters":{"type":"object"}}}]`, "top_logprobs": `2`, "top_p": `0.5`,
		"user": `"u"`, "verbosity": `"low"`, "web_search_options": `{}`,
		"top_k": `1`, "min_p": `0.1`, "guided_json": `{"a":1}`, "chat_template_kwargs": `{"thinking":true}`, "thinking": `{"type":"enabled"}`, "x_unknown": `null`,
	}
	completionBase  = `{"model":"m","prompt":"hi","temperature":0}`
	completionOther = map[string]string{
		"prompt": `"ho"`, "best_of": `2`, "echo": `true`, "frequency_penalty": `1`, "logit_bias": `{"5":1}`, "logprobs": `1`, "max_tokens": `5`,
		"n": `2`, "presence_penalty": `1`, "seed": `7`, "stop": `"x"`, "suffix": `"s"`, "temperature": `1`, "top_p": `0.5`, "user": `"u"`,
	}
	embedBase  = `{"model":"m","input":"hi"}`
	embedOther = map[string]string{"input": `["hi"]`, "dimensions": `8`, "encoding_format": `"base64"`, "user": `"u"`}
)

func with(t *testing.T, base, name, value string) string {
	t.Helper()
	var o map[string]json.RawMessage
	if err := json.Unmarshal([]byte(base), &o); err != nil {
		t.Fatal(err)
	}
	o[name] = json.RawMessage(value)
	b, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestKeyHasEveryField: no two of all these questions share a key.
func TestKeyHasEveryField(t *testing.T) {
	r := newRig(t, nil, noTier)
	seen := map[Key]string{}
	ask := func(what string, q Question) {
		t.Helper()
		k, ok := r.Key(&q)
		if !ok {
			t.Fatalf("%s has no key", what)
		}
		if other, twice := seen[k]; twice {
			t.Errorf("%s and %s have the same key", what, other)
		}
		seen[k] = what
	}
	for endpoint, c := range map[string]struct {
		base  string
		other map[string]string
	}{
		"/v1/chat/completions": {chatBase, chatOther}, "/v1/completions": {completionBase, completionOther}, "/v1/embeddings": {embedBase, embedOther},
	} {
		base := Question{Owner: "tenant a", Endpoint: endpoint, Model: "m", Shape: Plain, Body: []byte(c.base)}
		ask(endpoint, base)
		for _, name := range slices.Sorted(maps.Keys(c.other)) {
			q := base
			q.Body = []byte(with(t, c.base, name, c.other[name]))
			ask(endpoint+" "+name, q)
		}
		for what, change := range map[string]func(*Question){
			"tenant":   func(q *Question) { q.Owner = "tenant b" },
			"key":      func(q *Question) { q.Owner = "key a" },
			"model":    func(q *Question) { q.Model = "n" },
			"revision": func(q *Question) { q.Revision = "r" },
			"shape":    func(q *Question) { q.Shape = Stream },
			"options": func(q *Question) {
				q.Shape = Stream
				q.Body = []byte(with(t, c.base, "stream_options", `{"include_usage":true}`))
			},
			"header":   func(q *Question) { q.Headers = []string{"Openai-Beta", "x"} },
			"header 2": func(q *Question) { q.Headers = []string{"Openai-Beta", "y"} },
		} {
			q := base
			change(&q)
			ask(endpoint+" "+what, q)
		}
	}
}

// TestSpellings: all spellings of a question share its key, other questions do not.
func TestSpellings(t *testing.T) {
	r := newRig(t, nil, noTier)
	key := func(shape Shape, body string) Key {
		k, ok := r.Key(&Question{Owner: "tenant a", Model: "m", Shape: shape, Body: []byte(body)})
		if !ok {
			t.Fatalf("%s has no key", body)
		}
		return k
	}
	want := key(Plain, `{"model":"m","messages":[{"role":"user","content":"a\nb\"é😀/"}],"temperature":0}`)
	for _, same := range []string{
		"\n{ \"messages\" : [ { \"content\":\"a\\nb\\\"é😀/\",\"role\":\"user\"}\t], \"temperature\":0,\r\n\"model\":\"m\"} ",
		`{"model":"m","messages":[{"role":"user","content":"a\u000ab\u0022\u00e9\ud83d\ude00\/"}],"temperature":0}`,
		`{"model":"m","messages":[{"role":"user","content":"a\nb\"é😀/"}],"temperature":0,"stream":false}`,
		`{"model":"m","messages":[{"role":"user","content":"a\nb\"é😀/"}],"temperature":0,"stream_options":null,"str\u0065am":null}`,
		`{"model":"m","\u006dessages":[{"role":"user","content":"a\nb\"é😀/"}],"temperature":0}`,
	} {
		if key(Plain, same) != want {
			t.Errorf("another key: %s", same)
		}
	}
	for _, other := range []string{
		`{"model":"m","messages":[{"role":"user","content":"a\\nb\"é😀/"}],"temperature":0}`,
		`{"model":"m","messages":[{"role":"user","content":"a\nb\"é😀/ "}],"temperature":0}`,
		`{"model":"m","messages":[{"role":"user","content":"a\nb\"é😀/"}],"temperature":-0}`,
		`{"model":"m","messages":[{"role":"user","content":"a\nb\"é😀/","stream":false}],"temperature":0}`,
	} {
		if key(Plain, other) == want {
			t.Errorf("the same key: %s", other)
		}
	}
	if key(Stream, `{"stream_options":{"a":1}}`) == key(Stream, `{"stream_options":{"a":2}}`) {
		t.Error("stream_options do not change the key of a stream")
	}
	for _, none := range []string{``, `[]`, `{`, `{"a"}`, `{"a":}`, `{"a":1,}`, `{"a":"`, `{"a":"\x"}`, `{"a":"\u12"}`, `{} x`, `{"a":tru}`, `null`, strings.Repeat(`{"a":`, 200) + `1` + strings.Repeat(`}`, 200)} {
		if _, ok := r.Key(&Question{Body: []byte(none)}); ok {
			t.Errorf("%s has a key", none)
		}
	}
}

// TestChangesAndSpellings: a random change of a request changes its key, a random
// re-spelling does not.
func TestChangesAndSpellings(t *testing.T) {
	r := newRig(t, nil, noTier)
	key := func(t *rapid.T, body string) Key {
		k, ok := r.Key(&Question{Owner: "tenant a", Model: "m", Shape: Plain, Body: []byte(body)})
		if !ok {
			t.Fatalf("%s has no key", body)
		}
		return k
	}
	rapid.Check(t, func(t *rapid.T) {
		value := drawValue(3)
		object := rapid.MapOfN(rapid.StringN(0, 8, 16), value, 1, 6).Draw(t, "request")
		delete(object, "stream")
		delete(object, "stream_options")
		text := spell(t, object)
		if key(t, text) != key(t, spell(t, object)) {
			t.Fatalf("another spelling, another key: %s", text)
		}
		changed := maps.Clone(object)
		name := rapid.StringN(1, 8, 16).Draw(t, "name")
		if len(object) > 0 && rapid.Bool().Draw(t, "change one that is there") {
			name = rapid.SampledFrom(slices.Sorted(maps.Keys(object))).Draw(t, "which")
		}
		if name == "stream" || name == "stream_options" {
			return
		}
		changed[name] = value.Draw(t, "to")
		if old, was := object[name]; was && reflect.DeepEqual(old, changed[name]) {
			return
		}
		if other := spell(t, changed); key(t, text) == key(t, other) {
			t.Fatalf("one key for\n%s\n%s", text, other)
		}
	})
}

// TestNoTwoNumbersShareAKey: a model server may tell 1 from 1.0, and one seed beyond
// 2^53 from the next, so a number counts as it is spelt.
func TestNoTwoNumbersShareAKey(t *testing.T) {
	r := newRig(t, nil, noTier)
	number := rapid.StringMatching(`-?(0|[1-9][0-9]{0,20})(\.[0-9]{1,3})?([eE][+-]?[0-9]{1,3})?`)
	rapid.Check(t, func(t *rapid.T) {
		body := rapid.SampledFrom([]string{
			`{"seed":%s}`, `{"a":true,"seed": %s ,"model":"m"}`, `{"logit_bias":{"7":1,"5":%s}}`, `{"prompt":[1,%s,[2]]}`, `{"tools":[{"b":{"c":[%s]},"a":0}]}`,
		}).Draw(t, "body")
		key := func(number string) Key {
			k, ok := r.Key(&Question{Owner: "tenant a", Model: "m", Shape: Plain, Body: fmt.Appendf(nil, body, number)})
			if !ok {
				t.Fatalf("no key for "+body, number)
			}
			return k
		}
		one := number.Draw(t, "one")
		other := rapid.OneOf(number, rapid.Custom(func(t *rapid.T) string { // close to the first
			switch digit := len(one) - 1; rapid.IntRange(0, 3).Draw(t, "close by") {
			case 0: // another last digit
				return one[:digit] + string('0'+(one[digit]-'0'+1)%10)
			case 1:
				if !strings.ContainsAny(one, ".eE") {
					return one + ".0"
				}
			case 2:
				if !strings.ContainsAny(one, "eE") {
					return one + "e0"
				}
			}
			return strings.TrimPrefix("-"+one, "--")
		})).Draw(t, "other")
		if (one == other) != (key(one) == key(other)) {
			t.Fatalf("%s and %s: the same key is %v", one, other, key(one) == key(other))
		}
	})
}

func drawValue(depth int) *rapid.Generator[any] {
	return rapid.Custom(func(t *rapid.T) any {
		kind := rapid.IntRange(0, 5).Draw(t, "kind")
		if depth == 0 {
			kind %= 4
		}
		switch kind {
		case 0:
			return rapid.StringN(0, 12, 40).Draw(t, "text")
		case 1:
			return json.Number(fmt.Sprint(rapid.IntRange(-99, 99).Draw(t, "number")))
		case 2:
			return rapid.Bool().Draw(t, "bool")
		case 3:
			return nil
		case 4:
			return rapid.SliceOfN(drawValue(depth-1), 0, 4).Draw(t, "list")
		}
		return rapid.MapOfN(rapid.StringN(0, 6, 12), drawValue(depth-1), 0, 4).Draw(t, "object")
	})
}

// spell writes a value in one of the ways that JSON allows.
func spell(t *rapid.T, v any) string {
	space := func() string { return rapid.SampledFrom([]string{"", "", " ", "\n\t"}).Draw(t, "space") }
	switch v := v.(type) {
	case string:
		var b strings.Builder
		b.WriteByte('"')
		for _, r := range v {
			switch {
			case r < ' ' || r < 0x10000 && rapid.IntRange(0, 9).Draw(t, "escape") == 0:
				fmt.Fprintf(&b, `\u%04x`, r)
			case r == '"' || r == '\\':
				b.WriteByte('\\')
				b.WriteRune(r)
			default:
				b.WriteRune(r)
			}
		}
		b.WriteByte('"')
		return b.String()
	case map[string]any:
		names := rapid.Permutation(slices.Sorted(maps.Keys(v))).Draw(t, "order")
		var parts []string
		for _, name := range names {
			parts = append(parts, space()+spell(t, name)+space()+":"+space()+spell(t, v[name])+space())
		}
		return "{" + strings.Join(parts, ",") + "}"
	case []any:
		var parts []string
		for _, e := range v {
			parts = append(parts, space()+spell(t, e))
		}
		return "[" + strings.Join(parts, ",") + space() + "]"
	default:
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
}

// FuzzCanonical: the canonical form has the meaning of the text, and is its own form.
func FuzzCanonical(f *testing.F) {
	for _, seed := range []string{chatBase, `{"b":1,"a":[{"d":"\ud83d\ude00","c":null}]}`, `{"a":"\ud800","\u0061":1e5}`, `{"a":{"z":1,"y":2,"z":3}}`} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		var c, again canonical
		if !c.object(in, nil) {
			return
		}
		if !again.object(c.out, nil) || !bytes.Equal(c.out, again.out) {
			t.Fatalf("%q\n%q\n%q", in, c.out, again.out)
		}
		if !json.Valid(in) || !utf8.Valid(in) {
			return
		}
		if len(c.out) > len(in) && !bytes.ContainsAny(in, `\`) {
			t.Fatalf("%q became %q", in, c.out)
		}
		read := func(b []byte) (v any) {
			d := json.NewDecoder(bytes.NewReader(b))
			d.UseNumber()
			if err := d.Decode(&v); err != nil {
				t.Fatalf("%q: %v", b, err)
			}
			return v
		}
		if a, b := read(in), read(c.out); !reflect.DeepEqual(a, b) {
			t.Fatalf("%q says %v, %q says %v", in, a, c.out, b)
		}
	})
}
