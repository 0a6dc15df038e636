package modelsim

import (
	"bufio"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"math"
	"net"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// start runs a server on a free port and returns its base URL.
func start(t *testing.T, o Options) (*Server, string) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := New(o)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx, ln) }()
	t.Cleanup(func() {
		http.DefaultClient.CloseIdleConnections()
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return s, "http://" + ln.Addr().String()
}

func post(t *testing.T, url, body string) (int, string, error) {
	t.Helper()
	resp, err := http.Post(url, "application/json", strings.NewReader(body))
	if err != nil {
		return 0, "", err
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(b), err
}

type completion struct {
	ID      string `json:"id"`
	Choices []struct {
		Index   int `json:"index"`
		Message struct {
			Content   string `json:"content"`
			Reasoning string `json:"reasoning_content"`
			ToolCalls []struct {
				Function struct{ Name, Arguments string }
			} `json:"tool_calls"`
		} `json:"message"`
		Delta struct {
			Role      string `json:"role"`
			Content   string `json:"content"`
			Reasoning string `json:"reasoning_content"`
			ToolCalls []struct {
				Function struct{ Name, Arguments string }
			} `json:"tool_calls"`
		} `json:"delta"`
		Text   string  `json:"text"`
		Finish *string `json:"finish_reason"`
	} `json:"choices"`
	Usage *usage `json:"usage"`
}

// collected is the content of a stream.
type collected struct {
	text, reasoning, args, finish string
	usage                         *usage
	done                          bool
	ids                           map[string]bool
}

func collect(t *testing.T, r io.Reader) (c collected, err error) {
	t.Helper()
	c.ids = map[string]bool{}
	sc := bufio.NewScanner(r)
	for sc.Scan() {
		data, ok := strings.CutPrefix(sc.Text(), "data: ")
		if !ok {
			continue
		}
		if data == "[DONE]" {
			c.done = true
			continue
		}
		var ev completion
		if err := json.Unmarshal([]byte(data), &ev); err != nil {
			return c, err
		}
		c.ids[ev.ID] = true
		if ev.Usage != nil {
			c.usage = ev.Usage
		}
		for _, ch := range ev.Choices {
			c.text += ch.Delta.Content + ch.Text
			c.reasoning += ch.Delta.Reasoning
			for _, tc := range ch.Delta.ToolCalls {
				c.args += tc.Function.Name + tc.Function.Arguments
			}
			if ch.Finish != nil {
				c.finish = *ch.Finish
			}
		}
	}
	return c, sc.Err()
}

func TestPlainAndStreamAgree(t *testing.T) {
	_, base := start(t, Options{})
	_, other := start(t, Options{})
	for name, tc := range map[string]struct {
		path, body    string
		finish        string
		tokens        int
		thinks, calls bool
	}{
		"chat":       {path: "/v1/chat/completions", body: `{"model":"m","messages":[{"role":"user","content":"hi"}]`, finish: "stop", tokens: 32},
		"no v1":      {path: "/chat/completions", body: `{"model":"m","messages":[{"role":"user","content":"hi"}]`, finish: "stop", tokens: 32},
		"limited":    {path: "/v1/chat/completions", body: `{"model":"m","max_tokens":5,"messages":[]`, finish: "length", tokens: 5},
		"limited 2":  {path: "/v1/chat/completions", body: `{"model":"m","max_completion_tokens":3,"messages":[]`, finish: "length", tokens: 3},
		"set":        {path: "/v1/chat/completions", body: `{"model":"m@tokens=7","messages":[]`, finish: "stop", tokens: 7},
		"reasoner":   {path: "/v1/chat/completions", body: `{"model":"deepseek-reasoner","messages":[]`, finish: "stop", tokens: 32, thinks: true},
		"tools":      {path: "/v1/chat/completions", body: `{"model":"m","messages":[],"tool_choice":"required","tools":[{"type":"function","function":{"name":"look"}}]`, finish: "tool_calls", tokens: 3, calls: true},
		"completion": {path: "/v1/completions", body: `{"model":"m","prompt":"once"`, finish: "stop", tokens: 32},
	} {
		t.Run(name, func(t *testing.T) {
			status, body, err := post(t, base+tc.path, tc.body+"}")
			if status != 200 || err != nil {
				t.Fatal(status, body, err)
			}
			_, again, _ := post(t, other+tc.path, tc.body+"}")
			var plain, twin completion
			if err := errors.Join(json.Unmarshal([]byte(body), &plain), json.Unmarshal([]byte(again), &twin)); err != nil {
				t.Fatal(err)
			}
			_, events, _ := post(t, base+tc.path, tc.body+`,"stream":true,"stream_options":{"include_usage":true}}`)
			s, err := collect(t, strings.NewReader(events))
			if err != nil {
				t.Fatal(err)
			}
			first := plain.Choices[0]
			text := first.Message.Content + first.Text
			if text != s.text || text != twin.Choices[0].Message.Content+twin.Choices[0].Text {
				t.Errorf("texts differ: plain %q, stream %q", text, s.text)
			}
			if *first.Finish != tc.finish || s.finish != tc.finish {
				t.Errorf("finish_reason: plain %q, stream %q, want %q", *first.Finish, s.finish, tc.finish)
			}
			if plain.Usage.Completion != tc.tokens || s.usage == nil || *s.usage.details() != *plain.Usage.details() || s.usage.Completion != tc.tokens || plain.Usage.Total != plain.Usage.Prompt+tc.tokens {
				t.Errorf("usage: plain %+v, stream %+v, want %d tokens", plain.Usage, s.usage, tc.tokens)
			}
			if !s.done || len(s.ids) != 1 {
				t.Errorf("stream: done %v, ids %v", s.done, s.ids)
			}
			if thinks := first.Message.Reasoning != "" && first.Message.Reasoning == s.reasoning; thinks != tc.thinks {
				t.Errorf("reasoning: plain %q, stream %q", first.Message.Reasoning, s.reasoning)
			}
			if tc.calls {
				call := first.Message.ToolCalls[0].Function
				if call.Name != "look" || !json.Valid([]byte(call.Arguments)) || s.args != call.Name+call.Arguments {
					t.Errorf("tool call: plain %+v, stream %q", call, s.args)
				}
			} else if !strings.Contains(text, "sim-") {
				t.Errorf("no hash of the prompt in %q", text)
			}
		})
	}
}

// details is never nil.
func (u *usage) details() *completionInfo {
	if u.Details == nil {
		return &completionInfo{}
	}
	return u.Details
}

func TestChoicesDiffer(t *testing.T) {
	_, base := start(t, Options{})
	_, body, err := post(t, base+"/v1/chat/completions", `{"model":"m","n":3,"messages":[]}`)
	var c completion
	if err := errors.Join(err, json.Unmarshal([]byte(body), &c)); err != nil {
		t.Fatal(err)
	}
	if len(c.Choices) != 3 || c.Choices[0].Message.Content == c.Choices[2].Message.Content || c.Usage.Completion != 96 {
		t.Fatal(body)
	}
}

func TestEmbeddings(t *testing.T) {
	_, base := start(t, Options{})
	var floats struct {
		Data []struct{ Embedding []float32 }
	}
	_, body, err := post(t, base+"/v1/embeddings", `{"model":"m","input":["a","b","a"],"dimensions":8}`)
	if err := errors.Join(err, json.Unmarshal([]byte(body), &floats)); err != nil {
		t.Fatal(err, body)
	}
	norm := 0.0
	for i, x := range floats.Data[0].Embedding {
		norm += float64(x) * float64(x)
		if x != floats.Data[2].Embedding[i] {
			t.Error("same input, different vectors")
		}
	}
	if len(floats.Data) != 3 || math.Abs(norm-1) > 1e-5 || floats.Data[0].Embedding[0] == floats.Data[1].Embedding[0] {
		t.Error(body)
	}
	var packed struct {
		Data []struct{ Embedding string }
	}
	_, body, err = post(t, base+"/v1/embeddings", `{"model":"m","input":"a","dimensions":8,"encoding_format":"base64"}`)
	if err := errors.Join(err, json.Unmarshal([]byte(body), &packed)); err != nil {
		t.Fatal(err, body)
	}
	raw, err := base64.StdEncoding.DecodeString(packed.Data[0].Embedding)
	if err != nil || len(raw) != 32 {
		t.Fatal(err, body)
	}
	bits := uint32(raw[0]) | uint32(raw[1])<<8 | uint32(raw[2])<<16 | uint32(raw[3])<<24
	if math.Float32frombits(bits) != floats.Data[0].Embedding[0] {
		t.Error("base64 and float differ")
	}
}

func TestRefusals(t *testing.T) {
	_, base := start(t, Options{Models: []string{"m"}})
	for body, want := range map[string]int{
		`{"model":"m","messages":[]}`:                 200,
		`{"model":"m@tokens=2,rate=0","messages":[]}`: 200,
		`{"model":"x","messages":[]}`:                 404,
		`{"model":"m"}`:                               400,
		`{"model":"m","messages":[],"n":1000}`:        400,
		`{"model":"m","messages":[],"max_tokens":0}`:  400,
		`{"model":"m@speed=9","messages":[]}`:         400,
		`{"model":`:                                   400,
	} {
		status, answer, err := post(t, base+"/v1/chat/completions", body)
		if status != want || err != nil || (want != 200 && !strings.Contains(answer, `"error"`)) {
			t.Errorf("%s: %d %s %v, want %d", body, status, answer, err, want)
		}
	}
}

// fault arms f over HTTP, and clears it when the test ends.
func fault(t *testing.T, base, f string) {
	t.Helper()
	if status, body, err := post(t, base+"/sim/faults", f); status != 200 || err != nil {
		t.Fatal(status, body, err)
	}
}

func TestFaults(t *testing.T) {
	s, base := start(t, Options{})
	const plain, stream = `{"model":"m","messages":[]}`, `{"model":"m","messages":[],"stream":true}`
	cut := func(err error) bool { return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, io.ErrUnexpectedEOF) }
	type seen struct {
		status int
		body   string
		err    error
		events collected
		bad    error
	}
	text := func(n int) func(seen) bool {
		return func(x seen) bool {
			return x.status == 200 && strings.Count(x.body, `"content":`)-1 == n && x.events.finish == "" && !x.events.done
		}
	}
	for _, tc := range []struct {
		fault, body string
		ok          func(seen) bool
	}{
		{`{"mode":"refuse"}`, plain, func(x seen) bool { return x.status == 0 && x.err != nil }},
		{`{"mode":"refuse"}`, stream, func(x seen) bool { return x.status == 0 && x.err != nil }},
		{`{"mode":"http_500"}`, plain, func(x seen) bool { return x.status == 500 }},
		{`{"mode":"http_503"}`, stream, func(x seen) bool { return x.status == 503 }},
		{`{"mode":"http_429","retry_after":7}`, plain, func(x seen) bool { return x.status == 429 }},
		{`{"mode":"http_401"}`, plain, func(x seen) bool { return x.status == 401 }},
		{`{"mode":"reset_before"}`, plain, func(x seen) bool { return x.status == 0 && x.err != nil }},
		{`{"mode":"reset_before"}`, stream, func(x seen) bool { return x.status == 0 && x.err != nil }},
		{`{"mode":"reset_after","after":3}`, stream, func(x seen) bool { return text(3)(x) && cut(x.err) }},
		{`{"mode":"reset_after"}`, plain, func(x seen) bool { return x.status == 200 && x.body != "" && cut(x.err) }},
		{`{"mode":"truncated_body","after":2}`, stream, func(x seen) bool { return x.status == 200 && cut(x.err) && !x.events.done }},
		{`{"mode":"truncated_body"}`, plain, func(x seen) bool { return x.status == 200 && cut(x.err) }},
		{`{"mode":"bad_json","after":1}`, stream, func(x seen) bool { return x.status == 200 && x.bad != nil }},
		{`{"mode":"bad_json"}`, plain, func(x seen) bool { return x.status == 200 && x.err == nil && !json.Valid([]byte(x.body)) }},
		{`{"mode":"silent_end","after":2}`, stream, func(x seen) bool { return text(2)(x) && x.err == nil }},
		{`{"mode":"silent_end"}`, plain, func(x seen) bool { return x.status == 200 && x.body == "" && x.err == nil }},
		{`{"mode":"missing_done"}`, stream, func(x seen) bool { return x.events.finish == "stop" && !x.events.done && x.err == nil }},
		{`{"mode":"missing_done"}`, plain, func(x seen) bool { return x.status == 200 && json.Valid([]byte(x.body)) }},
		{`{"mode":"error_event","after":2}`, stream, func(x seen) bool { return text(2)(x) && strings.Contains(x.body, `data: {"error"`) }},
		{`{"mode":"error_event"}`, plain, func(x seen) bool { return x.status == 200 && strings.HasPrefix(x.body, `{"error"`) }},
		{`{"mode":"role_only_then_end"}`, stream, func(x seen) bool { return x.events.text == "" && x.events.finish == "" && x.events.done }},
		{`{"mode":"role_only_then_end"}`, plain, func(x seen) bool { return strings.Contains(x.body, `"finish_reason":null`) }},
		{`{"mode":"insufficient_system_resource","after":1}`, stream, func(x seen) bool { return x.events.finish == "insufficient_system_resource" && x.events.done }},
		{`{"mode":"insufficient_system_resource"}`, plain, func(x seen) bool { return strings.Contains(x.body, `"finish_reason":"insufficient_system_resource"`) }},
		{`{"mode":"slow_drip","interval_ms":1}`, stream, func(x seen) bool { return x.events.finish == "stop" && x.events.done }},
		{`{"mode":"slow_drip","interval_ms":1}`, plain, func(x seen) bool { return json.Valid([]byte(x.body)) }},
	} {
		kind := "plain"
		if tc.body == stream {
			kind = "stream"
		}
		t.Run(tc.fault+" "+kind, func(t *testing.T) {
			fault(t, base, tc.fault)
			defer s.ClearFault()
			http.DefaultClient.CloseIdleConnections()
			var x seen
			x.status, x.body, x.err = post(t, base+"/v1/chat/completions", tc.body)
			x.events, x.bad = collect(t, strings.NewReader(x.body))
			if !tc.ok(x) {
				t.Errorf("status %d, error %v, body:\n%s", x.status, x.err, x.body)
			}
		})
	}
	if s.Stats().Refused == 0 {
		t.Error("no connection was refused before its request")
	}
}

func TestStallEndsWithTheClientAndIsRecorded(t *testing.T) {
	s, base := start(t, Options{Keep: 2})
	for _, f := range []string{`{"mode":"stall","after":2}`, `{"mode":"stall_comments","after":2,"interval_ms":1}`} {
		for _, body := range []string{`{"model":"m","messages":[]}`, `{"model":"m","messages":[],"stream":true}`} {
			fault(t, base, f)
			ctx, cancel := context.WithCancel(t.Context())
			req, _ := http.NewRequestWithContext(ctx, http.MethodPost, base+"/v1/chat/completions", strings.NewReader(body))
			before := s.Stats()
			gone := make(chan struct{})
			go func() {
				defer close(gone)
				if resp, err := http.DefaultClient.Do(req); err == nil {
					_, _ = io.Copy(io.Discard, resp.Body)
					_ = resp.Body.Close()
				}
			}()
			await(t, func() bool { return s.Stats().InFlight == 1 })
			cancel()
			<-gone
			await(t, func() bool { return s.Stats().Cancelled == before.Cancelled+1 })
			rs := s.Requests()
			if last := rs[len(rs)-1]; !last.Cancelled || last.Finished || last.CancelledAt == nil || last.Body != body || last.Endpoint != "/v1/chat/completions" {
				t.Errorf("%s: %+v", f, last)
			}
		}
	}
	s.ClearFault()
	if rs := s.Requests(); len(rs) != 2 || rs[0].ID != 3 || rs[1].ID != 4 {
		t.Errorf("the recorded requests are %+v", rs)
	}
}

// await polls until a condition holds.
func await(t *testing.T, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	limit := time.After(10 * time.Second)
	for !ok() {
		select {
		case <-tick.C:
		case <-limit:
			t.Fatal("did not happen in 10 s")
		}
	}
}

func TestFaultCountsDown(t *testing.T) {
	_, base := start(t, Options{})
	fault(t, base, `{"mode":"http_500","count":2,"probes":true}`)
	resp, err := http.Get(base + "/health")
	if err != nil || resp.StatusCode != 500 {
		t.Fatal(resp, err)
	}
	_ = resp.Body.Close()
	for _, want := range []int{500, 500, 200} {
		if status, _, err := post(t, base+"/v1/chat/completions", `{"model":"m","messages":[]}`); status != want || err != nil {
			t.Errorf("status %d, %v; want %d", status, err, want)
		}
	}
	for _, bad := range []string{`{"mode":"explode"}`, `{"mode":"stall","after":-1}`, `{"mod":"stall"}`, `{"mode":"stall","probability":2}`} {
		if status, _, _ := post(t, base+"/sim/faults", bad); status != 400 {
			t.Errorf("%s: %d", bad, status)
		}
	}
}

func TestPace(t *testing.T) {
	_, base := start(t, Options{})
	begin := time.Now()
	if _, body, err := post(t, base+"/v1/chat/completions", `{"model":"m@first=20ms,rate=500,tokens=11","messages":[],"stream":true}`); err != nil || !strings.Contains(body, "[DONE]") {
		t.Fatal(body, err)
	}
	if took := time.Since(begin); took < 40*time.Millisecond { // 20 ms + 10 gaps of 2 ms
		t.Errorf("took %s", took)
	}
}
