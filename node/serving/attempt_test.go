package serving

import (
	"errors"
	"net/http"
	"strings"
	"testing"

	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/node/upstream"
)

// named makes the upstream serve m under another name, with a key.
func named(model string) rigOption {
	return func(r *rig, o *upstream.Options) {
		m := r.conf.Models["m"]
		for i := range m.Serve {
			m.Serve[i].Model = model
		}
		o.LookupEnv = func(string) (string, bool) { return "sesame", true }
		for name, u := range r.conf.Upstreams {
			u.APIKey = config.Secret{Env: "KEY"}
			r.conf.Upstreams[name] = u
		}
	}
}

// TestModelNames: the upstream gets its own name for the model, the client sees only the
// public one; all else passes byte for byte.
func TestModelNames(t *testing.T) {
	private := func(s string) string { return strings.ReplaceAll(s, `"model":"m"`, `"model":"org/M-1"`) }
	up := newServer(t, "up", func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Accept") == "text/event-stream" {
			events(private(wellStream))(w, r)
			return
		}
		plain(200, private(plainBody))(w, r)
	})
	r := newRig(t, []*server{up}, named("org/M-1"))

	req := chat(false)
	req.Header.Set("User-Agent", "client/1")
	req.Header.Set("Accept-Encoding", "gzip")
	saw, err := r.serve(t, req)
	if err != nil || saw.text() != plainBody {
		t.Errorf("plain: %v, %q", err, saw.text())
	}
	if got, want := up.lastBody(t), private(string(req.Body)); got != want {
		t.Errorf("the upstream got %s, want %s", got, want)
	}
	h := up.lastHead()
	if h.Get("Authorization") != "Bearer sesame" || h.Get("X-Request-Id") != "req-1" || h.Get("User-Agent") != "client/1" ||
		h.Get("Content-Type") != "application/json" || h.Get("Accept-Encoding") != "" {
		t.Errorf("header %v", h)
	}
	if req.Header.Get("Authorization") != "" {
		t.Error("the client's header was changed")
	}
	if int(saw.heads[0].Length) != len(plainBody) {
		t.Errorf("length %d", saw.heads[0].Length)
	}

	saw, err = r.serve(t, chat(true))
	if err != nil || saw.text() != wellStream {
		t.Errorf("stream: %v, %q", err, saw.text())
	}
}

// TestUsage: a usage chunk is asked for without the client's knowledge and stripped, or
// passed on when the client asked for it, and counted in both cases.
func TestUsage(t *testing.T) {
	withUsage := roleChunk + delta("a") + delta("b") + finishChunk + usageChunk + doneChunk
	without := roleChunk + delta("a") + delta("b") + finishChunk + doneChunk
	up := newServer(t, "up", events(withUsage))
	r := newRig(t, []*server{up})

	saw, err := r.serve(t, chat(true))
	if err != nil || saw.text() != without {
		t.Errorf("not asked: %v, %q", err, saw.text())
	}
	if !strings.HasPrefix(up.lastBody(t), `{"stream_options":{"include_usage":true},`) {
		t.Errorf("the upstream got %s", up.lastBody(t))
	}
	body := `{"model":"m","stream":true,"stream_options":{"include_usage":true}}`
	saw, err = r.serve(t, request("/v1/chat/completions", body, true))
	if err != nil || saw.text() != withUsage {
		t.Errorf("asked: %v, %q", err, saw.text())
	}
	if up.lastBody(t) != body {
		t.Errorf("the upstream got %s", up.lastBody(t))
	}
	if in, out := r.metric("dsnode_tokens_total", "model", "m", "direction", "in"), r.metric("dsnode_tokens_total", "model", "m", "direction", "out"); in != 6 || out != 4 {
		t.Errorf("tokens %v, %v", in, out)
	}
	if r.metric("dsnode_time_to_first_token_seconds") != 2 || r.metric("dsnode_time_per_output_token_seconds") != 2 {
		t.Error("the streams aren't timed")
	}

	up.set(plain(200, plainBody))
	if _, err := r.serve(t, chat(false)); err != nil {
		t.Fatal(err)
	}
	if in := r.metric("dsnode_tokens_total", "model", "m", "direction", "in"); in != 9 {
		t.Errorf("tokens of a plain answer: %v", in)
	}
}

