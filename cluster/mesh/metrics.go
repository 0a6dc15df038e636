package mesh

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"syscall"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

// ErrCertificateRefused means that the peer didn't take this node's
// certificate. TLS doesn't tell the dialler more than that.
var ErrCertificateRefused = errors.New("the peer refused this node's certificate (another CA, expired, or another cluster's name in it)")

var errTooManyConns = errors.New("too many connections with peers")

type metrics struct {
	connections *prometheus.GaugeVec
	opened      *prometheus.CounterVec
	handshakes  prometheus.Gauge
	failures    *prometheus.CounterVec
	refused     *prometheus.CounterVec
	tunnels     *prometheus.CounterVec
	detours     prometheus.Gauge
}

func newMetrics(reg prometheus.Registerer) *metrics {
	f := promauto.With(reg)
	return &metrics{
		connections: f.NewGaugeVec(prometheus.GaugeOpts{
			Name: "dsnode_peer_connections", Help: "Connections with peers that stand.",
		}, []string{"kind", "direction"}),
		opened: f.NewCounterVec(prometheus.CounterOpts{
			Name: "dsnode_peer_connections_opened_total", Help: "Connections with peers that were made.",
		}, []string{"kind", "direction"}),
		handshakes: f.NewGauge(prometheus.GaugeOpts{
			Name: "dsnode_peer_handshakes", Help: "Accepted connections that are not yet known peers.",
		}),
		failures: f.NewCounterVec(prometheus.CounterOpts{
			Name: "dsnode_peer_handshake_failures_total", Help: "Connections that failed before they were refused or used.",
		}, []string{"direction", "reason"}),
		refused: f.NewCounterVec(prometheus.CounterOpts{
			Name: "dsnode_peer_refused_total", Help: "Connections with known peers that one of both sides refused.",
		}, []string{"code", "by"}),
		// Those that stand are connections of the kinds tunnel and relayed.
		tunnels: f.NewCounterVec(prometheus.CounterOpts{
			Name: "dsnode_peer_tunnels_total", Help: "Tunnels to a node through a common peer that were asked for, by this node (dialled) or of it (relayed).",
		}, []string{"side", "result"}),
		detours: f.NewGauge(prometheus.GaugeOpts{
			Name: "dsnode_peer_detours", Help: "Nodes that this one reaches only through another.",
		}),
	}
}

// countFailure counts a connection that came to nothing and names the reason.
func (m *Mesh) countFailure(direction string, err error) string {
	var refused *RefusedError
	if !errors.As(err, &refused) {
		reason := handshakeReason(err)
		m.metrics.failures.WithLabelValues(direction, reason).Inc()
		return reason
	}
	code, by := "other", "self" // a peer may send any code
	switch refused.Code {
	case CodeUnknownFormat, CodeUnknownKind, CodeMalformed, CodeIdentity, CodeNotMember, CodePeerNotMember,
		CodeOtherCluster, CodeOlderGeneration, CodeNewerGeneration, CodeForkGeneration, CodeKindClosed, CodeIsolated, CodeNoTunnel, CodeUnreached:
		code = refused.Code
	}
	if refused.ByPeer {
		by = "peer"
	}
	m.metrics.refused.WithLabelValues(code, by).Inc()
	return code
}

// handshakeReason sorts an error into the few reasons of the metric.
func handshakeReason(err error) string {
	var (
		unknownCA x509.UnknownAuthorityError
		invalid   x509.CertificateInvalidError
		record    tls.RecordHeaderError
		network   *net.OpError
		name      *net.DNSError
	)
	switch {
	case errors.Is(err, errCrowded):
		return "crowded"
	case errors.Is(err, errTooManyConns):
		return "too_many_connections"
	case errors.Is(err, ErrForeignCluster):
		return "other_cluster"
	case errors.Is(err, ErrWrongNode):
		return "wrong_node"
	case errors.Is(err, ErrNoIdentity):
		return "no_identity"
	case errors.Is(err, ErrCertificateRefused):
		return "certificate_refused"
	case errors.As(err, &unknownCA):
		return "unknown_ca"
	case errors.As(err, &invalid):
		if invalid.Reason == x509.Expired {
			return "expired"
		}
		return "invalid_certificate"
	case errors.As(err, &record):
		return "not_tls"
	case errors.Is(err, errPreface):
		return "not_a_preface"
	case errors.As(err, &name):
		return "name_lookup"
	case errors.Is(err, syscall.ECONNREFUSED):
		return "connection_refused"
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
		return "timeout"
	case errors.Is(err, context.Canceled):
		return "cancelled"
	case errors.As(err, &network) && network.Timeout():
		return "timeout"
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.ECONNRESET),
		errors.Is(err, syscall.EPIPE), errors.Is(err, net.ErrClosed):
		return "closed"
	}
	return "other"
}

// explainHandshake puts into words what TLS says in alerts.
func explainHandshake(err error) error {
	var remote *net.OpError
	var unknownCA x509.UnknownAuthorityError
	switch {
	case errors.As(err, &remote) && remote.Op == "remote error" && strings.Contains(remote.Err.Error(), "certificate"):
		return fmt.Errorf("%w: %w", ErrCertificateRefused, err)
	case errors.As(err, &unknownCA):
		return fmt.Errorf("the peer's certificate was signed by another CA: %w", err)
	}
	return err
}
