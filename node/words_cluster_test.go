package node

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/node/admin"
	"github.com/dsnode/dsnode/storage/keyring"
	"github.com/dsnode/dsnode/test/async"
)

// The texts that no log, admin answer or metric may have.
const (
	canaryPrompt   = "canary-prompt-3b1f"
	canaryTool     = "canary-tool-argument-77aa"
	canaryAnswer   = "canary-answer-90cd"
	canaryUpstream = "canary-upstream-key-5e5e"
	canaryToken    = "canary-operator-token-12ab"
	canaryWrong    = "canary-wrong-token-ef34"
	canaryWrongKey = "canary-wrong-api-key-aa00"
	// echo is what a model server says that repeats the request and has an answer. It fits
	// into a header and into a JSON string.
	echo = canaryPrompt + " " + canaryTool + " " + canaryUpstream + " " + canaryAnswer
)

// upstreamFaults are raw answers of a model server. An empty one closes the connection,
// and "stall" never answers.
var upstreamFaults = []struct{ name, raw string }{
	{"500 repeats the request", answerOf("500 Internal Server Error", "application/json", `{"error":{"message":"`+echo+`","type":"`+echo+`","code":"`+echo+`"}}`)},
	{"503 as a page", answerOf("503 Service Unavailable", "text/html", "<p>"+echo+"</p>")},
	{"400", answerOf("400 Bad Request", "application/json", `{"error":{"message":"`+echo+`","code":"`+canaryPrompt+`"}}`)},
	{"422 as text", answerOf("422 Unprocessable Entity", "text/plain", echo)},
	{"404", answerOf("404 Not Found", "application/json", `{"error":{"message":"`+echo+`"}}`)},
	{"429", answerOf("429 Too Many Requests", "application/json", `{"error":{"message":"`+echo+`"}}`)},
	{"401", answerOf("401 Unauthorized", "application/json", `{"error":{"message":"wrong key `+echo+`"}}`)},
	{"reason phrase", answerOf("500 "+echo, "application/json", `{}`)},
	{"redirect", "HTTP/1.1 307 Temporary Redirect\r\nLocation: http://x/?" + strings.ReplaceAll(echo, " ", "+") + "\r\nContent-Length: 0\r\n\r\n"},
	{"headers", "HTTP/1.1 500 Oops\r\nX-Echo: " + echo + "\r\nRetry-After: " + echo + "\r\nX-Request-Id: " + canaryPrompt + "\r\nContent-Length: 0\r\n\r\n"},
	{"content type", answerOf("200 OK", "text/"+canaryPrompt, echo)},
	{"no content type", answerOf("200 OK", echo+";;", echo)},
	{"broken JSON", answerOf("200 OK", "application/json", `{"choices":[{"message":{"content":"`+echo)},
	{"error under 200", answerOf("200 OK", "application/json", `{"error":{"message":"`+echo+`","code":"`+canaryPrompt+`"}}`)},
	{"error text under 200", answerOf("200 OK", "application/json", `{"error":"`+echo+`"}`)},
	{"no choices", answerOf("200 OK", "application/json", `{"id":"`+echo+`","choices":[]}`)},
	{"not HTTP", echo + "\r\n\r\n"},
	{"bad status", "HTTP/1.1 " + echo + "\r\n\r\n"},
	{"bad header", "HTTP/1.1 200 OK\r\n" + echo + "\r\n\r\n"},
	{"bad length", "HTTP/1.1 200 OK\r\nContent-Length: " + echo + "\r\n\r\n"},
	{"bad encoding", "HTTP/1.1 200 OK\r\nTransfer-Encoding: " + echo + "\r\n\r\n"},
	{"bad chunk", "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n" + echo + "\r\n"},
	{"switching protocols", "HTTP/1.1 101 " + echo + "\r\nUpgrade: " + echo + "\r\n\r\n"},
	{"cut body", "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 4000\r\n\r\n{\"choices\":[{\"text\":\"" + echo},
	{"stream of broken JSON", streamOf("data: {" + echo + "\n\n")},
	{"error event", streamOf("event: error\ndata: {\"error\":{\"message\":\"" + echo + "\"}}\n\n")},
	{"stream cut before content", streamOf("data: {\"choices\":[{\"delta\":{\"role\":\"assistant\"}}],\"id\":\"" + echo + "\"}\n\n")},
	{"stream cut after content", streamOf("data: {\"id\":\"" + echo + "\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\"" + echo + "\"}}]}\n\n")},
	{"broken JSON after content", streamOf("data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"" + echo + "\"}}]}\n\ndata: " + echo + "\n\n")},
	{"large event", streamOf("data: " + strings.Repeat(echo, 1<<20/len(echo)+1))},
	{"large header", "HTTP/1.1 200 OK\r\nX-Echo: " + strings.Repeat(echo, 1000) + "\r\n\r\n"},
	{"closed", ""},
	{"stall", stall},
	{"plain where TLS is wanted", answerOf("500 Oops", "text/plain", echo)},
	{"certificate with words", tlsFault},
}

