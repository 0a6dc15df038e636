//go:build linux

package main

import (
	"bytes"
	"context"
	crand "crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// The upstream uses as little CPU as possible, because it shares the machine with what
// is measured. A model's name says how it answers:
//
//	at-once          1 KiB of answer
//	after-60ms       the same, 60 ms later
//	stream-50x20ms   50 events 20 ms apart, each with its number
//	noise-8192       an answer of that many random bytes
//
// GET /asked returns the number of requests.
const modelAtOnce = "at-once"

func modelAfter(d time.Duration) string              { return "after-" + d.String() }
func modelNoise(n int) string                        { return "noise-" + strconv.Itoa(n) }
func modelStream(events int, d time.Duration) string { return fmt.Sprintf("stream-%dx%s", events, d) }

// answerMark is in each plain answer.
const answerMark = "The quick brown fox jumps over the lazy dog. "

const maxEvents = 1000

type upstream struct {
	asked   atomic.Int64
	noise   []byte // base64 of random bytes
	plain   []byte
	length  []string
	events  [maxEvents][]byte
	last    []byte
	bodies  sync.Pool
	streams map[string]pace // filled by pace, one entry a model
	mu      sync.Mutex      // guards streams
}

type pace struct {
	events int
	every  time.Duration
}

func newUpstream() *upstream {
	u := &upstream{streams: map[string]pace{}, bodies: sync.Pool{New: func() any { return new(bytes.Buffer) }}}
	u.plain = fmt.Appendf(nil, `{"id":"chatcmpl-bench","object":"chat.completion","created":1700000000,"model":"bench","choices":[{"index":0,"message":{"role":"assistant","content":"%s"},"finish_reason":"stop"}],"usage":{"prompt_tokens":20,"completion_tokens":160,"total_tokens":180}}`+"\n", strings.Repeat(answerMark, 16))
	u.length = []string{strconv.Itoa(len(u.plain))}
	u.noise = []byte(base64.StdEncoding.EncodeToString(randomBytes(3 << 20)))
	for i := range u.events {
		u.events[i] = fmt.Appendf(nil, `data: {"id":"chatcmpl-bench","object":"chat.completion.chunk","created":1700000000,"model":"bench","choices":[{"index":0,"delta":{"content":"%s"},"finish_reason":null}]}`+"\n\n", eventText(i))
	}
	u.last = []byte(`data: {"id":"chatcmpl-bench","object":"chat.completion.chunk","created":1700000000,"model":"bench","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}` + "\n\ndata: [DONE]\n\n")
	return u
}

// eventText is the text of one event of a stream.
func eventText(i int) string { return "token-" + strconv.Itoa(i) + " " }

func runUpstream(ctx context.Context) error { return serveInherited(ctx, newUpstream()) }

// serveInherited serves until ctx ends.
func serveInherited(ctx context.Context, h http.Handler) error {
	ln, err := inherited()
	if err != nil {
		return err
	}
	srv := &http.Server{Handler: h, ReadHeaderTimeout: 10 * time.Second}
	stop := context.AfterFunc(ctx, func() { _ = srv.Close() }) // Serve tells
	defer stop()
	if err := srv.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

func (u *upstream) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodPost { // a probe
		w.Header().Set("Content-Type", "application/json")
		if r.URL.Path == askedPath {
			_, _ = io.WriteString(w, strconv.FormatInt(u.asked.Load(), 10))
			return
		}
		_, _ = io.WriteString(w, `{"object":"list","data":[]}`)
		return
	}
	u.asked.Add(1)
	body := u.bodies.Get().(*bytes.Buffer)
	body.Reset()
	defer u.bodies.Put(body)
	_, err := body.ReadFrom(r.Body)
	model := modelOf(body.Bytes())
	if err != nil || model == nil {
		http.Error(w, "the request is not complete", http.StatusBadRequest)
		return
	}
	if bytes.HasPrefix(model, []byte("stream-")) {
		u.stream(w, r, u.pace(model))
		return
	}
	if size, ok := bytes.CutPrefix(model, []byte("noise-")); ok {
		u.answerNoise(w, string(size))
		return
	}
	if after, ok := bytes.CutPrefix(model, []byte("after-")); ok {
		d, err := time.ParseDuration(string(after))
		if err != nil {
			http.Error(w, "no such model", http.StatusNotFound)
			return
		}
		time.Sleep(d)
	}
	h := w.Header()
	h["Content-Type"] = jsonType
	h["Content-Length"] = u.length
	_, _ = w.Write(u.plain) // fails if the client is gone
}

const askedPath = "/asked"

// answerNoise sends a plain answer: answerMark and then noise.
func (u *upstream) answerNoise(w http.ResponseWriter, size string) {
	n, err := strconv.Atoi(size)
	if err != nil || n < 1 || n > len(u.noise)/2 {
		http.Error(w, "no such model", http.StatusNotFound)
		return
	}
	from := rand.IntN(len(u.noise) - n)
	w.Header()["Content-Type"] = jsonType
	_, _ = fmt.Fprintf(w, `{"id":"chatcmpl-bench","object":"chat.completion","created":1700000000,"model":"bench","choices":[{"index":0,"message":{"role":"assistant","content":"%s%s"},"finish_reason":"stop"}],"usage":{"prompt_tokens":20,"completion_tokens":160,"total_tokens":180}}`+"\n", answerMark, u.noise[from:from+n])
}

func randomBytes(n int) []byte {
	b := make([]byte, n)
	_, _ = crand.Read(b) // never fails; it ends the process instead
	return b
}

var jsonType = []string{"application/json"}

// modelOf finds the model's name in a body of the bench, nil if the body is not complete.
func modelOf(body []byte) []byte {
	const key = `"model":"`
	at := bytes.Index(body, []byte(key))
	if at < 0 || !bytes.HasSuffix(body, []byte("}")) {
		return nil
	}
	name, _, ok := bytes.Cut(body[at+len(key):], []byte(`"`))
	if !ok {
		return nil
	}
	return name
}

func (u *upstream) pace(model []byte) pace {
	u.mu.Lock()
	defer u.mu.Unlock()
	p, ok := u.streams[string(model)]
	if ok {
		return p
	}
	events, every, _ := strings.Cut(strings.TrimPrefix(string(model), "stream-"), "x")
	// A name that can't be parsed streams nothing, which clients count as failed.
	p.events, _ = strconv.Atoi(events)
	p.events = min(p.events, maxEvents)
	p.every, _ = time.ParseDuration(every)
	u.streams[string(model)] = p
	return p
}

// stream sends events by the clock: a late one does not delay the others.
func (u *upstream) stream(w http.ResponseWriter, r *http.Request, p pace) {
	w.Header()["Content-Type"] = []string{"text/event-stream"}
	flush := http.NewResponseController(w).Flush
	begun := time.Now()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for i := range p.events {
		timer.Reset(time.Until(begun.Add(time.Duration(i) * p.every)))
		select {
		case <-r.Context().Done():
			return
		case <-timer.C:
		}
		if _, err := w.Write(u.events[i]); err != nil {
			return
		}
		if err := flush(); err != nil {
			return
		}
	}
	_, _ = w.Write(u.last) // fails if the client is gone
}
