package openai

import (
	"encoding/json"
	"strings"
	"testing"
)

var (
	chat  = EndpointAt("/v1/chat/completions")
	other = EndpointAt("/v1/rerank")
)

func TestParse(t *testing.T) {
	const body = ` {"x":[1,{"a":"}"},-0.5e+3,true,null,""],"model" : "deepseek-\u0063hat","n":2,"temperature":-0.0e9,` +
		`"stream":true,"stream_options":{"chunk":1,"include_usage":true},"user":"u","safety_identifier":"s"} `
	got, err := Parse(chat, []byte(body))
	if err != nil {
		t.Fatal(err)
	}
	at := func(s Span) string { return body[s.From:s.To] }
	if got.Endpoint != chat || string(got.Body) != body || got.Model != "deepseek-chat" || at(got.ModelAt) != `"deepseek-\u0063hat"` {
		t.Errorf("%+v, model at %q", got, at(got.ModelAt))
	}
	if !got.Stream || got.Choices != 2 || !got.WantUsage || !got.Deterministic || at(got.UsageAt) != `{"chunk":1,"include_usage":true}` {
		t.Errorf("%+v, options at %q", got, at(got.UsageAt))
	}
	few, err := Parse(other, []byte(`{"model":"m","n":"many","stream_options":7,"user":{},"Temperature":0}`))
	if err != nil || few.Model != "m" || few.Choices != 1 {
		t.Errorf("an endpoint that passes through: %+v, %v", few, err)
	}
	null, err := Parse(chat, []byte(`{"model":"m","n":null,"stream":null,"stream_options":null,"user":null,"temperature":null}`))
	if err != nil || null.Stream || null.Choices != 1 || null.UsageAt == (Span{}) || null.Deterministic {
		t.Errorf("nulls: %+v, %v", null, err)
	}
}

