package drill

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/dsnode/dsnode/cluster/cause"
	"github.com/dsnode/dsnode/cluster/host"
	"github.com/dsnode/dsnode/node/openai"
)

// HTTPAsker sends requests over HTTP, without an API key. The caller closes it.
type HTTPAsker struct {
	client *http.Client
	scheme string
	model  string
}

// NewHTTPAsker makes an HTTPAsker. model is for AskCompletion. secure tells that the
// API ports use TLS. from is the machine that the requests are sent from, nil for this one.
func NewHTTPAsker(model string, secure bool, from *host.Host) *HTTPAsker {
	a := &HTTPAsker{model: model, scheme: "http", client: &http.Client{
		Transport: &http.Transport{
			DialContext:         from.Dialer(&net.Dialer{Timeout: 2 * time.Second}),
			MaxIdleConnsPerHost: 16, IdleConnTimeout: 30 * time.Second, DisableCompression: true,
			// Nodes are asked by address, and their API certificates may have other names.
			// Nothing secret is sent, and only the status of the answer is used.
			TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12, InsecureSkipVerify: true}, //nolint:gosec // see above
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
	if secure {
		a.scheme = "https"
	}
	return a
}

// Close closes idle connections.
func (a *HTTPAsker) Close() { a.client.CloseIdleConnections() }

// Ask implements Asker.
func (a *HTTPAsker) Ask(ctx context.Context, t Target, q Question) (Answer, error) {
	method, path, _ := strings.Cut(string(q), " ")
	var body io.Reader
	if q == AskCompletion {
		text, err := json.Marshal(map[string]any{
			"model": a.model, "max_tokens": 1, "messages": []map[string]string{{"role": "user", "content": "Say yes."}},
		})
		if err != nil {
			return Answer{}, fmt.Errorf("encode a completion: %w", err)
		}
		body = strings.NewReader(string(text))
	}
	req, err := http.NewRequestWithContext(ctx, method, a.scheme+"://"+t.API+path, body)
	if err != nil {
		return Answer{}, fmt.Errorf("make a request: %w", err)
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := a.client.Do(req)
	if err != nil {
		return Answer{}, cause.Of(err)
	}
	defer func() { _ = resp.Body.Close() }() // the body was read, or is not needed
	text, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	switch {
	case err != nil:
		return Answer{}, fmt.Errorf("read the answer: %w", cause.Of(err))
	case q == AskPrimary && resp.StatusCode == http.StatusServiceUnavailable:
		return Answer{}, nil
	case resp.StatusCode == http.StatusOK:
		return Answer{Primary: q == AskPrimary}, nil
	case q == AskModels && (resp.StatusCode == http.StatusUnauthorized || resp.StatusCode == http.StatusForbidden):
		return Answer{Refused: true}, nil
	}
	// The report is kept and exported, and an upstream's refusal may repeat a request.
	object, _ := openai.ErrorObject(text)
	_, code := openai.ErrorKind(object)
	return Answer{}, &cause.Answer{
		What: "answered", Status: resp.StatusCode, Type: cause.ContentType(resp.Header), Length: len(text), Code: openai.KnownCode(code),
	}
}
