package journal

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

type metrics struct {
	own      written
	copies   written
	fsync    prometheus.Histogram
	batch    prometheus.Histogram
	failures prometheus.Counter
	damaged  prometheus.Counter
	refused  prometheus.Counter
	diverged prometheus.Counter
	ahead    prometheus.Counter
}

// written counts what was made durable, of own streams or of copies.
type written struct{ records, bytes prometheus.Counter }

func newMetrics(reg prometheus.Registerer, l *Log) *metrics {
	f := promauto.With(reg)
	records := f.NewCounterVec(prometheus.CounterOpts{
		Name: "dsnode_journal_records_total",
		Help: "Records made durable: own ones, and copies of other nodes'.",
	}, []string{"origin"})
	bytes := f.NewCounterVec(prometheus.CounterOpts{
		Name: "dsnode_journal_written_bytes_total",
		Help: "Bytes made durable, of own records and of copies.",
	}, []string{"origin"})
	counter := func(name, help string) prometheus.Counter {
		return f.NewCounter(prometheus.CounterOpts{Name: "dsnode_journal_" + name, Help: help})
	}
	m := &metrics{
		own:    written{records.WithLabelValues("own"), bytes.WithLabelValues("own")},
		copies: written{records.WithLabelValues("copy"), bytes.WithLabelValues("copy")},
		fsync: f.NewHistogram(prometheus.HistogramOpts{
			Name: "dsnode_journal_fsync_seconds",
			Help: "Time to write and sync one batch of records.",
			// 0.1 ms (a disk with a battery-backed cache) to 3.3 s (a disk that hangs).
			Buckets: prometheus.ExponentialBuckets(0.0001, 2, 16),
		}),
		batch: f.NewHistogram(prometheus.HistogramOpts{
			Name:    "dsnode_journal_batch_records",
			Help:    "Records that shared one sync.",
			Buckets: prometheus.ExponentialBuckets(1, 4, 7),
		}),
		failures: counter("failures_total", "Writes and syncs that failed. The first one stops the node."),
		damaged:  counter("damaged_total", "Streams found damaged."),
		refused:  counter("full_total", "Appends refused because the disk has less free space than the floor."),
		diverged: counter("diverged_total", "Records received that differ from the ones held in the same place."),
		ahead:    counter("clock_ahead_total", "Batches received with a clock too far ahead of this node's to follow it."),
	}
	gauge := func(name, help string, value func() int64) {
		f.NewGaugeFunc(prometheus.GaugeOpts{Name: "dsnode_journal_" + name, Help: help}, func() float64 { return float64(value()) })
	}
	gauge("bytes", "Bytes of all segments on the disk.", l.bytes.Load)
	gauge("segments", "Segments on the disk.", l.segments.Load)
	gauge("streams", "Streams held: own ones, and copies.", func() int64 { return int64(l.streamCount()) })
	return m
}
