package gossip

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

type metrics struct {
	members        *prometheus.GaugeVec
	udpBlocked     prometheus.Gauge
	tcpOnly        prometheus.Counter
	health         prometheus.Gauge
	joins          *prometheus.CounterVec
	conflicts      prometheus.Counter
	packetsIn      prometheus.Counter
	packetsOut     prometheus.Counter
	streamsRefused prometheus.Counter
	refused        map[refusal]prometheus.Counter
}

func newMetrics(reg prometheus.Registerer) *metrics {
	f := promauto.With(reg)
	packets := f.NewCounterVec(prometheus.CounterOpts{
		Name: "dsnode_gossip_packets_total", Help: "Gossip packets (UDP).",
	}, []string{"direction"})
	refused := f.NewCounterVec(prometheus.CounterOpts{
		Name: "dsnode_connections_refused_total", Help: "Connections and packets that a port refused, by reason.",
		ConstLabels: prometheus.Labels{"port": "gossip"},
	}, []string{"reason"})
	byReason := map[refusal]prometheus.Counter{}
	for _, why := range refusals {
		byReason[why] = refused.WithLabelValues(string(why))
	}
	return &metrics{
		refused: byReason,
		members: f.NewGaugeVec(prometheus.GaugeOpts{
			Name: "dsnode_gossip_members", Help: "Members that gossip knows, this node included.",
		}, []string{"state"}),
		udpBlocked: f.NewGauge(prometheus.GaugeOpts{
			Name: "dsnode_gossip_udp_blocked_members",
			Help: "Members whose last probe was answered over TCP only: a firewall drops UDP on the gossip port.",
		}),
		tcpOnly: f.NewCounter(prometheus.CounterOpts{
			Name: "dsnode_gossip_tcp_only_probes_total", Help: "Probes that were answered over TCP only.",
		}),
		health: f.NewGauge(prometheus.GaugeOpts{
			Name: "dsnode_gossip_health_score", Help: "memberlist's health score of this node: 0 is healthy, higher means that it falls behind.",
		}),
		joins: f.NewCounterVec(prometheus.CounterOpts{
			Name: "dsnode_gossip_joins_total", Help: "Attempts to join seeds and lost members, by result.",
		}, []string{"result"}),
		conflicts: f.NewCounter(prometheus.CounterOpts{
			Name: "dsnode_gossip_name_conflicts_total", Help: "How often a member's name was heard with another address than the known one.",
		}),
		packetsIn:  packets.WithLabelValues("in"),
		packetsOut: packets.WithLabelValues("out"),
		streamsRefused: f.NewCounter(prometheus.CounterOpts{
			Name: "dsnode_gossip_streams_refused_total", Help: "Gossip streams that were refused: too many are open, or the site is not admitted.",
		}),
	}
}
