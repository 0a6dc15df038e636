package failover

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

type metrics struct {
	duration  *prometheus.HistogramVec
	decisions *prometheus.CounterVec
	moves     *prometheus.CounterVec
}

func newMetrics(reg prometheus.Registerer) *metrics {
	f := promauto.With(reg)
	return &metrics{
		duration: f.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "dsnode_failover_duration_seconds",
			Help:    "Time without a primary: from when the old one was last heard, or from the announcement, until the new one acts.",
			Buckets: []float64{0.05, 0.1, 0.25, 0.5, 1, 2, 3, 4, 5, 7, 10, 20, 40, 60, 120, 300, 900},
		}, []string{"kind"}),
		decisions: f.NewCounterVec(prometheus.CounterOpts{
			Name: "dsnode_failover_decisions_total",
			Help: "Changes of the decision about the primary, on the raft leader.",
		}, []string{"reason"}),
		moves: f.NewCounterVec(prometheus.CounterOpts{
			Name: "dsnode_failover_leader_moves_total",
			Help: "Attempts to move the raft leadership to the primary site.",
		}, []string{"result"}),
	}
}
