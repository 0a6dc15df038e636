package storage

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

// Metrics are shared by all stores of one node.
type Metrics struct {
	fsync    *prometheus.HistogramVec
	failures *prometheus.CounterVec
	damaged  *prometheus.CounterVec
}

// NewMetrics registers the metrics; call it once per node.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	f := promauto.With(reg)
	return &Metrics{
		fsync: f.NewHistogramVec(prometheus.HistogramOpts{
			Name: "dsnode_storage_fsync_seconds",
			Help: "Time to write and sync one transaction or file, by store.",
			// 0.1 ms (a disk with a battery-backed cache) to 3.3 s (a disk that hangs).
			Buckets: prometheus.ExponentialBuckets(0.0001, 2, 16),
		}, []string{"store"}),
		failures: f.NewCounterVec(prometheus.CounterOpts{
			Name: "dsnode_storage_failures_total",
			Help: "Writes and syncs that failed, by store. The first one of the raft store stops the node.",
		}, []string{"store"}),
		damaged: f.NewCounterVec(prometheus.CounterOpts{
			Name: "dsnode_storage_damaged_total",
			Help: "Damaged records and files found, by store.",
		}, []string{"store"}),
	}
}

// storeMetrics are the metrics of one store.
type storeMetrics struct {
	fsync    prometheus.Observer
	failures prometheus.Counter
	damaged  prometheus.Counter
}

func (m *Metrics) of(store string) storeMetrics {
	return storeMetrics{
		fsync:    m.fsync.WithLabelValues(store),
		failures: m.failures.WithLabelValues(store),
		damaged:  m.damaged.WithLabelValues(store),
	}
}
