// Package gateway is the HTTP handler for clients: OpenAI's API in front of a
// serving.Server, the job routes, and the health endpoints of load balancers. Start
// reading at Gateway.ServeHTTP; routes.go lists the routes, inference.go follows one
// request, and errors.go has the message of every error.
package gateway

import (
	"cmp"
	"errors"
	"log/slog"
	"net/http"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/node/serving"
	"github.com/dsnode/dsnode/node/shares"
)

// Auth authenticates clients. It must answer from local state, at once.
type Auth interface {
	// Authenticate judges a bearer token, empty when none was sent. local is
	// true for a direct connection over loopback. Errors wrap one of
	// agreed.ErrKeyMissing, ErrKeyUnknown, ErrKeyExpired, ErrKeyRevoked (401)
	// or ErrKeyUnknowable or ErrKeysStale (503); any other one is treated like
	// ErrKeyUnknowable.
	Authenticate(token string, local bool) (serving.Principal, error)
}

// ErrKeyUnknowable says that keys can't be checked now, because there is no agreed
// state. It must never look like a wrong key.
var ErrKeyUnknowable = errors.New("API keys can't be checked now")

// ErrKeysStale says that this node has been cut off from the cluster for longer than the
// configuration lets it accept keys.
var ErrKeysStale = errors.New("API keys were last known to be valid too long ago")

// Health reports what the health endpoints show.
type Health interface {
	Health() Report
}

// Report is a node's health at one moment.
type Report struct {
	Role   string // "primary", "same-city", "remote"; empty: unknown
	Epoch  uint64 // 0: unknown
	Ready  bool   // some upstream in some site is reachable
	Quorum bool
	Acting bool // the node acts as primary: its site is, and its lease and its fence allow it
}

// Options of a gateway. Server, Config, Auth, Health and Registerer are
// required.
type Options struct {
	Server serving.Server
	// Config returns the agreed configuration, nil before there is one. It is called
	// for each request: models, limits.
	Config func() *config.Config
	Auth   Auth
	Health Health
	// Jobs is nil on a node without jobs, which has no job routes.
	Jobs Jobs
	// Site and Node are this node's names.
	Site, Node string
	Logger     *slog.Logger
	Registerer prometheus.Registerer

	// HoldHeaders is how long a stream waits for content before its headers are
	// sent, and the time between keep-alives after that; 0 means 15 s.
	HoldHeaders time.Duration
	// A client has BodyGrace to send a body, plus the time that BodyRate (bytes per
	// second) allows for what has come; 0 means 10 s and 16 KiB/s.
	BodyGrace time.Duration
	BodyRate  int
	// BodyMemory bounds the bytes of all bodies held at once; 0 means 512 MiB. A body of
	// more than 1 MiB counts twice, since the upstream gets a copy. At least one body of
	// limits.body_bytes is always allowed.
	BodyMemory int64
	// WriteTimeout bounds each write to a client; 0 means 30 s.
	WriteTimeout time.Duration
	// InFlight bounds the requests at once below limits.in_flight, because each needs an
	// open file for its upstream; 0: no such bound.
	InFlight int
}

// Gateway is an http.Handler for clients.
type Gateway struct {
	o        Options
	log      *slog.Logger
	metrics  *metrics
	started  time.Time
	draining atomic.Bool
	removed  atomic.Bool // see Refuse
	inFlight atomic.Int64
	held     atomic.Int64 // bytes of all bodies in memory
	// inFlightOf and heldOf are what each tenant has of inFlight and held.
	inFlightOf, heldOf shares.Counter
	site               []string // header values, shared by all answers
	node               []string
	byPath             map[string]int // index into routes
}

// New makes a gateway.
func New(o Options) *Gateway {
	o.HoldHeaders = cmp.Or(o.HoldHeaders, 15*time.Second)
	o.BodyGrace = cmp.Or(o.BodyGrace, 10*time.Second)
	o.BodyRate = cmp.Or(o.BodyRate, 16<<10)
	o.BodyMemory = cmp.Or(o.BodyMemory, 512<<20)
	o.WriteTimeout = cmp.Or(o.WriteTimeout, 30*time.Second)
	o.Logger = cmp.Or(o.Logger, slog.New(slog.DiscardHandler))
	g := &Gateway{
		o: o, log: o.Logger, started: time.Now(), site: []string{o.Site}, node: []string{o.Node},
		byPath: make(map[string]int),
	}
	g.metrics = newMetrics(o.Registerer, func() float64 { return float64(g.inFlight.Load()) })
	for i := range routes {
		for _, path := range routes[i].paths() {
			g.byPath[path] = i
		}
	}
	return g
}

