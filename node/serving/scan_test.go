package serving

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
		a, ok := scanAnswer([]byte(c.doc))
		if !ok {
			t.Errorf("%s: not taken", c.doc)
		}
		var found []string
		if a.content {
			found = append(found, "content")
		}
		if a.finished != 0 {
			found = append(found, "finish")
		}
		if a.exhausted {
			found = append(found, "exhausted")
		}
		if a.errAt != (Span{}) {
			found = append(found, "error")
		}
		if a.usage != (Span{}) {
			found = append(found, "usage")
		}
		if got := strings.Join(found, " "); got != c.want {
			t.Errorf("%s: %q, want %q", c.doc, got, c.want)
		}
	}
	a, _ := scanAnswer([]byte(`{"choices":[{"finish_reason":"stop","index":2,"delta":{}},{"index":1}]}`))
	if a.seen != 6 || a.finished != 4 || a.choices != 2 {
		t.Errorf("choices: %+v", a)
	}
}

func TestScanUsage(t *testing.T) {
	for doc, want := range map[string][2]int64{
		`{"prompt_tokens":12,"completion_tokens":34,"prompt_cache_hit_tokens":5}`: {12, 34},
		`{"input_tokens":1,"output_tokens":2}`:                                    {1, 2},
		`{"prompt_tokens":-1,"completion_tokens":"x"}`:                            {0, 0},
		`{"prompt_tokens":1e3,"completion_tokens":99999999999999999999999}`:       {0, 0},
		`7`: {0, 0},
	} {
		if in, out := scanUsage([]byte(doc)); in != want[0] || out != want[1] {
			t.Errorf("%s: %d, %d", doc, in, out)
		}
	}
}

func TestScanRefuses(t *testing.T) {
	for _, doc := range []string{
		``, ` `, `[]`, `1`, `"x"`, `{`, `{"a"`, `{"a":`, `{"a":1`, `{"a":1,}`, `{"a":01}`, `{"a":1.}`, `{"a":.5}`, `{"a":+1}`,
		`{"a":"\x"}`, `{"a":"` + "\n" + `"}`, `{"a":"\u12g4"}`, `{"a":tru}`, `{"a":1}{}`, `{"a":1}x`, `{a:1}`, `{"a":[1,]}`,
		strings.Repeat(`{"a":`, 1000) + `1` + strings.Repeat(`}`, 1000),
	} {
		if _, ok := scanAnswer([]byte(doc)); ok {
			t.Errorf("taken: %.40s", doc)
		}
	}
}

// FuzzScan: the scanner takes exactly the objects that encoding/json takes,
// and its spans are members' values.
func FuzzScan(f *testing.F) {
	for _, s := range []string{
		`{}`, plainBody, strings.TrimPrefix(strings.TrimSpace(delta("x\"\\")), "data: "), `{"a":[1,-2.5e+7,true,null,{"b":"\u00e9"}]}`,
		`{"id":1,"id":2,"error":{},"usage":{"prompt_tokens":1}}`, `{"choices":[{"index":-1},{"index":70,"finish_reason":"x"}]}`, "{\"a\":\"\xff\"}",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		a, ok := scanAnswer(b)
		valid := json.Valid(b)
		if ok && !valid {
			t.Fatalf("taken, but no JSON: %q", b)
		}
		if valid != validJSON(b) && strings.Count(string(b), "{")+strings.Count(string(b), "[") <= maxDepth {
			t.Fatalf("validJSON says %v: %q", !valid, b)
		}
		if !ok {
			return
		}
		var doc map[string]json.RawMessage
		if err := json.Unmarshal(b, &doc); err != nil {
			t.Fatalf("%q: %v", b, err)
		}
		for _, at := range []Span{a.id, a.created, a.model, a.usage, a.errAt} {
			if at != (Span{}) && !json.Valid(b[at.From:at.To]) {
				t.Fatalf("span %v of %q is no value", at, b)
			}
		}
	})
}