func TestPrompt(t *testing.T) {
	for body, want := range map[string]string{
		`{"model":"m","messages":[1]}`:                              `[1]`,
		`{"prompt":"x","model":"m"}`:                                `"x"`,
		`{"model":"m","messages":[1],"prompt_cache_key":"k"}`:       `"k"`,
		`{"model":"m","prompt_cache_key":"k","messages":[1]}`:       `"k"`,
		`{"model":"m","messages":[1],"prompt_cache_key":null}`:      `[1]`,
		`{"model":"m","messages":null}`:                             ``,
		`{"model":"m","input":"x","Messages":[1],"x":{"prompt":1}}`: ``,
	} {
		r, err := Parse(chat, []byte(body))
		if got := string(r.PromptAt.In(r.Body)); err != nil || got != want {
			t.Errorf("%s: %s, %v", body, got, err)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	for body, want := range map[string]string{
		``:                                 "the body is empty",
		"  \n":                             "the body is empty",
		`[]`:                               "must be a JSON object (at byte 0)",
		"\xef\xbb\xbf{}":                   "must be a JSON object (at byte 0)",
		`{}`:                               "must provide a model",
		`{"model":null}`:                   "must provide a model",
		`{"model":""}`:                     "must provide a model",
		`{"model":7}`:                      "model must be a string (at byte 9)",
		`{"model":"a","model":"b"}`:        `"model" is given twice (at byte 13)`,
		`{"model":"a","mod\u0065l":"b"}`:   `"model" is given twice (at byte 13)`,
		`{"model":"a","Model":"b"}`:        `"Model" must be written "model" (at byte 13)`,
		`{"MODEL":"b"}`:                    `must be written "model"`,
		`{"model":"a","\u017ftream":true}`: `must be written "stream"`,
		`{"model":"a","x":1,"x":2}`:        `"x" is given twice`,
		`{"model":"a","stream_options":{"include_usage":true,"include_usage":false}}`: "twice",
		`{"model":"a","stream_options":{"Include_Usage":true}}`:                       "must be written",
		`{"model":"a","stream_options":[]}`:                                           "stream_options must be an object",
		`{"model":"a","stream":"yes"}`:                                                "stream must be true or false",
		`{"model":"a","n":0}`:                                                         "n must be between 1 and 128",
		`{"model":"a","n":99999999999999999999}`:                                      "n must be between 1 and 128",
		`{"model":"a","n":1.5}`:                                                       "n must be a whole number",
		`{"model":"a","n":-1}`:                                                        "n must be a whole number",
		`{"model":"a","n":}`:                                                          "n must be a whole number",
		`{"model":"\ud800"}`:                                                          "no character",
		`{"model":"` + strings.Repeat("m", 300) + `"}`:                                "model is longer than 256 bytes",
		`{"model":"a"} x`:                                                             "more after the JSON object (at byte 14)",
		`{"model":"a",}`:                                                              "want a member's name",
		`{"model":"a"`:                                                                "ends too early",
		`{"model":"a","x":[1,]}`:                                                      "want a value",
		`{"model":"a","x":01}`:                                                        "want a comma",
		`{"model":"a","x":1.}`:                                                        "want a digit",
		`{"model":"a","x":1e}`:                                                        "want a digit",
		`{"model":"a","x":tru}`:                                                       "want a value",
		`{"model":"a","x":"\x"}`:                                                      "no such escape",
		`{"model":"a","x":"\u12g4"}`:                                                  "four hexadecimal digits",
		"{\"model\":\"a\",\"x\":\"a\nb\"}":                                            "control characters",
		"{\"model\":\"a\",\"x\":\"\xff\"}":                                            "not valid UTF-8 (at byte 18)",
		`{"model":"a","x":"`:                                                          "ends too early",
		`{"model":"a" "x":1}`:                                                         "want a comma",
		`{"model":"a","x":{"a" 1}}`:                                                   "want a colon",
		`{"model":"a","x":` + strings.Repeat("[", 1e6):                                "nested deeper than 128",
		`{"model":"a","x":` + strings.Repeat(`{"a":`, 200):                            "nested deeper than 128",
		`{"model":"a"` + manyMembers(300) + `}`:                                       "more than 256 members",
	} {
		_, err := Parse(chat, []byte(body))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.60q: %v, want %q", body, err, want)
		}
	}
	deepest := `{"model":"a","x":` + strings.Repeat("[", maxRequestDepth-1) + strings.Repeat("]", maxRequestDepth-1) + `}`
	if _, err := Parse(chat, []byte(deepest)); err != nil {
		t.Errorf("%d levels: %v", maxRequestDepth, err)
	}
}

func manyMembers(n int) string {
	var b strings.Builder
	for i := range n {
		b.WriteString(`,"k` + strings.Repeat("k", i) + `":1`)
	}
	return b.String()
}

// FuzzParse: what Parse takes, encoding/json takes too, and reads the same in it.
func FuzzParse(f *testing.F) {
	for _, s := range []string{
		`{"model":"m","messages":[{"role":"user","content":"hi \u00e9 é \\ \" /"}],"stream":true,"n":2}`,
		`{"model":"m","stream_options":{"include_usage":true,"x":[{}]},"user":"u"}`,
		`{"model":"a","model":"b"}`, `{"Model":"a"}`, `{"ſtream":true,"model":"k"}`,
		`{"model":"\ud83d\ude00","x":-0.0e-10}`, `{"model":"a","x":"` + strings.Repeat("é", 40) + `"}`,
		`{"model":"a","x":[[[[[[]]]]]]}`, "{\"model\":\"a\x00\"}", `{"model":"a"}{}`, `null`, `"`, `{"a`,
	} {
		f.Add([]byte(s), true)
		f.Add([]byte(s), false)
	}
	f.Fuzz(func(t *testing.T, body []byte, full bool) {
		e := other
		if full {
			e = chat
		}
		got, err := Parse(e, body)
		if err != nil {
			return
		}
		if !json.Valid(body) {
			t.Fatalf("accepted what is no JSON: %q", body)
		}
		var few struct {
			Model  string `json:"model"`
			Stream bool   `json:"stream"`
		}
		if err := json.Unmarshal(body, &few); err != nil {
			t.Fatalf("encoding/json refuses %q: %v", body, err)
		}
		var named string
		if err := json.Unmarshal(body[got.ModelAt.From:got.ModelAt.To], &named); err != nil || named != few.Model {
			t.Fatalf("model's span in %q holds %q (%v)", body, named, err)
		}
		if few.Model != got.Model || few.Stream != got.Stream {
			t.Fatalf("%q: encoding/json reads %+v, Parse %q %v", body, few, got.Model, got.Stream)
		}
		if !full {
			return
		}
		n := 1
		rest := struct {
			N       *int `json:"n"`
			Options struct {
				Usage bool `json:"include_usage"`
			} `json:"stream_options"`
		}{}
		if err := json.Unmarshal(body, &rest); err != nil {
			t.Fatalf("encoding/json refuses %q: %v", body, err)
		}
		if rest.N != nil {
			n = *rest.N
		}
		if n != got.Choices || rest.Options.Usage != got.WantUsage {
			t.Fatalf("%q: encoding/json reads %+v, Parse %+v", body, rest, got)
		}
	})
}

var benchBody = []byte(`{"model":"deepseek-chat","messages":[{"role":"system","content":"You are a helpful assistant, brief and kind."},` +
	`{"role":"user","content":"` + strings.Repeat("tell me more ", 14) + `"}],"temperature":0.7,"stream":false}`)

func BenchmarkParse(b *testing.B) {
	for _, size := range []int{1, 1000} {
		body := benchBody
		if size > 1 {
			body = []byte(strings.Replace(string(benchBody), "tell", strings.Repeat("tell me 中文 ", size), 1))
		}
		b.Run("", func(b *testing.B) {
			b.SetBytes(int64(len(body)))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := Parse(chat, body); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// TestDocument: a document is read as strictly as a request, and a request in it as Parse
// reads it, with errors that name the member.
func TestDocument(t *testing.T) {
	type document struct {
		request Request
		word    string
		number  int
	}
	read := func(text string) (d document, err error) {
		s := NewScanner([]byte(text))
		err = s.Document(func(key []byte, at int) (err error) {
			switch string(key) {
			case "request":
				d.request, err = s.Request("request")
			case "word":
				d.word, err = s.OneOf("word", []string{"a", "b"})
			case "number":
				d.number, err = s.Whole("number", 0, 9)
			default:
				err = &BodyError{At: at, Param: string(key), Text: "unknown"}
			}
			return err
		})
		return d, err
	}
	d, err := read(` {"number":9,"request": {"messages":[1],"model":"m","stream_options":{}},"word":"b"} `)
	r := d.request
	if err != nil || d.number != 9 || d.word != "b" || r.Model != "m" || string(r.Body) != `{"messages":[1],"model":"m","stream_options":{}}` {
		t.Fatalf("%+v, %v", d, err)
	}
	if at := func(s Span) string { return string(s.In(r.Body)) }; at(r.ModelAt) != `"m"` || at(r.PromptAt) != "[1]" || at(r.UsageAt) != "{}" {
		t.Errorf("spans of %+v", r)
	}
	for text, param := range map[string]string{
		`{"word":"c"}`: "word", `{"word":1}`: "word", `{"number":10}`: "number", `{"odd":1}`: "odd", `{"word":"a","word":"a"}`: "word",
		`{"request":1}`: "request", `{"request":{}}`: "request.model", `{"request":{"model":"m","model":"n"}}`: "request.model",
		`{"request":{"model":"m","x":tru}}`: "request", `{}x`: "", ``: "", "{\"\xff\"": "",
	} {
		_, err := read(text)
		bad, ok := err.(*BodyError) //nolint:errorlint // nothing wraps it
		if !ok || bad.Param != param {
			t.Errorf("%s: %v, want one about %q", text, err, param)
		}
	}
}
