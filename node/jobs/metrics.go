package jobs

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/dsnode/dsnode/storage/journal"
)

type metrics struct {
	submit    prometheus.Histogram
	durable   *prometheus.HistogramVec
	wait      prometheus.Histogram
	attempts  *prometheus.CounterVec
	late      prometheus.Counter
	refused   *prometheus.CounterVec
	unsettled *prometheus.CounterVec
}

var statuses = [...]journal.Status{
	journal.Queued, journal.Running, journal.Succeeded, journal.Failed, journal.Cancelled, journal.Expired,
}

func newMetrics(reg prometheus.Registerer, j *Jobs) *metrics {
	f := promauto.With(reg)
	if reg != nil {
		reg.MustRegister(&jobsCollector{j, prometheus.NewDesc("dsnode_jobs", "Jobs of all nodes, as this node knows them.", []string{"status"}, nil)})
	}
	return &metrics{
		submit: f.NewHistogram(prometheus.HistogramOpts{
			Name: "dsnode_job_submit_seconds", Help: "Time from a parsed submission to its answer.",
			Buckets: prometheus.ExponentialBuckets(0.00025, 2, 14),
		}),
		durable: f.NewHistogramVec(prometheus.HistogramOpts{
			Name: "dsnode_job_durability_seconds", Help: "How long a submission on this node's disk waited for the disks of other nodes.",
			Buckets: prometheus.ExponentialBuckets(0.00025, 2, 14),
		}, []string{"durability"}),
		wait: f.NewHistogram(prometheus.HistogramOpts{
			Name: "dsnode_job_wait_seconds", Help: "Time from a job's acceptance to its first start.",
			Buckets: []float64{.005, .02, .1, .5, 1, 5, 30, 60, 300, 1800, 7200, 43200, 86400},
		}),
		attempts: f.NewCounterVec(prometheus.CounterOpts{
			Name: "dsnode_job_attempts_total", Help: "Attempts that this node began, by result.",
		}, []string{"result"}),
		late: f.NewCounter(prometheus.CounterOpts{
			Name: "dsnode_job_late_starts_total", Help: "Attempts that started without a permit, or too long after it. Their results are not used.",
		}),
		refused: f.NewCounterVec(prometheus.CounterOpts{
			Name: "dsnode_jobs_refused_total", Help: "Submissions refused with 503 or, for a tenant's share, 429.",
		}, []string{"reason"}),
		unsettled: f.NewCounterVec(prometheus.CounterOpts{
			Name: "dsnode_job_durability_timeouts_total", Help: "Submissions that did not reach the requested durability within 2 s.",
		}, []string{"durability"}),
	}
}

// jobsCollector collects dsnode_jobs from the table. The metric is absent until the counts
// are known.
type jobsCollector struct {
	jobs *Jobs
	desc *prometheus.Desc
}

// Describe implements prometheus.Collector.
func (c *jobsCollector) Describe(ch chan<- *prometheus.Desc) { ch <- c.desc }

// Collect implements prometheus.Collector.
func (c *jobsCollector) Collect(ch chan<- prometheus.Metric) {
	if !c.jobs.ready.Load() {
		return
	}
	n := c.jobs.o.Table.Counts()
	for _, s := range statuses {
		ch <- prometheus.MustNewConstMetric(c.desc, prometheus.GaugeValue, float64(n[s]), string(s))
	}
}