const (
	stall    = "stall"
	tlsFault = "tls"
)

func answerOf(status, kind, body string) string {
	return fmt.Sprintf("HTTP/1.1 %s\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n%s", status, kind, len(body), body)
}

func streamOf(events string) string {
	return "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n" + events
}

// faultyServer answers every request on a port of its own with the same raw bytes, and
// returns its base URL.
func faultyServer(t *testing.T, name, raw string) (url string) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	scheme := "http"
	if raw == tlsFault {
		ln = tls.NewListener(ln, &tls.Config{Certificates: []tls.Certificate{wordyCertificate(t)}})
	}
	if raw == tlsFault || strings.Contains(name, "TLS") {
		scheme = "https"
	}
	done := make(chan struct{})
	var all sync.WaitGroup
	t.Cleanup(func() { close(done); _ = ln.Close(); all.Wait() })
	all.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			all.Go(func() { answerRaw(c, scheme, raw, done) })
		}
	})
	return scheme + "://" + ln.Addr().String()
}

func answerRaw(c net.Conn, scheme, raw string, done chan struct{}) {
	defer func() { _ = c.Close() }()
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	head := make([]byte, 4096)
	if _, err := c.Read(head); err != nil {
		return
	}
	if probe := bytes.HasPrefix(head, []byte("GET ")); raw == stall && !probe {
		<-done
		return
	}
	_, _ = io.WriteString(c, raw)
	if tcp, ok := c.(*net.TCPConn); ok && scheme == "http" {
		_ = tcp.CloseWrite()                                    // a reset could overtake the answer
		_, _ = io.Copy(io.Discard, io.LimitReader(tcp, 64<<10)) // the rest of the request
	}
}

