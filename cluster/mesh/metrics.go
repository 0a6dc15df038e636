package mesh

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

type metrics struct {
	connections *prometheus.GaugeVec
	opened      *prometheus.CounterVec
	handshakes  prometheus.Gauge
	failures    *prometheus.CounterVec
	refused     *prometheus.CounterVec
	turnedAway  *prometheus.CounterVec
	tunnels     *prometheus.CounterVec
	viaRelay    prometheus.Gauge
}

func newMetrics(reg prometheus.Registerer) *metrics {
	f := promauto.With(reg)
	return &metrics{
		connections: f.NewGaugeVec(prometheus.GaugeOpts{
			Name: "dsnode_peer_connections", Help: "Open connections with peers.",
		}, []string{"kind", "direction"}),
		opened: f.NewCounterVec(prometheus.CounterOpts{
			Name: "dsnode_peer_connections_opened_total", Help: "Connections with peers that were opened.",
		}, []string{"kind", "direction"}),
		handshakes: f.NewGauge(prometheus.GaugeOpts{
			Name: "dsnode_peer_handshakes", Help: "Accepted connections whose handshake has not ended.",
		}),
		failures: f.NewCounterVec(prometheus.CounterOpts{
			Name: "dsnode_peer_handshake_failures_total", Help: "Connections that failed in the dial or in the handshake, by reason; refusals are not counted here.",
		}, []string{"direction", "reason"}),
		refused: f.NewCounterVec(prometheus.CounterOpts{
			Name: "dsnode_peer_refused_total", Help: "Connections that this node (by=self) or an authenticated peer (by=peer) refused, by code.",
		}, []string{"code", "by"}),
		// The other ports have the same metric with other values of port.
		turnedAway: f.NewCounterVec(prometheus.CounterOpts{
			Name: "dsnode_connections_refused_total", Help: "Connections and packets that a port refused, by reason.",
			ConstLabels: prometheus.Labels{"port": "rpc"},
		}, []string{"reason"}),
		// Open tunnels are counted as connections of the kinds tunnel and relayed.
		tunnels: f.NewCounterVec(prometheus.CounterOpts{
			Name: "dsnode_peer_tunnels_total", Help: "Tunnels to a node through a common peer that this node asked for (side=dialled) or was asked to relay (side=relayed), by result.",
		}, []string{"side", "result"}),
		viaRelay: f.NewGauge(prometheus.GaugeOpts{
			Name: "dsnode_peer_detours", Help: "Nodes that this node reaches only through a relay.",
		}),
	}
}

// countTurnedAway counts a connection that this node accepted and then closed, with the
// reason that countFailure returned.
func (m *Mesh) countTurnedAway(reason string) {
	if !endedByPeer(reason) {
		m.metrics.turnedAway.WithLabelValues(reason).Inc()
	}
}

// countFailure counts a failed or refused connection and returns the label that it
// was counted under.
func (m *Mesh) countFailure(direction string, err error) string {
	var refused *RefusedError
	if !errors.As(err, &refused) {
		reason := failureReason(err)
		m.metrics.failures.WithLabelValues(direction, reason).Inc()
		return reason
	}
	code, by := "other", "self" // a peer may send any code
	switch refused.Code {
	case CodeUnknownFormat, CodeUnknownKind, CodeMalformed, CodeIdentity, CodeNotMember, CodePeerNotMember,
		CodeOtherCluster, CodeOlderGeneration, CodeNewerGeneration, CodeForkGeneration, CodeRemoved, CodeNotAdmitted, CodeKindClosed, CodeIsolated, CodeNoTunnel, CodeUnreached:
		code = refused.Code
	}
	if refused.ByPeer {
		by = "peer"
	}
	m.metrics.refused.WithLabelValues(code, by).Inc()
	return code
}
