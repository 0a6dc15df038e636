package gossip

import (
	"context"
	"log/slog"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/dsnode/dsnode/cluster/throttle"
)

// What memberlist v0.7.0 tells in its log and nowhere else. A test of each
// fails when another version words it differently.
const (
	logSuspectPrefix = "Suspect "
	logSuspectSuffix = " has failed, no acks received"
	logTCPOnlyPrefix = "Was able to connect to "
	logTCPOnlySuffix = " over TCP but UDP probes failed, network may be misconfigured"

	gossipLogMax = 300 // bytes of a line; memberlist prints whole metadata as numbers
)

// logWriter takes memberlist's log lines: errors and warnings become warnings,
// a kind of them every few seconds at most, the rest is for debugging.
type logWriter struct {
	log      *slog.Logger
	table    *table
	throttle *throttle.Lines
}

func newLogWriter(log *slog.Logger, table *table) *logWriter {
	return &logWriter{log: log, table: table, throttle: throttle.NewLines()}
}

// Write takes one line of a log.Logger without flags.
func (l *logWriter) Write(line []byte) (int, error) {
	level, text := splitLogLine(string(line))
	if name, ok := cutBoth(text, logSuspectPrefix, logSuspectSuffix); ok {
		l.table.suspect(name)
	}
	if name, ok := cutBoth(text, logTCPOnlyPrefix, logTCPOnlySuffix); ok {
		l.table.metrics.tcpOnly.Inc()
		l.table.udpIsBlocked(name)
	}
	if level < slog.LevelWarn {
		l.log.Log(context.Background(), level, "gossip: memberlist says", "line", text)
		return len(line), nil
	}
	if skipped, ok := l.throttle.Allow(logKind(text)); ok {
		l.log.Warn("gossip: memberlist says", "line", text, "unreported", skipped)
	}
	return len(line), nil
}

func splitLogLine(line string) (slog.Level, string) {
	line = strings.TrimSpace(line)
	level := slog.LevelWarn // memberlist's lines without a level are errors
	if rest, ok := strings.CutPrefix(line, "["); ok {
		if name, text, ok := strings.Cut(rest, "] "); ok {
			line = text
			if name == "DEBUG" || name == "INFO" {
				level = slog.LevelDebug
			}
		}
	}
	line = strings.TrimPrefix(line, "memberlist: ")
	if len(line) > gossipLogMax {
		line = strings.ToValidUTF8(line[:gossipLogMax], "") + "…"
	}
	return level, line
}

// logKind is a line without what differs from one to the next: it ends before
// the first digit, quote or colon.
func logKind(text string) string {
	if i := strings.IndexAny(text, "0123456789'\":"); i > 0 {
		return text[:i]
	}
	return text
}

func cutBoth(s, prefix, suffix string) (string, bool) {
	s, before := strings.CutPrefix(s, prefix)
	s, after := strings.CutSuffix(s, suffix)
	return s, before && after
}

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
}

func newMetrics(reg prometheus.Registerer) *metrics {
	f := promauto.With(reg)
	packets := f.NewCounterVec(prometheus.CounterOpts{
		Name: "dsnode_gossip_packets_total", Help: "Gossip datagrams.",
	}, []string{"direction"})
	return &metrics{
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
			Name: "dsnode_gossip_health_score", Help: "How badly this node keeps up with gossip; 0 is well.",
		}),
		joins: f.NewCounterVec(prometheus.CounterOpts{
			Name: "dsnode_gossip_joins_total", Help: "Attempts to meet seeds and lost members.",
		}, []string{"result"}),
		conflicts: f.NewCounter(prometheus.CounterOpts{
			Name: "dsnode_gossip_name_conflicts_total", Help: "Times that a name was heard under another address than the known one.",
		}),
		packetsIn:  packets.WithLabelValues("in"),
		packetsOut: packets.WithLabelValues("out"),
		streamsRefused: f.NewCounter(prometheus.CounterOpts{
			Name: "dsnode_gossip_streams_refused_total", Help: "Gossip streams that were closed because too many were open.",
		}),
	}
}
