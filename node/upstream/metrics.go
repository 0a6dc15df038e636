package upstream

import (
	"sync"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

// metrics have configured names as labels only, so their number is bounded by the
// configuration.
type metrics struct {
	requests *prometheus.CounterVec
	state    *prometheus.GaugeVec
	inFlight *prometheus.GaugeVec

	mu       sync.Mutex // guards backends
	backends map[string]*backendMetrics
}

func newMetrics(reg prometheus.Registerer) *metrics {
	f := promauto.With(reg)
	return &metrics{
		backends: map[string]*backendMetrics{},
		requests: f.NewCounterVec(prometheus.CounterOpts{
			Name: "dsnode_upstream_requests_total", Help: "Attempts at an upstream (or peer/SITE) by how they ended.",
		}, []string{"upstream", "result"}),
		state: f.NewGaugeVec(prometheus.GaugeOpts{
			Name: "dsnode_breaker_state", Help: "1 for the state that an upstream's breaker is in.",
		}, []string{"upstream", "state"}),
		inFlight: f.NewGaugeVec(prometheus.GaugeOpts{
			Name: "dsnode_upstream_in_flight", Help: "Requests that an upstream (or peer/SITE) is working on.",
		}, []string{"upstream"}),
	}
}

// backendMetrics are the series of one label, looked up once. The instances of one
// upstream, and the nodes of one peer site, share them.
type backendMetrics struct {
	results  [Results]prometheus.Counter
	inFlight prometheus.Gauge
	states   [breakerStates]prometheus.Gauge

	mu         sync.Mutex // guards byInstance, and retired of its keys
	byInstance map[*backend]breakerState
}

func (m *metrics) backend(label string) *backendMetrics {
	m.mu.Lock()
	defer m.mu.Unlock()
	if b := m.backends[label]; b != nil {
		return b
	}
	b := &backendMetrics{byInstance: map[*backend]breakerState{}, inFlight: m.inFlight.WithLabelValues(label)}
	for r := range Results {
		b.results[r] = m.requests.WithLabelValues(label, r.String())
	}
	for s := range breakerStates {
		b.states[s] = m.state.WithLabelValues(label, s.String())
	}
	m.backends[label] = b
	return b
}

// setState notes the state of an instance's breaker; its first call adds the
// instance. The caller holds the instance's lock, so nothing here may take one.
func (m *backendMetrics) setState(b *backend, s breakerState) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !b.retired {
		m.byInstance[b] = s
		m.show()
	}
}

// retire removes an instance that gets no more requests.
func (m *backendMetrics) retire(b *backend) {
	m.mu.Lock()
	defer m.mu.Unlock()
	b.retired = true
	delete(m.byInstance, b)
	m.show()
}

// show sets 1 for the best state of all instances: the upstream is as good as that.
// Without instances no state is set.
func (m *backendMetrics) show() {
	best := breakerStates
	for _, s := range m.byInstance {
		if best == breakerStates || s == breakerClosed || best == breakerOpen {
			best = s
		}
	}
	for s := range breakerStates {
		v := 0.0
		if s == best {
			v = 1
		}
		m.states[s].Set(v)
	}
}

// forget drops a label that left the configuration.
func (m *metrics) forget(label string) {
	m.mu.Lock()
	delete(m.backends, label)
	m.mu.Unlock()
	match := prometheus.Labels{"upstream": label}
	m.requests.DeletePartialMatch(match)
	m.state.DeletePartialMatch(match)
	m.inFlight.DeletePartialMatch(match)
}
