package gateway

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/dsnode/dsnode/node/serving"
)

func TestScanReads(t *testing.T) {
	const body = ` {"x":[1,{"a":"}"},-0.5e+3,true,null,""],"model" : "deepseek-\u0063hat","n":2,` +
		`"stream":true,"stream_options":{"chunk":1,"include_usage":true},"user":"u","safety_identifier":"s","prompt_cache_key":"k"} `
	got, err := scan([]byte(body), true)
	if err != nil {
		t.Fatal(err)
	}
	at := func(s serving.Span) string { return body[s.From:s.To] }
	if string(got.model) != "deepseek-chat" || at(got.modelAt) != `"deepseek-\u0063hat"` {
		t.Errorf("model %q at %q", got.model, at(got.modelAt))
	}
	if !got.stream || got.choices != 2 || !got.wantUsage || at(got.usageAt) != `{"chunk":1,"include_usage":true}` {
		t.Errorf("%+v, options at %q", got, at(got.usageAt))
	}
	if string(got.user)+string(got.safetyID)+string(got.cacheKey) != "usk" {
		t.Errorf("user %q, safety %q, cache key %q", got.user, got.safetyID, got.cacheKey)
	}
	few, err := scan([]byte(`{"model":"m","n":"many","stream_options":7,"user":{}}`), false)
	if err != nil || string(few.model) != "m" || few.choices != 1 {
		t.Errorf("pass-through: %+v, %v", few, err)
	}
	null, err := scan([]byte(`{"model":"m","n":null,"stream":null,"stream_options":null,"user":null}`), true)
	if err != nil || null.stream || null.choices != 1 || null.usageAt == (serving.Span{}) {
		t.Errorf("nulls: %+v, %v", null, err)
	}
}

func TestScanRefuses(t *testing.T) {
	for body, want := range map[string]string{
		``:                                 "the body is empty",
		"  \n":                             "the body is empty",
		`[]`:                               "must be a JSON object (at byte 0)",
		"\xef\xbb\xbf{}":                   "must be a JSON object (at byte 0)",
		`{}`:                               "must provide a model",
		`{"model":null}`:                   "must provide a model",
		`{"model":""}`:                     "must provide a model",
		`{"model":7}`:                      "model must be a string (at byte 9)",
		`{"model":"a","model":"b"}`:        `"model" stands there twice (at byte 13)`,
		`{"model":"a","mod\u0065l":"b"}`:   `"model" stands there twice (at byte 13)`,
		`{"model":"a","Model":"b"}`:        `"Model" must be written "model" (at byte 13)`,
		`{"MODEL":"b"}`:                    `must be written "model"`,
		`{"model":"a","\u017ftream":true}`: `must be written "stream"`,
		`{"model":"a","x":1,"x":2}`:        `"x" stands there twice`,
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
		_, err := scan([]byte(body), true)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.60q: %v, want %q", body, err, want)
		}
	}
	deepest := `{"model":"a","x":` + strings.Repeat("[", maxDepth-1) + strings.Repeat("]", maxDepth-1) + `}`
	if _, err := scan([]byte(deepest), true); err != nil {
		t.Errorf("%d levels: %v", maxDepth, err)
	}
}

func manyMembers(n int) string {
	var b strings.Builder
	for i := range n {
		b.WriteString(`,"k` + strings.Repeat("k", i) + `":1`)
	}
	return b.String()
}

// FuzzScan holds scan against encoding/json: what scan takes, it takes, with
// the same meaning.
func FuzzScan(f *testing.F) {
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
		got, err := scan(body, full)
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
		if err := json.Unmarshal(body[got.modelAt.From:got.modelAt.To], &named); err != nil || named != few.Model {
			t.Fatalf("model's span in %q holds %q (%v)", body, named, err)
		}
		if few.Model != string(got.model) || few.Stream != got.stream {
			t.Fatalf("%q: encoding/json reads %+v, scan %q %v", body, few, got.model, got.stream)
		}
		if !full {
			return
		}
		n := 1
		rest := struct {
			N       *int   `json:"n"`
			User    string `json:"user"`
			Safety  string `json:"safety_identifier"`
			Key     string `json:"prompt_cache_key"`
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
		if n != got.choices || rest.Options.Usage != got.wantUsage || rest.User != string(got.user) ||
			rest.Safety != string(got.safetyID) || rest.Key != string(got.cacheKey) {
			t.Fatalf("%q: encoding/json reads %+v, scan %+v", body, rest, got)
		}
	})
}

var benchBody = []byte(`{"model":"deepseek-chat","messages":[{"role":"system","content":"You are a helpful assistant, brief and kind."},` +
	`{"role":"user","content":"` + strings.Repeat("tell me more ", 14) + `"}],"temperature":0.7,"stream":false}`)

func BenchmarkScan(b *testing.B) {
	for _, size := range []int{1, 1000} {
		body := benchBody
		if size > 1 {
			body = []byte(strings.Replace(string(benchBody), "tell", strings.Repeat("tell me 中文 ", size), 1))
		}
		b.Run("", func(b *testing.B) {
			b.SetBytes(int64(len(body)))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := scan(body, true); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
