package serving

import (
	"errors"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/dsnode/dsnode/node/upstream"
)

// refusing is a server that refuses connections.
func refusing(t *testing.T, name string) *server {
	t.Helper()
	s := newServer(t, name, well)
	s.Close()
	return s
}

func status(code int, header ...string) answering {
	return func(w http.ResponseWriter, r *http.Request) {
		for i := 0; i+1 < len(header); i += 2 {
			w.Header().Set(header[i], header[i+1])
		}
		plain(code, `{"error":{"message":"no"}}`)(w, r)
	}
}

func slowly(text string, each time.Duration) answering {
	return func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		tick := time.NewTicker(each)
		defer tick.Stop()
		for _, e := range strings.SplitAfter(text, "\n\n") {
			select {
			case <-tick.C:
			case <-r.Context().Done():
				return
			}
			_, _ = w.Write([]byte(e))
			flush(w)
		}
	}
}

func jsonHead(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusOK)
	flush(w)
}

// TestFaultsBeforeContent: whatever an upstream does before it has shown content, the
// other one answers, and the client notices nothing.
func TestFaultsBeforeContent(t *testing.T) {
	cut := func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Content-Length", "4000")
		_, _ = w.Write([]byte(plainBody))
		flush(w)
		panic(http.ErrAbortHandler)
	}
	for _, c := range []struct {
		name   string
		stream bool
		answer answering // nil: refused
		result string
	}{
		{"refused", false, nil, "refused"},
		{"500", false, status(500), "server_error"},
		{"503", false, status(503), "server_error"},
		{"408", false, status(408), "server_error"},
		{"redirect", false, status(307, "Location", "http://elsewhere/"), "server_error"},
		{"429", false, status(429, "Retry-After", "7"), "rate_limited"},
		{"401", false, status(401), "credentials"},
		{"402", false, status(402), "credentials"},
		{"403", false, status(403), "credentials"},
		{"404", false, status(404), "not_served"},
		{"501", false, status(501), "not_served"},
		{"reset before a byte", false, reset, "reset"},
		{"cut body", false, cut, "truncated"},
		{"stall before the head", false, stall, "timeout_first_token"},
		{"stall after the head", false, then(jsonHead, stall), "timeout_first_token"},
		{"stall with blank lines", false, then(jsonHead, chatter("\n")), "timeout_first_token"},
		{"stall within the body", false, then(jsonHead, func(w http.ResponseWriter, r *http.Request) {
			_, _ = w.Write([]byte(plainBody[:40]))
			flush(w)
			stall(w, r)
		}), "timeout_between_tokens"},
		{"bad JSON", false, plain(200, `{"id":`), "bad_answer"},
		{"HTML", false, plain(200, `<html>busy</html>`), "bad_answer"},
		{"empty body", false, plain(200, ``), "bad_answer"},
		{"no choices", false, plain(200, `{"choices":[]}`), "bad_answer"},
		{"error under a 200", false, plain(200, `{"error":{"message":"out of memory","code":500}}`), "error_event"},
		{"exhausted", false, plain(200, `{"choices":[{"index":0,"message":{"content":"x"},"finish_reason":"insufficient_system_resource"}]}`), "exhausted"},

		{"refused", true, nil, "refused"},
		{"500", true, status(500), "server_error"},
		{"429", true, status(429, "Retry-After", "7"), "rate_limited"},
		{"401", true, status(401), "credentials"},
		{"404", true, status(404), "not_served"},
		{"reset before a byte", true, reset, "reset"},
		{"reset after the role", true, then(events(roleChunk), abort), "reset"},
		{"stall before the head", true, stall, "timeout_first_token"},
		{"stall after the role", true, then(events(roleChunk), stall), "timeout_first_token"},
		{"stall with comments", true, then(events(roleChunk), chatter(": keep-alive\n\n")), "timeout_first_token"},
		{"stall with blank lines", true, then(events(roleChunk), chatter("\n")), "timeout_first_token"},
		{"stall with empty deltas", true, then(events(roleChunk), chatter(roleChunk)), "timeout_first_token"},
		{"bad JSON", true, events("data: {\"id\":\n\n"), "bad_answer"},
		{"half an event at the end", true, events(roleChunk + `data: {"choices":[{"delta":{"cont`), "bad_answer"},
		{"silent end", true, events(roleChunk), "truncated"},
		{"empty", true, events(""), "truncated"},
		{"only [DONE]", true, events(doneChunk), "truncated"},
		{"error event", true, events(`data: {"error":{"message":"boom","code":500}}` + "\n\n"), "error_event"},
		{"error event by name", true, events("event: error\ndata: {\"message\":\"boom\"}\n\n"), "error_event"},
		{"error after the role", true, events(roleChunk + `data: {"error":"boom"}` + "\n\n" + doneChunk), "error_event"},
		{"429 in the stream", true, events(`data: {"error":{"code":429}}` + "\n\n"), "rate_limited"},
		{"exhausted", true, events(roleChunk + strings.Replace(finishChunk, "stop", "insufficient_system_resource", 1)), "exhausted"},
		{"plain answer", true, plain(200, plainBody), "bad_answer"},
		{"event of 2 MiB", true, events("data: {\"x\":\"" + strings.Repeat("x", 2<<20) + "\"}\n\n"), "bad_answer"},
		{"endless empty deltas", true, events(strings.Repeat(roleChunk, 4000)), "bad_answer"},
	} {
		name := "plain/" + c.name
		if c.stream {
			name = "stream/" + c.name
		}
		t.Run(name, func(t *testing.T) {
			bad := refusing(t, "bad")
			hits := int64(0)
			if c.answer != nil {
				bad, hits = newServer(t, "bad", c.answer), 1
			}
			good := newServer(t, "good", well)
			var options []rigOption
			if strings.HasPrefix(c.result, "timeout") {
				options = append(options, hasty)
			}
			r := newRig(t, []*server{bad, good}, options...)
			if !c.stream && c.result == "timeout_first_token" {
				// A plain answer may take long: only a server whose probes fail too is
				// given up.
				bad.onHit = func() {
					bad.sick.Store(true)
					for range 2 {
						r.fleet.Probe(t.Context())
					}
				}
			}
			saw, err := r.serve(t, chat(c.stream))
			if err != nil {
				t.Fatalf("Serve: %v\n%s", err, r.logs)
			}
			want := plainBody
			if c.stream {
				want = wellStream
			}
			if saw.text() != want {
				t.Errorf("the sink saw %q", saw.text())
			}
			if h := saw.heads[0]; h.Upstream != "good" || h.Attempts != 2 || h.Status != 200 || h.Stream != c.stream || h.Site != "east" {
				t.Errorf("head %+v", h)
			}
			if bad.hits.Load() != hits || good.hits.Load() != 1 {
				t.Errorf("hits: bad %d, good %d", bad.hits.Load(), good.hits.Load())
			}
			if r.results("bad", c.result) != 1 || r.results("good", "ok") != 1 {
				t.Errorf("bad is not counted as %s:\n%s", c.result, r.logs)
			}
			eventually(t, "the failed upstream stops working", func() bool { return bad.active.Load() == 0 })
		})
	}
}