// Drain makes readiness fail and asks clients to use other connections. The owner then
// waits and shuts the http.Server down.
func (g *Gateway) Drain() { g.draining.Store(true) }

// RefuseConnection counts a connection that the api port refuses because it has as many as
// it may have, and returns the error for its client.
func (g *Gateway) RefuseConnection() []byte { return g.shed(shedConnections).json() }

// Connections is limits.connections.
func (g *Gateway) Connections() int { return g.config().Limits.Connections }

// Resume undoes Drain.
func (g *Gateway) Resume() { g.draining.Store(false) }

// Refuse makes all requests fail but those for this node's health: the node was removed
// from the cluster. Requests that run go on.
func (g *Gateway) Refuse() { g.removed.Store(true) }

// ServeHTTP answers clients.
func (g *Gateway) ServeHTTP(w http.ResponseWriter, r *http.Request) { g.serve(w, r, clients) }

// PeerHandler answers the same requests for nodes of other sites, over the mesh. The
// principal comes with the request; mutual TLS has authenticated the node. A 200 waits
// for content however long it takes, because the asking node sends keep-alives to its
// client itself. Errors carry their code in X-Dsnode-Error.
func (g *Gateway) PeerHandler() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { g.serve(w, r, peers) })
}

// OperatorHandler answers the job routes for operators. The admin port has
// authenticated them, and has removed /admin from the path.
func (g *Gateway) OperatorHandler() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { g.serve(w, r, operators) })
}

// caller is the kind of who sends a request.
type caller int

const (
	clients caller = iota
	peers
	operators
)

// has reports whether a kind of caller has a route.
func (g *Gateway) has(rt *route, from caller) bool {
	switch {
	case rt.job:
		return g.o.Jobs != nil
	case from == peers:
		return rt.endpoint != nil
	}
	return from == clients
}

func (g *Gateway) serve(w http.ResponseWriter, r *http.Request, from caller) {
	x := exchange{g: g, w: w, r: r, from: from, start: time.Now(), rc: *http.NewResponseController(w)}
	// The last request on this connection may have left a deadline.
	x.extendWrite(x.start)
	if r.ContentLength != 0 {
		// Also for a body that nobody reads: net/http reads it before the next request.
		_ = x.rc.SetReadDeadline(x.start.Add(g.o.BodyGrace)) // a recorder in a test has none
	}
	if g.draining.Load() {
		w.Header()["Connection"] = closeConnection
	}
	index, id := g.find(r.URL.Path)
	if index < 0 || !g.has(&routes[index], from) {
		x.identify()
		x.refuse(unknownRoute(r))
		g.metrics.unrouted(http.StatusNotFound)
		return
	}
	switch rt := &routes[index]; {
	case g.removed.Load() && !rt.probe():
		x.identify()
		x.refuse(nodeRemoved())
		g.metrics.unrouted(http.StatusServiceUnavailable)
	case !rt.allows(r.Method):
		x.identify()
		w.Header()["Allow"] = []string{strings.Join(rt.methods, ", ")}
		x.refuse(wrongMethod(r, rt))
		g.metrics.unrouted(http.StatusMethodNotAllowed)
	case rt.endpoint != nil:
		x.infer(rt, index)
	default:
		rt.answer(&x, id)
	}
}

var closeConnection = []string{"close"}

// enter counts a request in flight, unless there are too many. The caller of a true one
// calls leave.
func (g *Gateway) enter() bool {
	if int(g.inFlight.Add(1)) > g.mostInFlight() {
		g.leave()
		return false
	}
	return true
}

// mostInFlight is how many requests there may be at once.
func (g *Gateway) mostInFlight() int {
	limit := g.config().Limits.InFlight
	if g.o.InFlight > 0 {
		limit = min(limit, g.o.InFlight)
	}
	return limit
}

func (g *Gateway) leave() { g.inFlight.Add(-1) }

// config is never nil.
func (g *Gateway) config() *config.Config {
	if c := g.o.Config(); c != nil {
		return c
	}
	return &noConfig
}

var noConfig = config.Config{Limits: config.DefaultLimits()}
