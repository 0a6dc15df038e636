package drill

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/dsnode/dsnode/cluster/agreed"
)

// Metrics gives the time at which the last drill passed. It comes from the agreed state,
// so every node gives the same. The metric is absent while no drill has passed.
type Metrics struct{ State func() *agreed.State }

var lastSuccess = prometheus.NewDesc("dsnode_drill_last_success_timestamp_seconds", "When the last drill that passed ended.", nil, nil)

// Describe implements prometheus.Collector.
func (m Metrics) Describe(to chan<- *prometheus.Desc) { to <- lastSuccess }

// Collect implements prometheus.Collector.
func (m Metrics) Collect(to chan<- prometheus.Metric) {
	var last time.Time
	for _, d := range m.State().Drills {
		if d.Verdict == string(Pass) && d.EndedAt.After(last) {
			last = d.EndedAt
		}
	}
	if !last.IsZero() {
		to <- prometheus.MustNewConstMetric(lastSuccess, prometheus.GaugeValue, float64(last.UnixMilli())/1000)
	}
}