// TestFaultsAfterContent: once content was shown no other upstream answers, and the
// answer ends with an explicit error, never with [DONE].
func TestFaultsAfterContent(t *testing.T) {
	begun := roleChunk + delta("Hel")
	for _, c := range []struct {
		name   string
		answer answering
		want   error
		result string
	}{
		{"reset", then(events(begun), abort), ErrTruncated, "truncated"},
		{"stall", then(events(begun), stall), ErrTimeout, "timeout_between_tokens"},
		{"stall with comments", then(events(begun), chatter(": keep-alive\n\n")), ErrTimeout, "timeout_between_tokens"},
		{"stall with blank lines", then(events(begun), chatter("\n")), ErrTimeout, "timeout_between_tokens"},
		{"stall with empty deltas", then(events(begun), chatter(roleChunk)), ErrTimeout, "timeout_between_tokens"},
		{"silent end", events(begun), ErrTruncated, "truncated"},
		{"false [DONE]", events(begun + doneChunk), ErrTruncated, "truncated"},
		{"one of two choices finished", events(begun + strings.Replace(delta("x"), `"index":0`, `"index":1`, 1) + finishChunk + doneChunk), ErrTruncated, "truncated"},
		{"bad JSON", events(begun + "data: {nonsense\n\n"), ErrUpstreamFailed, "bad_answer"},
		{"error event", events(begun + `data: {"error":{"message":"boom"}}` + "\n\n" + doneChunk), ErrUpstreamFailed, "error_event"},
		{"exhausted", events(begun + strings.Replace(finishChunk, "stop", "insufficient_system_resource", 1) + doneChunk), ErrUpstreamFailed, "exhausted"},
		{"event of 2 MiB", events(begun + "data: {\"x\":\"" + strings.Repeat("x", 2<<20) + "\"}\n\n"), ErrUpstreamFailed, "bad_answer"},
	} {
		t.Run(c.name, func(t *testing.T) {
			bad, good := newServer(t, "bad", c.answer), newServer(t, "good", well)
			var options []rigOption
			if strings.HasPrefix(c.result, "timeout") {
				options = append(options, hasty)
			}
			r := newRig(t, []*server{bad, good}, options...)
			saw, err := r.serve(t, chat(true))
			if !errors.Is(err, c.want) {
				t.Fatalf("error %v, want %v", err, c.want)
			}
			if !strings.HasPrefix(saw.text(), begun) || strings.Contains(saw.text(), "[DONE]") {
				t.Errorf("the sink saw %q", saw.text())
			}
			if bad.hits.Load() != 1 || good.hits.Load() != 0 {
				t.Errorf("hits: bad %d, good %d", bad.hits.Load(), good.hits.Load())
			}
			if r.results("bad", c.result) != 1 {
				t.Errorf("bad is not counted as %s:\n%s", c.result, r.logs)
			}
			eventually(t, "the failed upstream stops working", func() bool { return bad.active.Load() == 0 })
		})
	}
}

