package gateway

import (
	"net/http"
	"slices"
	"strings"

	"github.com/dsnode/dsnode/node/openai"
)

// route is one path, with and without /v1.
type route struct {
	methods []string
	path    string // without /v1; a final "/" takes what follows as an id
	only    bool   // exactly this path, not also with /v1
	// endpoint takes requests for a model; nil for routes that the gateway answers
	// itself.
	endpoint *openai.Endpoint
	answer   func(x *exchange, id string)
	// job: all callers have the route, on a node with jobs.
	job bool
}

var (
	post  = []string{http.MethodPost}
	get   = []string{http.MethodGet, http.MethodHead}
	probe = []string{http.MethodGet, http.MethodHead, http.MethodOptions}
)

// routes is the whole surface: the endpoints, and what the gateway answers itself.
var routes = append(endpointRoutes(), []route{
	{get, "/models", false, nil, (*exchange).listModels, false},
	{get, "/models/", false, nil, (*exchange).showModel, false},

	{[]string{http.MethodPost, http.MethodGet, http.MethodHead}, "/jobs", false, nil, (*exchange).jobs, true},
	{[]string{http.MethodGet, http.MethodHead, http.MethodDelete, http.MethodPost}, "/jobs/", false, nil, (*exchange).job, true},

	{probe, "/healthz/live", true, nil, healthIf(live), false},
	{probe, "/healthz/ready", true, nil, healthIf(ready), false},
	{probe, "/healthz/primary", true, nil, healthIf(actsAsPrimary), false},
	{probe, "/healthz/same-city", true, nil, healthIf(isSameCity), false},
	{probe, "/healthz/remote", true, nil, healthIf(isRemote), false},
	{probe, "/healthz/quorum", true, nil, healthIf(hasQuorum), false},
	{probe, "/livez", true, nil, healthIf(live), false},
	{probe, "/readyz", true, nil, healthIf(ready), false},
	{probe, "/health", true, nil, healthIf(ready), false},
}...)

func endpointRoutes() []route {
	var list []route
	for i := range openai.Endpoints {
		e := &openai.Endpoints[i]
		list = append(list, route{post, strings.TrimPrefix(e.Path, "/v1"), false, e, nil, false})
	}
	return list
}

// probe reports whether the route is for load balancers.
func (rt *route) probe() bool { return rt.only }

func (rt *route) paths() []string {
	if rt.only {
		return []string{rt.path}
	}
	return []string{rt.path, "/v1" + rt.path}
}

func (rt *route) allows(method string) bool { return slices.Contains(rt.methods, method) }

// find returns the index of a path's route, -1 for none, and the id that follows the
// path, if any.
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
