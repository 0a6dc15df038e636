package jobtable

import "github.com/prometheus/client_golang/prometheus"

type metrics struct {
	commit     prometheus.Histogram
	rows       prometheus.Counter
	pending    prometheus.Gauge
	forgotten  *prometheus.CounterVec
	unreadable prometheus.Counter
	resealed   prometheus.Counter
	failures   prometheus.Counter
	rebuilds   prometheus.Counter
}

func newMetrics() *metrics {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: "dsnode_job_table_" + name, Help: help})
	}
	return &metrics{
		commit: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "dsnode_job_table_commit_seconds",
			Help: "Time to write and sync one batch of changed rows.",
			// 0.5 ms to 8 s.
			Buckets: prometheus.ExponentialBuckets(0.0005, 2, 15),
		}),
		rows: counter("rows_written_total", "Rows written to the job table; a row changed twice between two commits counts once."),
		pending: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "dsnode_job_table_pending_bytes",
			Help: "Changed rows in memory that are not yet in the table's file. The journals have them.",
		}),
		forgotten: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "dsnode_job_table_forgotten_total",
			Help: "Removals, by what was removed: a job's content after its retention, its id later, or records whose submission never arrived.",
		}, []string{"what"}),
		unreadable: counter("unreadable_total", "Submissions that could not be opened: until they can, their jobs are in no list of a tenant."),
		resealed:   counter("resealed_total", "Rows re-sealed with the current key."),
		failures:   counter("failures_total", "Failed commits. The first one stops the node."),
		rebuilds:   counter("rebuilds_total", "How often the table's file was damaged and replaced by an empty one, which is filled from the journals and from other nodes."),
	}
}

// register registers the metrics, unless reg is nil.
func (m *metrics) register(reg prometheus.Registerer) {
	if reg != nil {
		reg.MustRegister(m.commit, m.rows, m.pending, m.forgotten, m.unreadable, m.resealed, m.failures, m.rebuilds)
	}
}