// TestAnswersThatAreNoFaults: unusual answers that the client gets.
func TestAnswersThatAreNoFaults(t *testing.T) {
	noContent := strings.Replace(finishChunk, "stop", "length", 1)
	reasoning := strings.Replace(delta("x"), `"content"`, `"reasoning_content"`, 1)
	for _, c := range []struct {
		name   string
		stream bool
		answer answering
		want   string
	}{
		{"no [DONE]", true, events(roleChunk + delta("a") + finishChunk), roleChunk + delta("a") + finishChunk + doneChunk},
		{"no blank line after [DONE]", true, events(roleChunk + delta("a") + finishChunk + "data: [DONE]"), roleChunk + delta("a") + finishChunk + doneChunk},
		{"\\r\\n", true, events(strings.ReplaceAll(wellStream, "\n", "\r\n")), strings.ReplaceAll(wellStream, "\n", "\r\n")},
		{"comments are dropped", true, events(": hello\n\n" + wellStream), wellStream},
		{"finished without content", true, events(roleChunk + noContent + doneChunk), roleChunk + noContent + doneChunk},
		{"reasoning only", true, events(reasoning + finishChunk + doneChunk), reasoning + finishChunk + doneChunk},
		{"unwanted usage is stripped", true, events(roleChunk + delta("a") + finishChunk + usageChunk + doneChunk), roleChunk + delta("a") + finishChunk + doneChunk},
		{"ids that change", true, events(delta("a") + strings.Replace(strings.Replace(delta("b"), "c-1", "c-2", 1), `"created":7`, `"created":88`, 1) + finishChunk + doneChunk), delta("a") + delta("b") + finishChunk + doneChunk},
		{"slow drip within the timers", true, slowly(wellStream, 250*time.Millisecond), wellStream},
		{"keep-alive in a plain body", false, plain(200, "\n\n  \n"+plainBody+"\n"), plainBody + "\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			up, other := newServer(t, "up", c.answer), newServer(t, "other", well)
			r := newRig(t, []*server{up, other}, func(r *rig, _ *upstream.Options) {
				if strings.HasPrefix(c.name, "slow drip") { // all of it takes longer than each timer
					r.conf.Timeouts.FirstToken, r.conf.Timeouts.BetweenTokens = seconds(1), seconds(1)
				}
			})
			saw, err := r.serve(t, chat(c.stream))
			if err != nil {
				t.Fatalf("Serve: %v\n%s", err, r.logs)
			}
			got := saw.text()
			if c.name == "keep-alive in a plain body" {
				got = strings.TrimLeft(got, " \n")
			}
			if got != c.want {
				t.Errorf("the sink saw\n%q, want\n%q", got, c.want)
			}
			if other.hits.Load() != 0 {
				t.Error("the other upstream was asked")
			}
		})
	}
}

