package serving

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

// metrics have configured model names as labels only, so their number is bounded by
// the configuration.
type metrics struct {
	retries    *prometheus.CounterVec
	tokens     *prometheus.CounterVec
	firstToken prometheus.Histogram
	perToken   prometheus.Histogram
}

func newMetrics(reg prometheus.Registerer) *metrics {
	f := promauto.With(reg)
	return &metrics{
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