// wordyCertificate is self-signed, and its names are canaries.
func wordyCertificate(t *testing.T) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: canaryPrompt}, DNSNames: []string{canaryAnswer},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// TestLogsAndAdminAnswersRepeatNothing has clients ask, plainly, as a stream, for
// embeddings and by jobs, models whose servers fail in every way and repeat the request
// while they do, at the site's own node and through a peer. Neither the log at level
// debug, nor an answer of the admin port, nor a metric has a word of the prompt, of the
// arguments of tools, of an answer, or of a key or token. (The client may see what the
// server said.)
func TestLogsAndAdminAnswersRepeatNothing(t *testing.T) {
	c := newKeyCluster(t)
	key, none := keyring.GenerateOperatorKey(), keyring.OperatorKey{}
	token := c.write("token", []byte(canaryToken))
	c.edit = func(cfg *Config) { cfg.Admin.TokenFile = token }
	secret := c.write("upstream-key", []byte(canaryUpstream))
	var upstreams, models strings.Builder
	for i, f := range upstreamFaults {
		fmt.Fprintf(&upstreams, "  u%d: {site: a, kind: openai, url: %q, api_key: {file: %q}}\n", i, faultyServer(t, f.name, f.raw)+"/v1", filepath.ToSlash(secret))
		fmt.Fprintf(&models, "  m%d: {serve: [{upstream: u%d, model: m}]}\n", i, i)
	}
	text := "version: 1\nsites:\n  a: {city: x, priority: 1}\n  b: {city: x, priority: 2}\n" +
		"timeouts: {connect: 2s, first_token: 2s, between_tokens: 2s, total: 8s}\njobs: {max_attempts: 1, durability: node, concurrency: 64}\n" +
		"upstreams:\n" + upstreams.String() + "models:\n" + models.String()
	a, _ := c.boot("a-1", key, none)
	c.seed = a.Addresses().RPC
	async.Await(t, "the first node bootstraps the cluster", func() bool {
		err := a.operator.Bootstrap(t.Context(), []byte(text), "me")
		var problems config.Problems
		if errors.As(err, &problems) {
			t.Fatal(err)
		}
		return err == nil
	})
	b, _ := c.boot("b-1", key, none)
	async.Await(t, "both nodes take jobs", func() bool {
		for _, n := range c.nodes {
			if s := n.cluster.State(); len(s.Nodes) != 2 || !n.keys.Ring.Ready() || n.starting() != "" {
				return false
			}
		}
		return len(b.view.Load().peers) > 0
	})
	made, err := a.operator.CreateAPIKey(t.Context(), admin.APIKeyRequest{Tenant: "acme"})
	if err != nil {
		t.Fatal(err)
	}
	async.Await(t, "both nodes know the key", func() bool { return len(a.cluster.State().APIKeys) == 1 && len(b.cluster.State().APIKeys) == 1 })

	ask := func(n *Node, key, path string, body map[string]any) []byte {
		out, err := json.Marshal(body)
		if err != nil {
			t.Error(err)
		}
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://"+n.Addresses().API+path, bytes.NewReader(out))
		if err != nil {
			t.Error(err)
			return nil
		}
		req.Header.Set("Authorization", "Bearer "+key)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return nil // the answer of a model server that was cut off
		}
		defer func() { _ = resp.Body.Close() }()
		got, _ := io.ReadAll(resp.Body) // the same
		return got
	}
	var all sync.WaitGroup
	for i := range upstreamFaults {
		model := fmt.Sprintf("m%d", i)
		chat := func(stream bool) map[string]any {
			return map[string]any{
				"model": model, "stream": stream, "messages": []map[string]any{{"role": "user", "content": canaryPrompt}},
				"tools": []map[string]any{{"type": "function", "function": map[string]any{"name": "f", "parameters": map[string]any{"const": canaryTool}}}},
			}
		}
		for _, n := range []*Node{a, b} {
			all.Go(func() { ask(n, made.Secret, "/v1/chat/completions", chat(false)) })
			all.Go(func() { ask(n, made.Secret, "/v1/chat/completions", chat(true)) })
			all.Go(func() { ask(n, made.Secret, "/v1/embeddings", map[string]any{"model": model, "input": canaryPrompt}) })
		}
		all.Go(func() {
			ask(a, made.Secret, "/v1/jobs", map[string]any{"endpoint": "/v1/chat/completions", "body": chat(false)})
		})
	}
	ask(a, canaryWrongKey, "/v1/chat/completions", map[string]any{"model": "m0"})
	ask(a, made.Secret, "/v1/chat/completions", map[string]any{"model": canaryPrompt, "messages": []any{canaryPrompt}})
	ask(a, made.Secret, "/v1/chat/completions", map[string]any{"model": "m0", canaryPrompt: 1, strings.ToUpper(canaryPrompt): canaryTool, "Model": canaryPrompt})
	all.Wait()
	async.Await(t, "all jobs have ended", func() bool {
		counts, err := a.jobs.service.Counts()
		return err == nil && counts.Queued == 0 && counts.Running == 0 && counts.Failed >= int64(len(upstreamFaults)-1)
	})

	forbidden := []string{canaryPrompt, canaryTool, canaryAnswer, canaryUpstream, canaryToken, canaryWrong, canaryWrongKey, made.Secret}
	clean := func(where, text string) {
		t.Helper()
		for _, word := range forbidden {
			if at := strings.Index(strings.ToLower(text), strings.ToLower(word)); at >= 0 {
				t.Errorf("%s has %q: …%s…", where, word, text[max(0, at-200):min(len(text), at+100)])
			}
		}
	}
	read := func(n *Node, path, token string) string {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+n.Addresses().Admin+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer "+token)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = resp.Body.Close() }()
		got, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		if want := http.StatusOK; token == canaryToken && resp.StatusCode != want {
			t.Errorf("GET %s: %d, want %d", path, resp.StatusCode, want)
		}
		return string(got)
	}
	for _, n := range []*Node{a, b} {
		clean("the answer to a wrong token", read(n, "/admin/v1/status", canaryWrong))
		for _, path := range []string{
			"/admin/v1/status", "/admin/v1/upstreams", "/admin/v1/config", "/admin/v1/config/history", "/admin/v1/apikeys", "/admin/v1/keyring",
			"/admin/v1/cache", "/admin/v1/drills", "/admin/v1/jobs", "/admin/v1/jobs/streams", "/metrics",
		} {
			clean(path+" of "+n.cfg.Name, read(n, path, canaryToken))
		}
	}
	log := string(c.log.Bytes())
	clean("the log", log)
	// The log says what can be said: the test would pass with a log that is empty.
	for _, want := range []string{"status 500, application/json, ", "the answer breaks the rules of HTTP", "error under a 200: status 200", `"model":"m0"`, "the certificate is for other names than"} {
		if !strings.Contains(log, want) {
			t.Errorf("the log never says %q", want)
		}
	}
	if got := read(a, "/admin/v1/upstreams", canaryToken); !strings.Contains(got, "status 500, ") && !strings.Contains(got, "answered 500") { // a request or a probe was last
		t.Errorf("the upstreams' reasons have no status: %s", got)
	}
}
