package gateway

import (
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/dsnode/dsnode/cluster/config"
)

type shedReason int

const (
	shedInFlight shedReason = iota
	shedMemory
	shedConnections
	shedTenant
	shedReasons
)

var shedNames = [shedReasons]string{"in_flight", "body_memory", "connections", "tenant_share"}

type metrics struct {
	requests *prometheus.CounterVec
	duration *prometheus.HistogramVec
	shed     [shedReasons]prometheus.Counter

	current atomic.Pointer[modelTable]
	mu      sync.Mutex // makes one table at a time
}

func newMetrics(reg prometheus.Registerer, inFlight func() float64) *metrics {
	f := promauto.With(reg)
	m := &metrics{
		requests: f.NewCounterVec(prometheus.CounterOpts{
			Name: "dsnode_requests_total",
			Help: "Client requests by what came of them. A stream that failed on its way counts with the failure's code, a client that left as 499.",
		}, []string{"endpoint", "model", "variant", "code"}),
		duration: f.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "dsnode_request_duration_seconds",
			Help:    "From a request's arrival to the end of its answer.",
			Buckets: []float64{.005, .01, .025, .05, .1, .2, .5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600},
		}, []string{"endpoint", "model"}),
	}
	f.NewGaugeFunc(prometheus.GaugeOpts{Name: "dsnode_requests_in_flight", Help: "Requests for a model being answered."}, inFlight)
	shed := f.NewCounterVec(prometheus.CounterOpts{
		Name: "dsnode_requests_shed_total", Help: "Requests and connections refused because a limit of this node was reached.",
	}, []string{"reason"})
	for i, name := range shedNames {
		m.shed[i] = shed.WithLabelValues(name)
	}
	return m
}

// modelTable holds the metric handles of the configured models: a request looks them up
// once, and makes no labels.
type modelTable struct {
	of      *config.Config
	byName  map[string]*modelMetrics
	unknown *modelMetrics
}

// modelMetrics are the handles of one model, one for each route, made when
// first needed.
type modelMetrics struct {
	name    string
	byRoute []atomic.Pointer[series]
}

type series struct {
	ok       prometheus.Counter
	duration prometheus.Observer
}

func newModelMetrics(name string) *modelMetrics {
	return &modelMetrics{name: name, byRoute: make([]atomic.Pointer[series], len(routes))}
}

// table returns the handles for a configuration. It makes them anew when the
// configuration has changed.
func (m *metrics) table(cfg *config.Config) *modelTable {
	if t := m.current.Load(); t != nil && t.of == cfg {
		return t
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if t := m.current.Load(); t != nil && t.of == cfg {
		return t
	}
	t := &modelTable{of: cfg, byName: make(map[string]*modelMetrics, len(cfg.Models)), unknown: newModelMetrics("unknown")}
	for name := range cfg.Models {
		t.byName[name] = newModelMetrics(name)
	}
	m.current.Store(t)
	return t
}

// done counts an answered request.
func (m *metrics) done(model *modelMetrics, index, status int, start time.Time) {
	s := model.byRoute[index].Load()
	if s == nil {
		s = &series{
			ok:       m.requests.WithLabelValues(routes[index].endpoint.Path, model.name, "", "200"),
			duration: m.duration.WithLabelValues(routes[index].endpoint.Path, model.name),
		}
		model.byRoute[index].Store(s) // twice at worst, with the same handles
	}
	if status == http.StatusOK {
		s.ok.Inc()
	} else {
		m.requests.WithLabelValues(routes[index].endpoint.Path, model.name, "", strconv.Itoa(status)).Inc()
	}
	s.duration.Observe(time.Since(start).Seconds())
}

// unrouted counts a request without a route.
func (m *metrics) unrouted(status int) {
	m.requests.WithLabelValues("none", "unknown", "", strconv.Itoa(status)).Inc()
}
