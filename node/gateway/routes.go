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
	// job: it is there when the node has jobs, at all doors.
	job bool
}

var (
	post  = []string{http.MethodPost}
	get   = []string{http.MethodGet, http.MethodHead}
	probe = []string{http.MethodGet, http.MethodHead, http.MethodOptions}
)

// routes is the whole surface.
var routes = []route{
	{post, "/chat/completions", false, "/v1/chat/completions", nil, false},
	{post, "/completions", false, "/v1/completions", nil, false},
	{post, "/embeddings", false, "/v1/embeddings", nil, false},

	// Passed through: pool, breaker and failover before content, no more.
	{post, "/responses", false, "/v1/responses", nil, false},
	{post, "/messages", false, "/v1/messages", nil, false},
	{post, "/messages/count_tokens", false, "/v1/messages/count_tokens", nil, false},
	{post, "/rerank", false, "/v1/rerank", nil, false},
	{post, "/score", false, "/v1/score", nil, false},
	{post, "/classify", false, "/v1/classify", nil, false},
	{post, "/pooling", false, "/v1/pooling", nil, false},
	{post, "/moderations", false, "/v1/moderations", nil, false},
	{post, "/images/generations", false, "/v1/images/generations", nil, false},
	{post, "/audio/speech", false, "/v1/audio/speech", nil, false},
	// Servers keep these two beside /v1.
	{post, "/tokenize", false, "/tokenize", nil, false},
	{post, "/detokenize", false, "/detokenize", nil, false},

	{get, "/models", false, "", (*exchange).listModels, false},
	{get, "/models/", false, "", (*exchange).showModel, false},

	{[]string{http.MethodPost, http.MethodGet, http.MethodHead}, "/jobs", false, "", (*exchange).jobs, true},
	{[]string{http.MethodGet, http.MethodHead, http.MethodDelete, http.MethodPost}, "/jobs/", false, "", (*exchange).job, true},

	{probe, "/healthz/live", true, "", (*exchange).live, false},
	{probe, "/healthz/ready", true, "", (*exchange).ready, false},
	{probe, "/healthz/primary", true, "", (*exchange).primary, false},
	{probe, "/healthz/same-city", true, "", (*exchange).sameCity, false},
	{probe, "/healthz/remote", true, "", (*exchange).remote, false},
	{probe, "/healthz/quorum", true, "", (*exchange).quorum, false},
	{probe, "/livez", true, "", (*exchange).live, false},
	{probe, "/readyz", true, "", (*exchange).ready, false},
	{probe, "/health", true, "", (*exchange).ready, false},
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
	for _, prefix := range [...]string{"/v1/jobs/", "/v1/models/", "/models/", "/jobs/"} {
		if id, ok := strings.CutPrefix(path, prefix); ok && id != "" {
			return g.byPath[prefix], id
		}
	}
	return -1, ""
}
