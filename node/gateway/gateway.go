// Package gateway is the clients' door: OpenAI's API over HTTP, in front of a
// serving.Server, and the health endpoints of load balancers. Start reading at
// Gateway.ServeHTTP, the list of routes is in routes.go, and inference.go
// follows one request. Every error is put into words in errors.go.
package gateway

import (
	"errors"
	"log/slog"
	"net/http"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/node/serving"
)

// Auth says who asks. It must answer from local state, at once.
type Auth interface {
	// Authenticate judges a bearer token, empty when none was sent. local is
	// true for a direct connection over loopback. Errors wrap one of
	// agreed.ErrKeyMissing, ErrKeyUnknown, ErrKeyExpired, ErrKeyRevoked (401)
	// or ErrKeyUnknowable (503); any other counts as unknowable.
	Authenticate(token string, local bool) (serving.Principal, error)
}

// ErrKeyUnknowable says that keys can't be judged now, for want of any agreed
// state. It must never look like a wrong key.
var ErrKeyUnknowable = errors.New("API keys can't be checked now")

// Health tells what load balancers ask for.
type Health interface {
	Health() Report
}

// Report is a node's health at one moment.
type Report struct {
	Role   string // "primary", "same-city", "remote"; empty: unknown
	Epoch  uint64 // 0: unknown
	Ready  bool   // some upstream in some site is reachable
	Quorum bool
	Lease  bool // the node holds a valid lease
}

// Options of a gateway. Server, Config, Auth, Health and Registerer are
// required.
type Options struct {
	Server serving.Server
	// Config gives the agreed configuration, nil before there is one. It is
	// called on each request: models, limits.
	Config func() *config.Config
	Auth   Auth
	Health Health
	// Jobs is nil on a node without jobs: then their routes are not there.
	Jobs Jobs
	// Site and Node are this node's names.
	Site, Node string
	Logger     *slog.Logger
	Registerer prometheus.Registerer

	// HoldHeaders is how long a stream waits for content before its headers are
	// sent, and the time between keep-alives after that; 0 means 15 s.
	HoldHeaders time.Duration
	// BodyGrace is what a client has to send a body, plus the time that
	// BodyRate (bytes per second) allows for what has come; 0 means 10 s and
	// 16 KiB/s.
	BodyGrace time.Duration
	BodyRate  int
	// BodyMemory bounds the bytes of all bodies held at once; 0 means 512 MiB.
	BodyMemory int64
	// WriteTimeout bounds each write to a client; 0 means 30 s.
	WriteTimeout time.Duration
}

// Gateway is the clients' door, an http.Handler.
type Gateway struct {
	o        Options
	log      *slog.Logger
	metrics  *metrics
	born     time.Time
	draining atomic.Bool
	inFlight atomic.Int64
	held     atomic.Int64 // bytes of bodies
	site     []string     // header values, shared by all answers
	node     []string
	byPath   map[string]int // index into routes
}

// New makes a gateway.
func New(o Options) *Gateway {
	orDuration := func(d *time.Duration, v time.Duration) {
		if *d <= 0 {
			*d = v
		}
	}
	orDuration(&o.HoldHeaders, 15*time.Second)
	orDuration(&o.BodyGrace, 10*time.Second)
	orDuration(&o.WriteTimeout, 30*time.Second)
	if o.BodyRate <= 0 {
		o.BodyRate = 16 << 10
	}
	if o.BodyMemory <= 0 {
		o.BodyMemory = 512 << 20
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	g := &Gateway{
		o: o, log: o.Logger, born: time.Now(), site: []string{o.Site}, node: []string{o.Node},
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

// Drain turns readiness off and asks clients to use other connections. The
// owner then waits and shuts the http.Server down.
func (g *Gateway) Drain() { g.draining.Store(true) }

// Resume undoes Drain.
func (g *Gateway) Resume() { g.draining.Store(false) }

// ServeHTTP answers clients.
func (g *Gateway) ServeHTTP(w http.ResponseWriter, r *http.Request) { g.serve(w, r, clients) }

// PeerHandler answers the same requests for nodes of other sites, over the
// mesh: the principal comes with the request, who asks was proven by mutual
// TLS. A 200 waits for content however long it takes, because the asking node
// keeps its own client company, and errors carry their code in X-Dsnode-Error.
func (g *Gateway) PeerHandler() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { g.serve(w, r, peers) })
}

// OperatorHandler answers the job routes for operators: who asks was proven at
// the admin port, whose /admin was taken off the path.
func (g *Gateway) OperatorHandler() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { g.serve(w, r, operators) })
}

// door says who stands before it.
type door int

const (
	clients door = iota
	peers
	operators
)

// opens reports whether a route is there for who stands at a door.
func (g *Gateway) opens(rt *route, d door) bool {
	switch {
	case rt.job:
		return g.o.Jobs != nil
	case d == peers:
		return rt.endpoint != nil
	}
	return d == clients
}

func (g *Gateway) serve(w http.ResponseWriter, r *http.Request, d door) {
	x := exchange{g: g, w: w, r: r, door: d, start: time.Now(), rc: *http.NewResponseController(w)}
	// A deadline of the request before on this connection may still stand.
	x.extendWrite(x.start)
	if g.draining.Load() {
		w.Header()["Connection"] = closeConnection
	}
	index, id := g.find(r.URL.Path)
	if index < 0 || !g.opens(&routes[index], d) {
		x.identify()
		x.refuse(unknownRoute(r))
		g.metrics.unrouted(http.StatusNotFound)
		return
	}
	switch rt := &routes[index]; {
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

// config is never nil.
func (g *Gateway) config() *config.Config {
	if c := g.o.Config(); c != nil {
		return c
	}
	return &noConfig
}

var noConfig = config.Config{Limits: config.DefaultLimits()}
