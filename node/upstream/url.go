package upstream

import (
	"fmt"
	"net/url"
	"strings"
)

// baseURL is the parsed URL of an upstream.
type baseURL struct {
	scheme, host string
	path         string // without a final slash
}

func parseBase(raw string) (baseURL, error) {
	u, err := url.Parse(raw)
	if err != nil {
		return baseURL{}, fmt.Errorf("upstream url %q: %w", raw, err)
	}
	if u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return baseURL{}, fmt.Errorf("upstream url %q: want http://host[:port]/v1 or https://…", raw)
	}
	return baseURL{u.Scheme, u.Host, strings.TrimRight(u.Path, "/")}, nil
}

// join appends an endpoint ("/v1/chat/completions", or one without /v1 such as
// "/tokenize") to the base as users of OpenAI's clients expect:
//
//	http://x/v1                    + /v1/chat/completions → http://x/v1/chat/completions
//	http://x                       + /v1/chat/completions → http://x/v1/chat/completions
//	https://api.deepseek.com       + /v1/chat/completions → https://api.deepseek.com/v1/chat/completions
//	https://api.deepseek.com/beta  + /v1/chat/completions → https://api.deepseek.com/beta/chat/completions
//	http://x/v1                    + /tokenize            → http://x/tokenize
//
// A base with a path takes the place of /v1, as a client's base_url does.
func (b baseURL) join(endpoint string) *url.URL {
	path := b.path
	if rest, ok := strings.CutPrefix(endpoint, "/v1/"); ok {
		if path == "" {
			path = "/v1"
		}
		path += "/" + rest
	} else {
		path = b.root() + endpoint
	}
	return &url.URL{Scheme: b.scheme, Host: b.host, Path: path}
}

// root is the base path without the API version. Servers have /health there.
func (b baseURL) root() string { return strings.TrimSuffix(b.path, "/v1") }

// metrics is where vLLM and SGLang report how busy they are.
func (b baseURL) metrics() *url.URL {
	return &url.URL{Scheme: b.scheme, Host: b.host, Path: b.root() + "/metrics"}
}

// health is what a probe asks of a server that has a health page.
func (b baseURL) health() *url.URL {
	return &url.URL{Scheme: b.scheme, Host: b.host, Path: b.root() + "/health"}
}
