package openai

import (
	"encoding/json"
	"strings"
	"testing"
)

func TestScanAnswer(t *testing.T) {
	for _, c := range []struct {
		doc  string
		want string // what is found
	}{
		{`{}`, ""},
		{`{"choices":[{"index":0,"delta":{"role":"assistant"}}]}`, ""},
		{`{"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}`, ""},
		{`{"choices":[{"index":0,"delta":{"content":null,"tool_calls":[],"refusal":null}}]}`, ""},
		{`{"choices":[{"index":0,"delta":{"content":"x"}}]}`, "content"},
		{`{"choices":[{"index":0,"delta":{"reasoning_content":"x"}}]}`, "content"},
		{`{"choices":[{"index":0,"delta":{"reasoning":"x"}}]}`, "content"},
		{`{"choices":[{"index":0,"delta":{"refusal":"x"}}]}`, "content"},
		{`{"choices":[{"index":0,"delta":{"tool_calls":[{"index":0}]}}]}`, "content"},
		{`{"choices":[{"index":0,"delta":{"function_call":{"name":"f"}}}]}`, "content"},
		{`{"choices":[{"text":"x","finish_reason":null}]}`, "content"},
		{`{"choices":[{"text":"","finish_reason":"stop"}]}`, "finish"},
		{`{"choices":[{"delta":{"x":{"content":"inner"}}}]}`, ""},
		{`{"choices":[{"delta":{"content":"x"},"finish_reason":"insufficient_system_resource"}]}`, "content finish exhausted"},
		{`{"note":{"error":1,"choices":[{"finish_reason":"stop"}]}}`, ""},
		{`{"error":null}`, ""},
		{`{"error":{"message":"x"}}`, "error"},
		{`{"error":"x"}`, "error"},
		{`{"choices":[],"usage":{"prompt_tokens":1}}`, "usage"},
		{`{"usage":null}`, ""},
		{`{"choices":null}`, ""},
		{`{"content":"\"finish_reason\":\"stop\""}`, ""},
	} {
		a, ok := ScanAnswer([]byte(c.doc))
		if !ok {
			t.Errorf("%s: not taken", c.doc)
		}
		var found []string
		if a.Content {
			found = append(found, "content")
		}
		if a.Finished() {
			found = append(found, "finish")
		}
		if a.Exhausted {
			found = append(found, "exhausted")
		}
		if a.Error != (Span{}) {
			found = append(found, "error")
		}
		if a.Usage != (Span{}) {
			found = append(found, "usage")
		}
		if got := strings.Join(found, " "); got != c.want {
			t.Errorf("%s: %q, want %q", c.doc, got, c.want)
		}
	}
}

// TestComplete: an answer is complete when all choices that came are.
func TestComplete(t *testing.T) {
	var all Answer
	for i, event := range []string{
		`{"choices":[{"index":0},{"index":2,"finish_reason":"stop"}]}`,
		`{"choices":[{"index":1,"finish_reason":null}]}`,
		`{"choices":[{"index":0,"finish_reason":"stop"},{"index":1,"finish_reason":"length"}]}`,
	} {
		if all.Complete() {
			t.Errorf("complete after %d events", i)
		}
		a, ok := ScanAnswer([]byte(event))
		if !ok {
			t.Fatal(event)
		}
		all.Join(&a)
	}
	if !all.Complete() {
		t.Error("not complete after all")
	}
}

func TestUsage(t *testing.T) {
	for doc, want := range map[string][2]int64{
		`{"prompt_tokens":12,"completion_tokens":34,"prompt_cache_hit_tokens":5}`: {12, 34},
		`{"input_tokens":1,"output_tokens":2}`:                                    {1, 2},
		`{"prompt_tokens":-1,"completion_tokens":"x"}`:                            {0, 0},
		`{"prompt_tokens":1e3,"completion_tokens":99999999999999999999999}`:       {0, 0},
		`7`: {0, 0},
	} {
		if in, out := Usage([]byte(doc)); in != want[0] || out != want[1] {
			t.Errorf("%s: %d, %d", doc, in, out)
		}
	}
}

func TestScanAnswerRefuses(t *testing.T) {
	for _, doc := range []string{
		``, ` `, `[]`, `1`, `"x"`, `{`, `{"a"`, `{"a":`, `{"a":1`, `{"a":1,}`, `{"a":01}`, `{"a":1.}`, `{"a":.5}`, `{"a":+1}`,
		`{"a":"\x"}`, `{"a":"` + "\n" + `"}`, `{"a":"\u12g4"}`, `{"a":tru}`, `{"a":1}{}`, `{"a":1}x`, `{a:1}`, `{"a":[1,]}`,
		strings.Repeat(`{"a":`, 1000) + `1` + strings.Repeat(`}`, 1000),
	} {
		if _, ok := ScanAnswer([]byte(doc)); ok {
			t.Errorf("taken: %.40s", doc)
		}
	}
}

const whole = `{"id":"c-1","object":"chat.completion","created":7,"model":"m","choices":[{"index":0,"message":{"role":"assistant","content":"hello"},"finish_reason":"stop"}],"usage":{"prompt_tokens":3,"completion_tokens":5}}`

const chunk = `data: {"id":"c-1","created":7,"model":"m","choices":[{"index":0,"delta":{"content":"word "},"finish_reason":null}]}` + "\n\n"

func BenchmarkScanChunk(b *testing.B) {
	data := []byte(strings.TrimPrefix(strings.TrimSpace(chunk), "data: "))
	b.ReportAllocs()
	b.SetBytes(int64(len(data)))
	for b.Loop() {
		if a, ok := ScanAnswer(data); !ok || !a.Content {
			b.Fatal("not content")
		}
	}
}

// FuzzScanAnswer: the scanner takes exactly the objects that encoding/json takes,
// and its spans are members' values.
func FuzzScanAnswer(f *testing.F) {
	for _, s := range []string{
		`{}`, whole, `{"choices":[{"delta":{"content":"x\"\\"}}]}`, `{"a":[1,-2.5e+7,true,null,{"b":"\u00e9"}]}`,
		`{"id":1,"id":2,"error":{},"usage":{"prompt_tokens":1}}`, `{"choices":[{"index":-1},{"index":70,"finish_reason":"x"}]}`, "{\"a\":\"\xff\"}",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		a, ok := ScanAnswer(b)
		valid := json.Valid(b)
		if ok && !valid {
			t.Fatalf("taken, but no JSON: %q", b)
		}
		if valid != Valid(b) && strings.Count(string(b), "{")+strings.Count(string(b), "[") <= maxAnswerDepth {
			t.Fatalf("Valid says %v: %q", !valid, b)
		}
		if !ok {
			return
		}
		var doc map[string]json.RawMessage
		if err := json.Unmarshal(b, &doc); err != nil {
			t.Fatalf("%q: %v", b, err)
		}
		for _, at := range []Span{a.ID, a.Created, a.Model, a.Usage, a.Error} {
			if at != (Span{}) && !json.Valid(b[at.From:at.To]) {
				t.Fatalf("span %v of %q is no value", at, b)
			}
		}
	})
}
