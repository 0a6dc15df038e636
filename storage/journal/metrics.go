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
		failures: f.NewCounter(prometheus.CounterOpts{
			Name: "dsnode_journal_failures_total",
			Help: "Writes and syncs that failed. The first one stops the node.",
		}),
		damaged: f.NewCounter(prometheus.CounterOpts{
			Name: "dsnode_journal_damaged_total",
			Help: "Streams found damaged.",
		}),
		refused: f.NewCounter(prometheus.CounterOpts{
			Name: "dsnode_journal_full_total",
			Help: "Appends refused because the disk has less free space than the floor.",
		}),
		diverged: f.NewCounter(prometheus.CounterOpts{
			Name: "dsnode_journal_diverged_total",
			Help: "Records received that differ from the ones held in the same place.",
		}),
		ahead: f.NewCounter(prometheus.CounterOpts{
			Name: "dsnode_journal_clock_ahead_total",
			Help: "Batches received with a clock too far ahead of this node's to follow it.",
		}),
	}
	f.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "dsnode_journal_bytes",
		Help: "Bytes of all segments on the disk.",
	}, func() float64 { return float64(l.bytes.Load()) })
	f.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "dsnode_journal_segments",
		Help: "Segments on the disk.",
	}, func() float64 { return float64(l.segments.Load()) })
	f.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "dsnode_journal_streams",
		Help: "Streams held: own ones, and copies.",
	}, func() float64 { return float64(l.streamCount()) })
	return m
}
