package cache

import (
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/dsnode/dsnode/cluster/config"
)

// Result is the result of a lookup in a tier.
type Result int

// The results. Those of the tier "none" are of requests that asked no tier, or shared
// the answer of another request.
const (
	LocalHit Result = iota
	LocalMiss
	LocalStale
	SharedHit
	SharedMiss
	SharedStale
	SharedError   // an error or a timeout
	SharedSkipped // the breaker is open, or too many lookups wait
	SharedDamaged // the entry can't be opened
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

// dropReason is why an answer was not kept, or not sent to peers.
type dropReason int

const (
	dropTooLarge dropReason = iota
	dropQueueFull
	dropWriteFailed
	dropOutboundFull
	dropReasons
)

var dropNames = [dropReasons]string{
	dropTooLarge: "too_large", dropQueueFull: "queue_full", dropWriteFailed: "write_failed", dropOutboundFull: "outbound_full",
}

// counts are counters since the start of the process, for metrics and Stats.
type counts struct {
	results  [results]atomic.Uint64
	dropped  [dropReasons]atomic.Uint64
	kept     atomic.Uint64
	absorbed atomic.Uint64
	rebuilds atomic.Uint64 // files of the embedded tier that were damaged
}

func (c *Cache) register(reg prometheus.Registerer) {
	f := promauto.With(reg)
	counter := func(name, help string, labels prometheus.Labels, n *atomic.Uint64) {
		f.NewCounterFunc(prometheus.CounterOpts{Name: name, Help: help, ConstLabels: labels}, func() float64 { return float64(n.Load()) })
	}
	for r, names := range resultNames {
		counter("dsnode_cache_requests_total", "Lookups in a tier of the cache by result; tier none: requests that asked no tier.",
			prometheus.Labels{"tier": names[0], "result": names[1]}, &c.counts.results[r])
	}
	for l, name := range dropNames {
		counter("dsnode_cache_dropped_total", "Answers that were not kept, or not sent to peers, by reason.",
			prometheus.Labels{"reason": name}, &c.counts.dropped[l])
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
	gauge("dsnode_cache_bytes", "About how many bytes the tier in memory takes.", prometheus.Labels{"tier": "local"}, func() float64 {
		_, n := c.local.size()
		return float64(n)
	})
	gauge("dsnode_cache_shared_up", "1 while the shared tier is used, 0 while it is not open or its breaker is.", nil, func() float64 {
		if s := c.shared.Load(); s != nil && !s.reads.isOpen() {
			return 1
		}
		return 0
	})
}

// Note counts a result that only the caller knows.
func (c *Cache) Note(r Result) { c.counts.results[r].Add(1) }

// TierStats describes one tier.
type TierStats struct {
	Kind string // "memory", "embedded", "redis" or "off"
	// State is "ok", "opening", "resting" (its breaker is open), "read-only" or "off".
	State   string
	Reason  string // why the state is not ok, if known
	Entries *int64 // nil: unknown
	Bytes   *int64 // nil: unknown
	Max     int64  // bound of Bytes; 0: the cache sets none
}

// Stats are the cache's state, and its counters since the start of the process.
type Stats struct {
	Local, Shared TierStats
	// Requests are lookups by tier and result.
	Requests map[string]map[string]uint64
	Stored   uint64
	Absorbed uint64
	Dropped  map[string]uint64
	Rebuilds uint64
	Purges   uint64 // agreed on so far
}

// Stats gives the cache's current figures.
func (c *Cache) Stats() Stats {
	entries, bytes := c.local.size()
	n := int64(entries)
	st := Stats{
		Local:    TierStats{Kind: "memory", State: "ok", Entries: &n, Bytes: &bytes, Max: int64(c.local.held.GetMaximum())}, //nolint:gosec // checked by the configuration
		Requests: map[string]map[string]uint64{}, Dropped: map[string]uint64{},
		Stored: c.counts.kept.Load(), Absorbed: c.counts.absorbed.Load(), Rebuilds: c.counts.rebuilds.Load(),
		Purges: c.o.Purges().Count,
	}
	for r, names := range resultNames {
		if st.Requests[names[0]] == nil {
			st.Requests[names[0]] = map[string]uint64{}
		}
		st.Requests[names[0]][names[1]] = c.counts.results[r].Load()
	}
	for l, name := range dropNames {
		st.Dropped[name] = c.counts.dropped[l].Load()
	}
	want, s := c.want(), c.shared.Load()
	st.Shared = TierStats{Kind: string(want.site.Shared), State: "ok"}
	switch {
	case want.site.Shared == "" || want.site.Shared == config.SharedOff:
		st.Shared.Kind, st.Shared.State = "off", "off"
	case s == nil:
		st.Shared.State = "opening"
		if why := c.tierError.Load(); why != nil {
			st.Shared.Reason = *why
		}
	case s.reads.isOpen():
		st.Shared.State, st.Shared.Reason = "resting", s.reads.reason()
	default:
		if s.writes.isOpen() {
			st.Shared.State, st.Shared.Reason = "read-only", s.writes.reason()
		}
		if entries, bytes, known := s.store.size(); known {
			st.Shared.Entries, st.Shared.Bytes = &entries, &bytes
		}
	}
	if want.site.Shared == config.SharedEmbedded {
		st.Shared.Max = want.bytes
	}
	return st
}
