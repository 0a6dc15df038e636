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
		path = strings.TrimSuffix(b.path, "/v1") + endpoint
	}
	return &url.URL{Scheme: b.scheme, Host: b.host, Path: path}
}