// TestOldServer: a server that doesn't know stream_options is asked again without them,
// and from then on.
func TestOldServer(t *testing.T) {
	up := newServer(t, "up", nil)
	up.set(func(w http.ResponseWriter, r *http.Request) {
		if strings.Contains(up.lastBody(t), "stream_options") {
			plain(422, `{"error":"stream_options: extra fields not permitted"}`)(w, r)
			return
		}
		well(w, r)
	})
	r := newRig(t, []*server{up})
	for _, hits := range []int64{2, 3} {
		if saw, err := r.serve(t, chat(true)); err != nil || saw.text() != wellStream || up.hits.Load() != hits {
			t.Errorf("%v after %d requests, want %d", err, up.hits.Load(), hits)
		}
	}
	_, err := r.serve(t, request("/v1/chat/completions", `{"model":"m","stream":true,"stream_options":{"include_usage":true}}`, true))
	var refusal *StatusError
	if !errors.As(err, &refusal) || refusal.Status != 422 {
		t.Errorf("the client's own: %v", err)
	}
}

// TestOtherEndpoints pass through, with failover before content.
func TestOtherEndpoints(t *testing.T) {
	messages := "event: message_start\ndata: {\"type\":\"message_start\"}\n\nevent: ping\ndata: {}\n\nevent: message_stop\ndata: {\"type\":\"message_stop\"}\n\n"
	octets := func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "audio/mpeg")
		w.Header().Set("X-Ratelimit-Limit-Requests", "9")
		w.Header().Set("Set-Cookie", "a=b")
		_, _ = w.Write([]byte{0, 1, 2, 255})
	}
	list := `[{"index":0,"score":0.5}]`
	for _, c := range []struct {
		name, endpoint string
		stream         bool
		bad, good      answering
		want           string
	}{
		{"stream", "/v1/messages", true, status(529), events(messages), messages},
		{"stream that begins with an error", "/v1/messages", true, events("event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"overloaded_error\"}}\n\n"), events(messages), messages},
		{"empty stream", "/v1/responses", true, events(""), events("data: {}\n\n"), "data: {}\n\n"},
		{"stream reset", "/v1/responses", true, reset, events("data: {}\n\n"), "data: {}\n\n"},
		{"embeddings", "/v1/embeddings", false, plain(200, `{"data":[`), plain(200, `{"data":[],"model":"m"}`), `{"data":[],"model":"m"}`},
		{"list", "/v1/rerank", false, plain(200, `[{"index":`), plain(200, list), list},
		{"no JSON", "/v1/audio/speech", false, status(500), octets, "\x00\x01\x02\xff"},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, b := newServer(t, "a", c.bad), newServer(t, "b", c.good)
			r := newRig(t, []*server{a, b})
			saw, err := r.serve(t, request(c.endpoint, `{"model":"m","input":"x"}`, c.stream))
			if err != nil || saw.text() != c.want || saw.heads[0].Upstream != "b" || saw.heads[0].Stream != c.stream {
				t.Errorf("%v, %q, %+v", err, saw.text(), saw.heads)
			}
			if a.lastBody(t) != `{"model":"m","input":"x"}` {
				t.Errorf("the upstream got %s", a.lastBody(t))
			}
			if c.name == "no JSON" {
				if h := saw.heads[0].Header; h.Get("Content-Type") != "audio/mpeg" || h.Get("X-Ratelimit-Limit-Requests") != "9" || h.Get("Set-Cookie") != "" {
					t.Errorf("header %v", h)
				}
			}
		})
	}
	cutUp := newServer(t, "a", then(events("event: message_start\ndata: {}\n\n"), abort))
	r := newRig(t, []*server{cutUp})
	if _, err := r.serve(t, request("/v1/messages", `{"model":"m"}`, true)); !errors.Is(err, ErrTruncated) {
		t.Errorf("cut after content: %v", err)
	}
}