// TestClientErrors: a refusal of the request itself goes to the client with its status
// and body, and no other upstream is asked.
func TestClientErrors(t *testing.T) {
	for _, code := range []int{400, 409, 413, 422, 451} {
		up, other := newServer(t, "up", plain(code, `{"error":{"message":"bad n"}}`)), newServer(t, "other", well)
		r := newRig(t, []*server{up, other})
		_, err := r.serve(t, chat(code == 400))
		var refusal *StatusError
		if !errors.As(err, &refusal) || refusal.Status != code || string(refusal.Body) != `{"error":{"message":"bad n"}}` || refusal.Upstream != "up" || refusal.Attempts != 1 {
			t.Errorf("%d: error %#v", code, err)
		}
		if other.hits.Load() != 0 {
			t.Errorf("%d: another upstream was asked", code)
		}
	}
	up, other := newServer(t, "up", events(`data: {"error":{"message":"n too big","type":"BadRequestError","code":400}}`+"\n\n")), newServer(t, "other", well)
	r := newRig(t, []*server{up, other})
	_, err := r.serve(t, chat(true))
	var refusal *StatusError
	if !errors.As(err, &refusal) || refusal.Status != 400 || !strings.Contains(string(refusal.Body), "n too big") || other.hits.Load() != 0 {
		t.Errorf("400 in a stream: %v", err)
	}
}

// TestNotServedAnywhere: when all lack the model, their refusal is the answer.
func TestNotServedAnywhere(t *testing.T) {
	a, b := newServer(t, "a", status(404)), newServer(t, "b", status(404))
	r := newRig(t, []*server{a, b})
	_, err := r.serve(t, chat(false))
	var refusal *StatusError
	if !errors.As(err, &refusal) || refusal.Status != 404 || refusal.Attempts != 2 {
		t.Errorf("error %v", err)
	}
}

// TestAllPaused: 429 everywhere is our overload with the least wait, and a
// paused upstream isn't asked again before its time.
func TestAllPaused(t *testing.T) {
	a, b := newServer(t, "a", status(429, "Retry-After", "30")), newServer(t, "b", status(429, "Retry-After", "7"))
	r := newRig(t, []*server{a, b})
	for range 3 {
		_, err := r.serve(t, chat(false))
		var busy *BusyError
		if !errors.As(err, &busy) || !errors.Is(err, ErrOverloaded) || busy.RetryAfter > 7*time.Second || busy.RetryAfter < 5*time.Second {
			t.Fatalf("error %v", err)
		}
	}
	if a.hits.Load() != 1 || b.hits.Load() != 1 {
		t.Errorf("hits %d, %d", a.hits.Load(), b.hits.Load())
	}
	for _, u := range r.fleet.Status() {
		if u.Breaker != "closed" || u.PausedUntil.IsZero() {
			t.Errorf("%+v", u)
		}
	}
}

// TestConnectTimer: a server that doesn't answer the dial is not waited for longer.
func TestConnectTimer(t *testing.T) {
	dead := &server{name: "dead"}
	good := newServer(t, "good", well)
	dead.Server = good.Server
	r := newRig(t, []*server{dead, good}, func(_ *rig, o *upstream.Options) {
		o.Transport = func(name string) http.RoundTripper {
			if name == "dead" {
				return failing{&net.OpError{Op: "dial", Err: timeoutNow{}}}
			}
			return nil
		}
	})
	if _, err := r.serve(t, chat(false)); err != nil {
		t.Fatal(err)
	}
	if r.results("dead", "timeout_connect") != 1 {
		t.Error("not counted as connect timer")
	}
}

type failing struct{ err error }

func (f failing) RoundTrip(*http.Request) (*http.Response, error) { return nil, f.err }

type timeoutNow struct{}

func (timeoutNow) Error() string { return "i/o timeout" }
func (timeoutNow) Timeout() bool { return true }

// TestTotalTimer ends a request even while its stream has content.
func TestTotalTimer(t *testing.T) {
	up := newServer(t, "up", then(events(roleChunk), chatter(delta("x"))))
	r := newRig(t, []*server{up})
	conf := *r.conf
	conf.Timeouts.Total = seconds(0.3)
	r.configure(t, &conf)
	saw, err := r.serve(t, chat(true))
	if !errors.Is(err, ErrTimeout) || r.results("up", "timeout_total") != 1 || len(saw.events) < 3 {
		t.Errorf("error %v after %d events", err, len(saw.events))
	}
}
