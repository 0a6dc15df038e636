package serving

import (
	"sync"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

// metrics are the contract's that arise here. Labels are configured names
// only, so their number is bounded by the configuration.
type metrics struct {
	requests   *prometheus.CounterVec
	state      *prometheus.GaugeVec
	inFlight   *prometheus.GaugeVec
	retries    *prometheus.CounterVec
	tokens     *prometheus.CounterVec
	firstToken prometheus.Histogram
	perToken   prometheus.Histogram

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
		retries: f.NewCounterVec(prometheus.CounterOpts{
			Name: "dsnode_upstream_retries_total", Help: "Further attempts: free ones (the failed upstream is known to be down), budgeted ones, and those the budget refused.",
		}, []string{"kind"}),
		tokens: f.NewCounterVec(prometheus.CounterOpts{
			Name: "dsnode_tokens_total", Help: "Tokens as the own site's upstreams counted them.",
		}, []string{"model", "direction"}),
		firstToken: f.NewHistogram(prometheus.HistogramOpts{
			Name: "dsnode_time_to_first_token_seconds", Help: "From a stream's request to its first content, failover included.",
			Buckets: []float64{0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120},
		}),
		perToken: f.NewHistogram(prometheus.HistogramOpts{
			Name: "dsnode_time_per_output_token_seconds", Help: "Mean time between a stream's output tokens, by the upstream's own count.",
			Buckets: []float64{0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1},
		}),
	}
}

// backendMetrics are one label's series, looked up once. The instances of one
// upstream, and the nodes of one peer site, share them.
type backendMetrics struct {
	results  [results]prometheus.Counter
	inFlight prometheus.Gauge
	states   [breakerStates]prometheus.Gauge

	mu     sync.Mutex // guards stands, and retired of who stands there
	stands map[*backend]breakerState
}

func (m *metrics) backend(label string) *backendMetrics {
	m.mu.Lock()
	defer m.mu.Unlock()
	if b := m.backends[label]; b != nil {
		return b
	}
	b := &backendMetrics{stands: map[*backend]breakerState{}, inFlight: m.inFlight.WithLabelValues(label)}
	for r := range results {
		b.results[r] = m.requests.WithLabelValues(label, r.String())
	}
	for s := range breakerStates {
		b.states[s] = m.state.WithLabelValues(label, s.String())
	}
	m.backends[label] = b
	return b
}

// stand notes where an instance's breaker stands; the first time it comes in.
// The caller holds the instance's lock, so nothing here may ask for one.
func (m *backendMetrics) stand(b *backend, at breakerState) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, known := m.stands[b]; known || !b.retired {
		m.stands[b] = at
		m.show()
	}
}

// retire takes an instance out that gets no more requests.
func (m *backendMetrics) retire(b *backend) {
	m.mu.Lock()
	defer m.mu.Unlock()
	b.retired = true
	delete(m.stands, b)
	m.show()
}

// show sets 1 for the best state that any instance is in: the upstream is as
// good as that. Without any instance it is in none.
func (m *backendMetrics) show() {
	best := breakerStates
	for _, at := range m.stands {
		if best == breakerStates || at == breakerClosed || best == breakerOpen {
			best = at
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
