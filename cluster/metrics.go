package cluster

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
)

type metrics struct {
	pingFailures  prometheus.Counter
	largeFailures prometheus.Counter
	pingSeconds   prometheus.Histogram
	joins         *prometheus.CounterVec
	outsiders     prometheus.Counter
	rpcs          *prometheus.CounterVec
	rpcSeconds    *prometheus.HistogramVec
}

func newMetrics(reg prometheus.Registerer, c *Cluster) *metrics {
	f := promauto.With(reg)
	gauge := func(name, help string, value func() float64) {
		f.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, value)
	}
	flag := func(name, help string, value func() bool) {
		gauge(name, help, func() float64 {
			if value() {
				return 1
			}
			return 0
		})
	}
	flag("dsnode_quorum", "1 while a quorum was alive within the lease's length.", func() bool { ok, _ := c.lease.quorum(); return ok })
	gauge("dsnode_epoch", "Counter of the changes of the primary site.", func() float64 { return float64(c.State().Primary.Epoch) })
	gauge("dsnode_generation", "Counter of the recoveries by an operator.", func() float64 { return float64(c.State().Generation.Number) })
	gauge("dsnode_feature_level", "Agreed feature level.", func() float64 { return float64(c.State().FeatureLevel) })
	gauge("dsnode_agreed_state_bytes", "Size of the agreed state as in a snapshot.", func() float64 { return float64(c.StateBytes()) })
	gauge("dsnode_raft_term", "Raft term.", func() float64 { return float64(c.Raft().Term) })
	gauge("dsnode_raft_commit_index", "Index of the newest committed raft entry.", func() float64 { return float64(c.Raft().CommitIndex) })
	gauge("dsnode_raft_applied_index", "Index of the newest applied raft entry.", func() float64 { return float64(c.fsm.applied.Load()) })
	flag("dsnode_raft_leader", "1 while this node leads raft.", func() bool { return c.Raft().Leads })
	flag("dsnode_disk_slow", "1 while this node's disk is too slow for raft's leader.", func() bool { return c.disk.speed().SlowFor > 0 })
	gauge("dsnode_loop_pause_seconds", "Longest recent time for which this process did not run.", func() float64 { return c.pauses.longest().Seconds() })
	gauge("dsnode_nodes_waiting", "Nodes that asked to join and wait for an operator.", func() float64 { return float64(len(waiting(c.State()))) })
	reg.MustRegister(&trafficCollector{c: c, desc: prometheus.NewDesc("dsnode_peer_traffic_age_seconds",
		"How long ago traffic of a kind last went through between this node and a peer.", []string{"peer", "kind"}, nil)})
	reg.MustRegister(&primaryCollector{c: c, desc: prometheus.NewDesc("dsnode_primary", "1 for the primary site.", []string{"site"}, nil)})
	return &metrics{
		joins: f.NewCounterVec(prometheus.CounterOpts{
			Name: "dsnode_node_joins_total", Help: "Nodes that this node, as the leader, let join (joined; rejoined: a member that lost its data; returned: a removed node with its data), or that began to wait for an operator (waiting).",
		}, []string{"result"}),
		outsiders:    f.NewCounter(prometheus.CounterOpts{Name: "dsnode_outsider_calls_total", Help: "Calls and requests of nodes that are no members, which this node refused."}),
		pingFailures: f.NewCounter(prometheus.CounterOpts{Name: "dsnode_ping_failures_total", Help: "Pings to peers that were not answered."}),
		largeFailures: f.NewCounter(prometheus.CounterOpts{
			Name: "dsnode_large_request_failures_total", Help: "Large requests to peers that answer pings that were not answered.",
		}),
		pingSeconds: f.NewHistogram(prometheus.HistogramOpts{Name: "dsnode_ping_seconds", Help: "Round trip of an answered ping.", Buckets: []float64{.001, .005, .01, .02, .05, .1, .25, .5, 1}}),
		rpcs:        f.NewCounterVec(prometheus.CounterOpts{Name: "dsnode_rpc_requests_total", Help: "Calls from peers, by method and gRPC code."}, []string{"method", "code"}),
		rpcSeconds:  f.NewHistogramVec(prometheus.HistogramOpts{Name: "dsnode_rpc_request_seconds", Help: "Time to answer a peer.", Buckets: []float64{.0005, .001, .005, .025, .1, .5, 2}}, []string{"method"}),
	}
}

func (m *metrics) observeRPC(ctx context.Context, req any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
	start := time.Now()
	resp, err := handle(ctx, req)
	m.rpcs.WithLabelValues(info.FullMethod, status.Code(err).String()).Inc()
	m.rpcSeconds.WithLabelValues(info.FullMethod).Observe(time.Since(start).Seconds())
	return resp, err
}

// primaryCollector has one series for each configured site, and none before the cluster
// is founded: an unknown value is absent, not 0.
type primaryCollector struct {
	c    *Cluster
	desc *prometheus.Desc
}

func (p *primaryCollector) Describe(ch chan<- *prometheus.Desc) { ch <- p.desc }

func (p *primaryCollector) Collect(ch chan<- prometheus.Metric) {
	s := p.c.State()
	if s.Parsed == nil {
		return
	}
	for site := range s.Parsed.Sites {
		v := 0.0
		if site == s.Primary.Site {
			v = 1
		}
		ch <- prometheus.MustNewConstMetric(p.desc, prometheus.GaugeValue, v, site)
	}
}

// trafficCollector has the series of the peers that this process has heard.
type trafficCollector struct {
	c    *Cluster
	desc *prometheus.Desc
}

func (t *trafficCollector) Describe(ch chan<- *prometheus.Desc) { ch <- t.desc }

func (t *trafficCollector) Collect(ch chan<- prometheus.Metric) {
	for name, p := range t.c.Peers() {
		if !p.Heard {
			continue
		}
		for kind, ago := range map[Traffic]time.Duration{TrafficPing: p.Ago, TrafficLarge: p.LargeAgo, TrafficGossip: p.UDPAgo} {
			ch <- prometheus.MustNewConstMetric(t.desc, prometheus.GaugeValue, ago.Seconds(), name, string(kind))
		}
	}
}
