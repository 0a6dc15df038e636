package gateway

import (
	"net/http"
	"slices"
	"strings"
)

// route is one path, with and without /v1.
type route struct {
	methods []string
	path    string // without /v1; a final "/" takes what follows as an id
	only    bool   // exactly this path, no twin with /v1
	// endpoint is the canonical path of a request for a model, empty for
	// routes that the gateway answers itself.
	endpoint string
	answer   func(x *exchange, id string)
}

var (
	post  = []string{http.MethodPost}
	get   = []string{http.MethodGet, http.MethodHead}
	probe = []string{http.MethodGet, http.MethodHead, http.MethodOptions}
)

// routes is the whole surface.
var routes = []route{
	{post, "/chat/completions", false, "/v1/chat/completions", nil},
	{post, "/completions", false, "/v1/completions", nil},
	{post, "/embeddings", false, "/v1/embeddings", nil},

	// Passed through: pool, breaker and failover before content, no more.
	{post, "/responses", false, "/v1/responses", nil},
	{post, "/messages", false, "/v1/messages", nil},
	{post, "/messages/count_tokens", false, "/v1/messages/count_tokens", nil},
	{post, "/rerank", false, "/v1/rerank", nil},
	{post, "/score", false, "/v1/score", nil},
	{post, "/classify", false, "/v1/classify", nil},
	{post, "/pooling", false, "/v1/pooling", nil},
	{post, "/moderations", false, "/v1/moderations", nil},
	{post, "/images/generations", false, "/v1/images/generations", nil},
	{post, "/audio/speech", false, "/v1/audio/speech", nil},
	// Servers keep these two beside /v1.
	{post, "/tokenize", false, "/tokenize", nil},
	{post, "/detokenize", false, "/detokenize", nil},

	{get, "/models", false, "", (*exchange).listModels},
	{get, "/models/", false, "", (*exchange).showModel},

	{probe, "/healthz/live", true, "", (*exchange).live},
	{probe, "/healthz/ready", true, "", (*exchange).ready},
	{probe, "/healthz/primary", true, "", (*exchange).primary},
	{probe, "/healthz/same-city", true, "", (*exchange).sameCity},
	{probe, "/healthz/remote", true, "", (*exchange).remote},
	{probe, "/healthz/quorum", true, "", (*exchange).quorum},
	{probe, "/livez", true, "", (*exchange).live},
	{probe, "/readyz", true, "", (*exchange).ready},
	{probe, "/health", true, "", (*exchange).ready},
}

func (rt *route) paths() []string {
	if rt.only {
		return []string{rt.path}
	}
	return []string{rt.path, "/v1" + rt.path}
}

func (rt *route) allows(method string) bool { return slices.Contains(rt.methods, method) }

// find gives the index of a path's route, -1 for none, and the id that follows
// the path, if any.
func (g *Gateway) find(path string) (index int, id string) {
	if i, ok := g.byPath[path]; ok && !strings.HasSuffix(path, "/") {
		return i, ""
	}
	// A model's name may hold slashes: deepseek-ai/DeepSeek-V3.2.
	for _, prefix := range [...]string{"/v1/models/", "/models/"} {
		if id, ok := strings.CutPrefix(path, prefix); ok && id != "" {
			return g.byPath[prefix], id
		}
	}
	return -1, ""
}
