package admin

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/dsnode/dsnode/node/ports"
)

// Errors of a Client that no node returned.
var (
	// ErrUnreachable: no admin URL answered, and nothing was changed.
	ErrUnreachable = errors.New("cannot reach the cluster")
	// ErrUnanswered: a change was sent and not answered. It may have been made.
	ErrUnanswered = errors.New("no answer, so the change may or may not have been made")
	// ErrNotAdmin: the server that answered is not the admin port of a dsnode.
	ErrNotAdmin = errors.New("this is not the admin port of a dsnode")
)

// ClientOptions are what NewClient needs besides the URLs.
type ClientOptions struct {
	Token  string
	CAFile string // PEM; empty: the system's CAs
	// Timeout bounds a call with all the URLs that it tries. Zero: 10 s.
	Timeout time.Duration
	// Author is recorded with each change.
	Author string
}

const (
	defaultClientTimeout = 10 * time.Second
	// Short, so that another URL is tried soon when a host does not answer.
	dialTimeout = 2 * time.Second
	// Far above the bound of the agreed state.
	maxAnswer = 64 << 20
)

// Client is a client of a cluster's admin ports. It implements Cluster. It tries its
// URLs in turn until one answers. It sends a change to a second URL only if the first
// one can't have received it.
type Client struct {
	urls    []*url.URL
	token   string
	author  string
	timeout time.Duration
	http    *http.Client
	first   atomic.Int32 // index of the URL to begin with; see StartDrill
}

var _ Cluster = (*Client)(nil)

