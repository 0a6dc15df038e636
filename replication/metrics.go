package replication

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

type metrics struct {
	sent, received       prometheus.Counter
	breaks, refused      prometheus.Counter
	snapshots, skipped   prometheus.Counter
	compared, uncompared prometheus.Counter
	diverged             prometheus.Counter
	fed, feedDropped     prometheus.Counter
	keyWaits             prometheus.Gauge
}

func newMetrics(reg prometheus.Registerer, r *Replication) *metrics {
	f := promauto.With(reg)
	counter := func(name, help string) prometheus.Counter {
		return f.NewCounter(prometheus.CounterOpts{Name: "dsnode_replication_" + name, Help: help})
	}
	reg.MustRegister(&lagCollector{r: r})
	return &metrics{
		sent:        counter("sent_bytes_total", "Bytes of records and rows sent to peers."),
		received:    counter("received_bytes_total", "Bytes of peers' records made durable here."),
		breaks:      counter("breaks_total", "Pull calls to a peer that broke or failed."),
		refused:     counter("refused_streams_total", "Streams of peers that can't be stored: a different record is in its place, or there are too many streams."),
		snapshots:   counter("snapshots_total", "Table snapshots sent to peers that lack records which are trimmed here."),
		skipped:     counter("skipped_streams_total", "Streams that resumed after records that arrived as rows of a peer's table."),
		compared:    counter("comparisons_total", "Comparisons of the table with a peer's."),
		uncompared:  counter("comparisons_missed_total", "Comparisons with a peer that found no moment at which both tables had applied the same records."),
		diverged:    counter("diverged_buckets_total", "Buckets that differed between two tables with the same applied records; their rows were merged."),
		fed:         counter("feed_sent_bytes_total", "Bytes of the feed sent to peers."),
		feedDropped: counter("feed_dropped_total", "Items of the feed dropped because a peer received them too slowly."),
		keyWaits: f.NewGauge(prometheus.GaugeOpts{
			Name: "dsnode_replication_key_waits",
			Help: "Streams that wait because their next record is sealed with a key that this node does not have.",
		}),
	}
}

// lagCollector reports the present values; it omits unknown ones.
type lagCollector struct{ r *Replication }

var (
	lagDesc = prometheus.NewDesc("dsnode_replication_lag_seconds",
		"Age of this node's copy of a site's journals: how long ago the site is known to have had no more records.",
		[]string{"origin_site", "peer_site"}, nil)
	behindDesc = prometheus.NewDesc("dsnode_replication_records_behind",
		"Records of a site that this node is known to lack.",
		[]string{"origin_site", "peer_site"}, nil)
)

func (c *lagCollector) Describe(ch chan<- *prometheus.Desc) { ch <- lagDesc; ch <- behindDesc }

func (c *lagCollector) Collect(ch chan<- prometheus.Metric) {
	for _, site := range c.r.originSites() {
		if lag, ok := c.r.Lag(site); ok {
			ch <- prometheus.MustNewConstMetric(lagDesc, prometheus.GaugeValue, lag, site, c.r.opts.Site)
		}
		if n, ok := c.r.Behind(site); ok {
			ch <- prometheus.MustNewConstMetric(behindDesc, prometheus.GaugeValue, float64(n), site, c.r.opts.Site)
		}
	}
}
