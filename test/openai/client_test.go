// Package openai runs OpenAI's Go client against a gateway with the real pipeline
// and a simulated model server. It is a separate module, so that building dsnode does
// not need the client.
package openai

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/openai/openai-go/v3"
	"github.com/openai/openai-go/v3/option"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/node/gateway"
	"github.com/dsnode/dsnode/node/modelsim"
	"github.com/dsnode/dsnode/node/serving"
	"github.com/dsnode/dsnode/node/upstream"
)

// oneKey knows the key "secret", and "narrow" which may use one model only.
type oneKey struct{}

func (oneKey) Authenticate(token string, _ bool) (serving.Principal, error) {
	switch token {
	case "secret":
		return serving.Principal{KeyID: "k"}, nil
	case "narrow":
		return serving.Principal{KeyID: "n", Models: []string{"deepseek-reasoner"}}, nil
	}
	return serving.Principal{}, agreed.ErrKeyUnknown
}

type healthy struct{}

func (healthy) Health() gateway.Report { return gateway.Report{Role: "primary", Epoch: 1, Ready: true} }

// rig is a gateway on a port in front of one simulated server.
type rig struct {
	sim *modelsim.Server
	url string
}

func start(t *testing.T) *rig {
	t.Helper()
	serve := func(run func(context.Context, net.Listener) error) string {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		ctx, stop := context.WithCancel(context.Background())
		var done sync.WaitGroup
		done.Go(func() {
			if err := run(ctx, ln); err != nil && !errors.Is(err, http.ErrServerClosed) {
				t.Error(err)
			}
		})
		t.Cleanup(func() { stop(); done.Wait() })
		return "http://" + ln.Addr().String() + "/v1"
	}
	h := &rig{sim: modelsim.New(modelsim.Options{Tokens: 12})}
	models := []string{"deepseek-chat", "deepseek-reasoner", "text-embedding"}
	cfg := &config.Config{
		Version: 1, Sites: map[string]config.Site{"here": {City: "x", Priority: 1}}, Limits: config.DefaultLimits(), Timeouts: config.DefaultTimeouts(),
		Upstreams: map[string]config.Upstream{"sim": {Site: "here", Kind: config.KindDeepSeek, URL: serve(h.sim.Run)}},
		Models:    map[string]config.Model{},
	}
	for _, m := range models {
		cfg.Models[m] = config.Model{Serve: []config.Serve{{Upstream: "sim"}}}
	}
	fleet := upstream.New(upstream.Options{Site: "here"})
	if err := fleet.Configure(cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(fleet.Close)
	g := gateway.New(gateway.Options{
		Server: serving.New(serving.Options{Fleet: fleet}), Config: func() *config.Config { return cfg }, Auth: oneKey{}, Health: healthy{},
		Site: "here", Node: "here-1", Registerer: prometheus.NewRegistry(),
	})
	h.url = serve(func(ctx context.Context, ln net.Listener) error {
		srv := &http.Server{Handler: g, ReadHeaderTimeout: time.Second}
		defer context.AfterFunc(ctx, func() { _ = srv.Close() })()
		return srv.Serve(ln)
	})
	return h
}

func (h *rig) client(key string) openai.Client {
	return openai.NewClient(option.WithBaseURL(h.url), option.WithAPIKey(key))
}

func question(model, text string) openai.ChatCompletionNewParams {
	return openai.ChatCompletionNewParams{
		Model:    model,
		Messages: []openai.ChatCompletionMessageParamUnion{openai.UserMessage(text)},
	}
}

func TestChat(t *testing.T) {
	c := start(t).client("secret")
	var raw *http.Response
	answer, err := c.Chat.Completions.New(t.Context(), question("deepseek-chat", "hello"), option.WithResponseInto(&raw))
	if err != nil {
		t.Fatal(err)
	}
	first := answer.Choices[0]
	if !strings.HasPrefix(first.Message.Content, "sim-") || first.FinishReason != "stop" || answer.Usage.CompletionTokens != 12 || answer.Model != "deepseek-chat" {
		t.Errorf("%+v", answer)
	}
	if raw.Header.Get("X-Dsnode-Upstream") != "sim" || raw.Header.Get("X-Request-Id") == "" {
		t.Errorf("header %v", raw.Header)
	}
}

func TestStream(t *testing.T) {
	c := start(t).client("secret")
	plain, err := c.Chat.Completions.New(t.Context(), question("deepseek-chat", "hello"))
	if err != nil {
		t.Fatal(err)
	}
	for _, wantUsage := range []bool{false, true} {
		ask := question("deepseek-chat", "hello")
		if wantUsage {
			ask.StreamOptions = openai.ChatCompletionStreamOptionsParam{IncludeUsage: openai.Bool(true)}
		}
		stream := c.Chat.Completions.NewStreaming(t.Context(), ask)
		var all openai.ChatCompletionAccumulator
		chunks, withUsage := 0, 0
		for stream.Next() {
			chunks++
			if stream.Current().JSON.Usage.Valid() {
				withUsage++
			}
			if !all.AddChunk(stream.Current()) {
				t.Errorf("chunk does not fit: %s", stream.Current().RawJSON())
			}
		}
		if err := stream.Err(); err != nil {
			t.Fatal(err)
		}
		if got := all.Choices[0].Message.Content; got != plain.Choices[0].Message.Content || chunks < 12 || all.Choices[0].FinishReason != "stop" {
			t.Errorf("%d chunks: %q, plain %q", chunks, got, plain.Choices[0].Message.Content)
		}
		if (withUsage == 1) != wantUsage || wantUsage && all.Usage.CompletionTokens != 12 {
			t.Errorf("%d chunks with usage, asked for: %v; %+v", withUsage, wantUsage, all.Usage)
		}
	}
}

func TestReasoningAndTools(t *testing.T) {
	c := start(t).client("secret")
	answer, err := c.Chat.Completions.New(t.Context(), question("deepseek-reasoner", "why?"))
	if err != nil {
		t.Fatal(err)
	}
	if thought := answer.Choices[0].Message.JSON.ExtraFields["reasoning_content"].Raw(); len(thought) < 5 {
		t.Errorf("no reasoning_content in %s", answer.RawJSON())
	}
	ask := question("deepseek-chat", "what is the weather?")
	ask.Tools = []openai.ChatCompletionToolUnionParam{openai.ChatCompletionFunctionTool(openai.FunctionDefinitionParam{Name: "weather"})}
	ask.ToolChoice = openai.ChatCompletionToolChoiceOptionUnionParam{OfAuto: openai.String("required")}
	stream := c.Chat.Completions.NewStreaming(t.Context(), ask)
	var all openai.ChatCompletionAccumulator
	for stream.Next() {
		all.AddChunk(stream.Current())
	}
	if err := stream.Err(); err != nil {
		t.Fatal(err)
	}
	calls := all.Choices[0].Message.ToolCalls
	if len(calls) != 1 || calls[0].Function.Name != "weather" || !json.Valid([]byte(calls[0].Function.Arguments)) || all.Choices[0].FinishReason != "tool_calls" {
		t.Errorf("%+v", all.Choices[0])
	}
}

func TestEmbeddingsAndModels(t *testing.T) {
	h := start(t)
	c := h.client("secret")
	for _, format := range []openai.EmbeddingNewParamsEncodingFormat{"", "float"} {
		e, err := c.Embeddings.New(t.Context(), openai.EmbeddingNewParams{
			Model: "text-embedding", Dimensions: openai.Int(16), EncodingFormat: format,
			Input: openai.EmbeddingNewParamsInputUnion{OfArrayOfStrings: []string{"a", "b"}},
		})
		if err != nil {
			t.Fatal(err)
		}
		if len(e.Data) != 2 || len(e.Data[0].Embedding) != 16 {
			t.Errorf("format %q: %d vectors", format, len(e.Data))
		}
	}
	for key, want := range map[string]string{"secret": "deepseek-chat deepseek-reasoner text-embedding", "narrow": "deepseek-reasoner"} {
		c := h.client(key)
		list, err := c.Models.List(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var ids []string
		for _, m := range list.Data {
			ids = append(ids, m.ID)
		}
		if strings.Join(ids, " ") != want {
			t.Errorf("models for key %s: %v", key, ids)
		}
	}
	if m, err := c.Models.Get(t.Context(), "deepseek-chat"); err != nil || m.ID != "deepseek-chat" {
		t.Error(m, err)
	}
}

// The client reads status, code and message of an error, and does not retry a request
// that would fail again.
func TestErrors(t *testing.T) {
	h := start(t)
	for name, tc := range map[string]struct {
		key    string
		ask    openai.ChatCompletionNewParams
		fault  modelsim.Mode
		status int
		code   string
		asked  uint64 // requests that reach the server
	}{
		"key":        {"wrong", question("deepseek-chat", "x"), "", 401, "invalid_api_key", 0},
		"model":      {"secret", question("gpt-9", "x"), "", 404, "model_not_found", 0},
		"not for it": {"narrow", question("deepseek-chat", "x"), "", 404, "model_not_found", 0},
		"no model":   {"secret", question("", "x"), "", 400, "invalid_body", 0},
		"broken":     {"secret", question("deepseek-chat", "x"), modelsim.BadJSON, 502, "upstream_failed", 1},
	} {
		before := h.sim.Stats().Requests
		if tc.fault != "" {
			if err := h.sim.SetFault(modelsim.Fault{Mode: tc.fault}); err != nil {
				t.Fatal(err)
			}
		}
		c := h.client(tc.key)
		_, err := c.Chat.Completions.New(t.Context(), tc.ask)
		var e *openai.Error
		if !errors.As(err, &e) || e.StatusCode != tc.status || e.Code != tc.code || e.Message == "" || e.Type == "" {
			t.Errorf("%s: %v", name, err)
		}
		if n := h.sim.Stats().Requests - before; n != tc.asked {
			t.Errorf("%s: the server was asked %d times, want %d", name, n, tc.asked)
		}
		h.sim.ClearFault()
	}
}

// The client sees that a stream has failed.
func TestBrokenStream(t *testing.T) {
	h := start(t)
	if err := h.sim.SetFault(modelsim.Fault{Mode: modelsim.SilentEnd, After: 3}); err != nil {
		t.Fatal(err)
	}
	c := h.client("secret")
	stream := c.Chat.Completions.NewStreaming(t.Context(), question("deepseek-chat", "x"))
	text := ""
	for stream.Next() {
		for _, ch := range stream.Current().Choices {
			text += ch.Delta.Content
		}
	}
	if err := stream.Err(); err == nil || !strings.Contains(err.Error(), "ended its answer early") || text == "" {
		t.Errorf("error %v after %q", err, text)
	}
}

func TestCancellation(t *testing.T) {
	h := start(t)
	if err := h.sim.SetFault(modelsim.Fault{Mode: modelsim.Stall, After: 2}); err != nil {
		t.Fatal(err)
	}
	c := h.client("secret")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	stream := c.Chat.Completions.NewStreaming(ctx, question("deepseek-chat", "x"))
	if !stream.Next() {
		t.Fatal(stream.Err())
	}
	cancel()
	for stream.Next() { // events that had arrived
	}
	if err := stream.Err(); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	limit := time.After(10 * time.Second)
	for tick := time.NewTicker(time.Millisecond); h.sim.Stats().Cancelled != 1; {
		select {
		case <-tick.C:
		case <-limit:
			t.Fatal("the model server still works for a client that is gone")
		}
	}
}