// NewClient makes a client for URLs such as "http://host:port".
func NewClient(urls []string, o ClientOptions) (*Client, error) {
	c := &Client{token: o.Token, author: o.Author, timeout: cmp.Or(o.Timeout, defaultClientTimeout)}
	if len(urls) == 0 {
		return nil, &Error{Code: "invalid_request", Message: "no admin URL was given"}
	}
	for _, text := range urls {
		u, err := parseURL(text, o.Token != "")
		if err != nil {
			return nil, err
		}
		c.urls = append(c.urls, u)
	}
	transport := &http.Transport{
		DialContext:         (&net.Dialer{Timeout: dialTimeout}).DialContext,
		TLSHandshakeTimeout: dialTimeout,
		TLSClientConfig:     &tls.Config{MinVersion: tls.VersionTLS12},
		MaxIdleConnsPerHost: 2,
		IdleConnTimeout:     30 * time.Second,
	}
	if o.CAFile != "" {
		pem, err := os.ReadFile(o.CAFile)
		if err != nil {
			return nil, fmt.Errorf("read the admin CA: %w", err)
		}
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(pem) {
			return nil, &Error{Code: "invalid_request", Message: o.CAFile + " holds no certificate in PEM"}
		}
		transport.TLSClientConfig.RootCAs = pool
	}
	c.http = &http.Client{
		Transport: transport,
		// A redirect would send the token to another server.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return c, nil
}

// parseURL parses an admin URL, and refuses parts that would be ignored.
func parseURL(text string, withToken bool) (*url.URL, error) {
	refuse := func(format string, args ...any) error {
		return &Error{Code: "invalid_request", Message: fmt.Sprintf(format, args...)}
	}
	if !strings.Contains(text, "://") {
		return nil, refuse("the admin URL %s has no scheme: write http://%s", quote(text), text)
	}
	u, err := url.Parse(text)
	switch {
	case err != nil:
		return nil, refuse("an admin URL is malformed: %v", plain(err)) // without the URL: it may contain a password
	case u.Scheme != "http" && u.Scheme != "https":
		return nil, refuse("the admin URL %s must begin with http:// or https://", quote(u.Redacted()))
	case u.Host == "" || u.User != nil || strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.Fragment != "":
		return nil, refuse("the admin URL %s must only have a scheme, a host and a port", quote(u.Redacted()))
	case withToken && u.Scheme == "http" && !ports.LoopbackName(u.Host):
		return nil, refuse("the token would be sent unencrypted to %s: write https://", u.Host)
	}
	return &url.URL{Scheme: u.Scheme, Host: u.Host}, nil
}

// Close closes idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// URLs are the addresses that the client tries, in order.
func (c *Client) URLs() []string {
	texts := make([]string, len(c.urls))
	for i, u := range c.urls {
		texts[i] = u.String()
	}
	return texts
}

func (c *Client) Status(ctx context.Context) (Status, error) {
	return ask[Status](ctx, c, http.MethodGet, "/admin/v1/status", nil, nil)
}

func (c *Client) Upstreams(ctx context.Context) ([]UpstreamInfo, error) {
	l, err := ask[list[UpstreamInfo]](ctx, c, http.MethodGet, "/admin/v1/upstreams", nil, nil)
	return l.Data, err
}

func (c *Client) DrainUpstream(ctx context.Context, name, by string) error {
	return c.do(ctx, http.MethodPost, "/admin/v1/upstreams/"+url.PathEscape(name)+"/drain", c.by(by))
}

func (c *Client) ResumeUpstream(ctx context.Context, name, by string) error {
	return c.do(ctx, http.MethodPost, "/admin/v1/upstreams/"+url.PathEscape(name)+"/resume", c.by(by))
}

func (c *Client) Bootstrap(ctx context.Context, configText []byte, author string) error {
	_, err := ask[ConfigVersion](ctx, c, http.MethodPost, "/admin/v1/bootstrap", c.by(author), configText)
	return err
}

func (c *Client) Config(ctx context.Context) (ConfigVersion, error) {
	return ask[ConfigVersion](ctx, c, http.MethodGet, "/admin/v1/config", nil, nil)
}

func (c *Client) ConfigHistory(ctx context.Context) ([]ConfigVersion, error) {
	l, err := ask[list[ConfigVersion]](ctx, c, http.MethodGet, "/admin/v1/config/history", nil, nil)
	return l.Data, err
}

func (c *Client) ApplyConfig(ctx context.Context, text []byte, expectVersion *uint64, author string) (ConfigVersion, error) {
	return ask[ConfigVersion](ctx, c, http.MethodPut, "/admin/v1/config", expecting(c.by(author), expectVersion), text)
}

func (c *Client) RollbackConfig(ctx context.Context, to uint64, expectVersion *uint64, author string) (ConfigVersion, error) {
	q := expecting(c.by(author), expectVersion)
	q.Set("to", strconv.FormatUint(to, 10))
	return ask[ConfigVersion](ctx, c, http.MethodPost, "/admin/v1/config/rollback", q, nil)
}

func (c *Client) CreateAPIKey(ctx context.Context, r APIKeyRequest) (APIKeyCreated, error) {
	body, err := json.Marshal(r)
	if err != nil {
		return APIKeyCreated{}, fmt.Errorf("encode the request for a key: %w", err)
	}
	return ask[APIKeyCreated](ctx, c, http.MethodPost, "/admin/v1/apikeys", c.by(""), body)
}

func (c *Client) APIKeys(ctx context.Context) ([]APIKeyInfo, error) {
	l, err := ask[list[APIKeyInfo]](ctx, c, http.MethodGet, "/admin/v1/apikeys", nil, nil)
	return l.Data, err
}

func (c *Client) RevokeAPIKey(ctx context.Context, id string) error {
	return c.do(ctx, http.MethodDelete, "/admin/v1/apikeys/"+url.PathEscape(id), c.by(""))
}

// DrainNode implements Cluster. It tries the URLs until one is the node's own.
func (c *Client) DrainNode(ctx context.Context, name string) error {
	return c.do(ctx, http.MethodPost, "/admin/v1/nodes/"+url.PathEscape(name)+"/drain", c.by(""))
}

// ResumeNode implements Cluster. It tries the URLs until one is the node's own.
func (c *Client) ResumeNode(ctx context.Context, name string) error {
	return c.do(ctx, http.MethodPost, "/admin/v1/nodes/"+url.PathEscape(name)+"/resume", c.by(""))
}

// do makes a change that has neither a body nor an answer.
func (c *Client) do(ctx context.Context, method, path string, query url.Values) error {
	_, err := ask[struct{}](ctx, c, method, path, query, nil)
	return err
}

func (c *Client) by(author string) url.Values {
	if author == "" {
		author = c.author
	}
	if author == "" {
		return url.Values{}
	}
	return url.Values{"author": {author}}
}

func expecting(q url.Values, version *uint64) url.Values {
	if version != nil {
		q.Set("expect_version", strconv.FormatUint(*version, 10))
	}
	return q
}

// ask sends a request to the URLs in turn, until one gives a final answer, and decodes
// it.
func ask[T any](ctx context.Context, c *Client, method, path string, query url.Values, body []byte) (T, error) {
	value, _, err := askFrom[T](ctx, c, method, path, query, body)
	return value, err
}

// askFrom is ask; it also returns which of the URLs answered.
func askFrom[T any](ctx context.Context, c *Client, method, path string, query url.Values, body []byte) (value T, at int, err error) {
	var none T
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	var failures []error
	for i := range c.urls {
		at := (i + int(c.first.Load())) % len(c.urls)
		base := c.urls[at]
		text, sent, err := c.attempt(ctx, base, len(c.urls)-i, method, path, query, body)
		if err == nil {
			if len(text) == 0 {
				return value, at, nil
			}
			if err := json.Unmarshal(text, &value); err != nil {
				return none, at, fmt.Errorf("%s: %w: %w", base, ErrNotAdmin, err)
			}
			return value, at, nil
		}
		var refused *Error
		switch {
		case errors.As(err, &refused):
			// Another node may be a member, or the right one.
			switch refused.Code {
			case "not_member", "wrong_node", "stopping":
				failures = append(failures, err)
			default:
				return none, at, refused
			}
		case errors.Is(err, ErrNotAdmin):
			return none, at, err
		case sent && method != http.MethodGet:
			return none, at, fmt.Errorf("%s: %w: %w", base, ErrUnanswered, err)
		default:
			failures = append(failures, err)
		}
	}
	return none, 0, unreachable(failures)
}

// unreachable is one error for the errors of all URLs. If a node answered, its refusal
// is returned instead, because it says more.
func unreachable(failures []error) error {
	var refused *Error
	if errors.As(errors.Join(failures...), &refused) {
		return refused
	}
	texts := make([]string, len(failures))
	for i, err := range failures {
		texts[i] = err.Error()
	}
	return fmt.Errorf("%w: %s", ErrUnreachable, strings.Join(texts, "; "))
}

// attempt sends a request to one URL. It may take an equal share of the remaining time.
// sent is true if the node may have received the request.
func (c *Client) attempt(ctx context.Context, base *url.URL, left int, method, path string, query url.Values, body []byte) (text []byte, sent bool, err error) {
	if deadline, ok := ctx.Deadline(); ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Until(deadline)/time.Duration(left))
		defer cancel()
	}
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		// From now on a part of the request may have been sent.
		GotConn: func(httptrace.GotConnInfo) { sent = true },
	})
	target := base.String() + path
	if len(query) > 0 {
		target += "?" + query.Encode()
	}
	req, err := http.NewRequestWithContext(ctx, method, target, bytes.NewReader(body))
	if err != nil {
		return nil, false, fmt.Errorf("make the request: %w", err)
	}
	if c.token != "" {
		req.Header.Set("Authorization", "Bearer "+c.token)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, sent, fmt.Errorf("%s: %w", base, plain(err))
	}
	defer func() { _ = resp.Body.Close() }() // only read from
	text, err = io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return nil, sent, fmt.Errorf("%s: read the answer: %w", base, plain(err))
	}
	switch {
	case (resp.StatusCode == http.StatusOK || resp.StatusCode == http.StatusAccepted) && strings.HasPrefix(resp.Header.Get("Content-Type"), "application/json"):
		return text, sent, nil
	case resp.StatusCode == http.StatusNoContent:
		return nil, sent, nil
	}
	if refused, ok := readError(text); ok {
		return nil, sent, refused
	}
	return nil, sent, fmt.Errorf("%s: %w: it answered %s", base, ErrNotAdmin, resp.Status)
}

// plain removes the method and the URL that net/http adds to an error. The message
// names them already.
func plain(err error) error {
	var wrapped *url.Error
	if errors.As(err, &wrapped) {
		err = wrapped.Err
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return errors.New("no answer in time")
	}
	var op *net.OpError
	if errors.As(err, &op) && op.Op == "dial" {
		return fmt.Errorf("can't connect: %w", op.Err)
	}
	return err
}
