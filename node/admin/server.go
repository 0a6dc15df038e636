// Package admin serves a node's admin port: the admin API under /admin/v1/, a
// read-only console page, metrics, health and profiles. It also has the Go client of
// that API, which the CLI uses.
//
// The package owns the types of the API (status.go, types.go), its errors (errors.go)
// and access control (guard.go). It has no state: the node implements Cluster, which
// it reads and changes. Start reading at Server.routes; node/API.md documents the API.
package admin

import (
	"cmp"
	"context"
	"log/slog"
	"net/http"
	"net/http/pprof"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Cluster is what the admin port needs of its node. Reads use the node's copy of the
// agreed state, with or without quorum. Changes return after the cluster has agreed on
// them. Errors wrap the errors of this package and of package cluster; any other error
// is reported as an internal error.
type Cluster interface {
	Status(ctx context.Context) (Status, error)
	Upstreams(ctx context.Context) ([]UpstreamInfo, error)
	// DrainUpstream makes all nodes send the upstream no new requests until
	// ResumeUpstream. Running requests finish.
	DrainUpstream(ctx context.Context, name, by string) error
	ResumeUpstream(ctx context.Context, name, by string) error

	// Bootstrap starts the cluster. Repeating it with the same text is no error.
	Bootstrap(ctx context.Context, configText []byte, author string) error
	Config(ctx context.Context) (ConfigVersion, error)
	// ConfigHistory lists earlier versions, oldest first, without the current one.
	ConfigHistory(ctx context.Context) ([]ConfigVersion, error)
	// ApplyConfig replaces the configuration; with expectVersion only when
	// that is the current version, else cluster.ErrVersionConflict.
	ApplyConfig(ctx context.Context, text []byte, expectVersion *uint64, author string) (ConfigVersion, error)
	// RollbackConfig applies the text of an earlier version as a new one.
	RollbackConfig(ctx context.Context, to uint64, expectVersion *uint64, author string) (ConfigVersion, error)

	CreateAPIKey(ctx context.Context, r APIKeyRequest) (APIKeyCreated, error)
	APIKeys(ctx context.Context) ([]APIKeyInfo, error)
	RevokeAPIKey(ctx context.Context, id string) error

	// DrainNode makes the node not ready, so that load balancers send clients to
	// other nodes. ResumeNode ends that. A name other than the node's own is
	// ErrWrongNode.
	DrainNode(ctx context.Context, name string) error
	ResumeNode(ctx context.Context, name string) error

	Removals
	Failovers
	Drills
	Keyrings
	JobsChecker
	Caches
}

// Options are what New needs. Cluster, Gatherer and Health are required.
type Options struct {
	Cluster  Cluster
	Gatherer prometheus.Gatherer // shown at /metrics
	Health   http.Handler        // gets every request under /healthz/
	// Jobs gets every authorized request under /admin/v1/jobs, with the path /v1/jobs….
	// Nil: no such paths.
	Jobs http.Handler
	// Token is what operators must send. Empty: only connections over loopback are
	// served.
	Token  string
	Logger *slog.Logger // nil: discards
	// Timeout bounds one call of the Cluster. Zero: 30 s.
	Timeout time.Duration
}

const (
	defaultTimeout = 30 * time.Second
	// The largest body is a configuration, which the agreed state bounds too.
	maxBody = 1 << 20
	// A body comes from a file or a pipe, not from somebody who types.
	bodyTimeout = 10 * time.Second
	// Operators, one scraper and some scripts use this port.
	maxInFlight = 64
)

// Server is the admin port's handler.
type Server struct {
	cluster  Cluster
	token    string
	log      *slog.Logger
	timeout  time.Duration
	inFlight chan struct{}
	mux      *http.ServeMux
}

// New makes the handler and starts nothing. The caller's http.Server should have a
// ReadHeaderTimeout, and no WriteTimeout, because a profile takes long. The handler
// sets deadlines for the body and the answer of each request.
func New(o Options) *Server {
	s := &Server{
		cluster: o.Cluster, token: o.Token, log: cmp.Or(o.Logger, slog.New(slog.DiscardHandler)),
		timeout: cmp.Or(o.Timeout, defaultTimeout), inFlight: make(chan struct{}, maxInFlight), mux: http.NewServeMux(),
	}
	for _, r := range s.routes(o) {
		s.mux.Handle(r.pattern, r.handler)
	}
	if o.Jobs != nil {
		s.mux.Handle("/admin/v1/jobs", s.jobs(o.Jobs))
		s.mux.Handle("/admin/v1/jobs/", s.jobs(o.Jobs))
	}
	return s
}

// route is a route of the admin port.
type route struct {
	pattern string
	handler http.Handler
}

// routes are all routes of the admin port, except those of Options.Jobs.
func (s *Server) routes(o Options) []route {
	metrics := promhttp.HandlerFor(o.Gatherer, promhttp.HandlerOpts{MaxRequestsInFlight: 8, Timeout: s.timeout})
	return []route{
		{"GET /admin/v1/status", s.read(s.getStatus)},
		{"GET /admin/v1/upstreams", s.read(items(s.cluster.Upstreams))},
		{"POST /admin/v1/upstreams/{name}/drain", s.change(namedBy("name", s.cluster.DrainUpstream))},
		{"POST /admin/v1/upstreams/{name}/resume", s.change(namedBy("name", s.cluster.ResumeUpstream))},
		{"POST /admin/v1/bootstrap", s.change(s.postBootstrap)},
		{"GET /admin/v1/config", s.read(value(s.cluster.Config))},
		{"PUT /admin/v1/config", s.change(s.putConfig, "expect_version")},
		{"GET /admin/v1/config/history", s.read(items(s.cluster.ConfigHistory))},
		{"POST /admin/v1/config/rollback", s.change(s.postRollback, "to", "expect_version")},
		{"GET /admin/v1/apikeys", s.read(items(s.cluster.APIKeys))},
		{"POST /admin/v1/apikeys", s.change(s.postAPIKey)},
		{"DELETE /admin/v1/apikeys/{id}", s.change(named("id", s.cluster.RevokeAPIKey))},
		{"GET /admin/v1/keyring", s.read(value(s.cluster.Keyring))},
		{"POST /admin/v1/keyring/rotate", s.change(s.postKeyringRotate)},
		{"POST /admin/v1/keyring/rewrap", s.change(s.postKeyringRewrap)},
		{"POST /admin/v1/jobs/check", s.change(s.postJobsCheck)},
		{"GET /admin/v1/jobs/streams", s.read(value(s.cluster.JobStreams))},
		{"GET /admin/v1/cache", s.read(value(s.cluster.CacheStats))},
		{"POST /admin/v1/cache/purge", s.change(s.postCachePurge)},
		{"DELETE /admin/v1/nodes/{name}", s.change(s.deleteNode, "accept_loss", "force")},
		{"GET /admin/v1/nodes/{name}/removal", s.read(s.getRemovalPlan)},
		{"POST /admin/v1/nodes/{name}/admit", s.change(namedBy("name", s.cluster.AdmitNode))},
		{"POST /admin/v1/nodes/{name}/drain", s.change(named("name", s.cluster.DrainNode))},
		{"POST /admin/v1/nodes/{name}/resume", s.change(named("name", s.cluster.ResumeNode))},
		{"GET /admin/v1/failover/plan", s.read(s.getFailoverPlan, "to", "accept_loss", "waive", "author")},
		{"POST /admin/v1/failover", s.change(s.postFailover)},
		{"POST /admin/v1/failover/ack", s.change(s.postFailoverAck)},
		{"POST /admin/v1/failover/hold", s.change(s.postFailoverHold, "reason")},
		{"POST /admin/v1/failover/resume", s.change(s.postFailoverResume)},
		{"GET /admin/v1/drills", s.read(items(s.cluster.Drills))},
		{"GET /admin/v1/drills/plan", s.read(s.getDrillPlan, "kind", "site", "for_seconds", "return", "waive", "probe_model", "author")},
		{"POST /admin/v1/drills", s.change(s.postDrill)},
		{"GET /admin/v1/drills/{id}", s.read(s.getDrill)},
		{"POST /admin/v1/drills/{id}/abort", s.change(namedBy("id", s.cluster.AbortDrill))},
		{"POST /admin/v1/recover/release", s.change(s.postRelease)},

		{"GET /metrics", s.authorized(metrics)},
		{"GET /debug/pprof/", s.authorized(http.HandlerFunc(pprof.Index))},
		{"GET /debug/pprof/cmdline", s.authorized(http.HandlerFunc(pprof.Cmdline))},
		{"GET /debug/pprof/profile", s.authorized(http.HandlerFunc(pprof.Profile))},
		{"GET /debug/pprof/symbol", s.authorized(http.HandlerFunc(pprof.Symbol))},
		{"GET /debug/pprof/trace", s.authorized(http.HandlerFunc(pprof.Trace))},

		// Probes have no token. They get the same answers at the api port.
		{"/healthz/", o.Health},
		// The files of the console contain nothing of the cluster. The console's own
		// requests need the token.
		{"GET /{$}", console("console.html", "text/html; charset=utf-8")},
		{"GET /console.css", console("console.css", "text/css; charset=utf-8")},
		{"GET /console.js", console("console.js", "text/javascript; charset=utf-8")},
		{"/", http.HandlerFunc(s.noRoute)},
	}
}

// ServeHTTP implements http.Handler.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("X-Content-Type-Options", "nosniff")
	if r.ContentLength != 0 {
		// Also for a body that nobody reads: net/http reads it before the next request.
		_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(bodyTimeout))
	}
	if err := sameOrigin(r); err != nil {
		s.refuse(w, r, err)
		return
	}
	s.mux.ServeHTTP(w, r)
}

// noRoute answers 405 when the path exists for another method, else 404.
func (s *Server) noRoute(w http.ResponseWriter, r *http.Request) {
	var allowed []string
	for _, method := range []string{http.MethodGet, http.MethodPost, http.MethodPut, http.MethodDelete} {
		other := &http.Request{Method: method, URL: r.URL, Host: r.Host}
		if _, pattern := s.mux.Handler(other); pattern != "/" {
			allowed = append(allowed, method)
		}
	}
	if len(allowed) == 0 {
		s.refuse(w, r, &Error{Code: "not_found", Message: "this version has no path " + r.URL.Path})
		return
	}
	for _, method := range allowed {
		w.Header().Add("Allow", method)
	}
	s.refuse(w, r, &Error{Code: "method_not_allowed", Message: r.URL.Path + " does not support " + r.Method})
}
