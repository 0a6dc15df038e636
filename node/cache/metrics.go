package cache

import (
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

// Result says what came of looking into a tier.
type Result int

// The results; those of the tier "none" are of requests that were answered
// without any, or together with another.
const (
	LocalHit Result = iota
	LocalMiss
	LocalStale
	SharedHit
	SharedMiss
	SharedStale
	SharedError   // failed, or gave no answer in time
	SharedSkipped // it rests, or too many wait for it
	SharedDamaged // what it gave does not open under that key
	Coalesced
	Bypass
	results
)

var resultNames = [results][2]string{
	LocalHit: {"local", "hit"}, LocalMiss: {"local", "miss"}, LocalStale: {"local", "stale"},
	SharedHit: {"shared", "hit"}, SharedMiss: {"shared", "miss"}, SharedStale: {"shared", "stale"},
	SharedError: {"shared", "error"}, SharedSkipped: {"shared", "skipped"}, SharedDamaged: {"shared", "damaged"},
	Coalesced: {"none", "coalesced"}, Bypass: {"none", "bypass"},
}

// loss says why an answer was not kept, or not passed on.
type loss int

const (
	lostLarge loss = iota
	lostQueue
	lostWrite
	lostOutbound
	losses
)

var lossNames = [losses]string{lostLarge: "too_large", lostQueue: "queue_full", lostWrite: "write_failed", lostOutbound: "outbound_full"}

// counts are the cache's own figures; the metrics read them.
type counts struct {
	results  [results]atomic.Uint64
	lost     [losses]atomic.Uint64
	kept     atomic.Uint64
	absorbed atomic.Uint64
	rebuilds atomic.Uint64
}

func (c *Cache) register(reg prometheus.Registerer) {
	f := promauto.With(reg)
	counter := func(name, help string, labels prometheus.Labels, n *atomic.Uint64) {
		f.NewCounterFunc(prometheus.CounterOpts{Name: name, Help: help, ConstLabels: labels}, func() float64 { return float64(n.Load()) })
	}
	for r, names := range resultNames {
		counter("dsnode_cache_requests_total", "Looks into a tier of the cache by what came of them; tier none: requests that needed none.",
			prometheus.Labels{"tier": names[0], "result": names[1]}, &c.counts.results[r])
	}
	for l, name := range lossNames {
		counter("dsnode_cache_dropped_total", "Answers that were not kept, or not passed on, by why.",
			prometheus.Labels{"reason": name}, &c.counts.lost[l])
	}
	counter("dsnode_cache_stored_total", "Answers that were kept.", prometheus.Labels{"from": "upstream"}, &c.counts.kept)
	counter("dsnode_cache_stored_total", "Answers that were kept.", prometheus.Labels{"from": "peer"}, &c.counts.absorbed)
	counter("dsnode_cache_rebuilds_total", "Files of the embedded tier that were damaged and dropped with their answers.", nil, &c.counts.rebuilds)
	gauge := func(name, help string, labels prometheus.Labels, v func() float64) {
		f.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help, ConstLabels: labels}, v)
	}
	gauge("dsnode_cache_entries", "Answers in the tier in memory.", prometheus.Labels{"tier": "local"}, func() float64 {
		n, _ := c.local.size()
		return float64(n)
	})
	gauge("dsnode_cache_bytes", "What the tier in memory takes, about.", prometheus.Labels{"tier": "local"}, func() float64 {
		_, n := c.local.size()
		return float64(n)
	})
	gauge("dsnode_cache_shared_up", "1 while the shared tier is asked, 0 while it is not open or rests after failures.", nil, func() float64 {
		if s := c.shared.Load(); s != nil && !s.reads.resting() {
			return 1
		}
		return 0
	})
}

// Note counts what came of a request that the cache itself did not see through.
func (c *Cache) Note(r Result) { c.counts.results[r].Add(1) }
