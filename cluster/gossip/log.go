package gossip

import (
	"context"
	"log/slog"
	"strings"

	"github.com/dsnode/dsnode/cluster/throttle"
)

// Events that memberlist v0.7.0 reports only in its log. For each there is a test
// that fails if another version of memberlist changes the line.
const (
	logSuspectPrefix = "Suspect "
	logSuspectSuffix = " has failed, no acks received"
	logTCPOnlyPrefix = "Was able to connect to "
	logTCPOnlySuffix = " over TCP but UDP probes failed, network may be misconfigured"

	// logUnencrypted warns of memberlist's own encryption, which is off: the transport
	// encrypts. A node that still lists a removed member causes logRemoved again and again.
	logUnencrypted = "Binding to public address without encryption!"
	logRemoved     = "ignoring alive message for "

	maxLogLine = 300 // bytes of a line; memberlist prints all bytes of a node's metadata as numbers
)

// logWriter receives memberlist's log lines. It logs errors and warnings as warnings,
// throttled by kind, and the rest at debug level.
type logWriter struct {
	log      *slog.Logger
	table    *table
	throttle *throttle.Lines
}

// Write takes one line of a log.Logger without flags.
func (l *logWriter) Write(line []byte) (int, error) {
	level, text := parseLogLine(string(line))
	if name, ok := cutBoth(text, logSuspectPrefix, logSuspectSuffix); ok {
		l.table.suspect(name)
	}
	if name, ok := cutBoth(text, logTCPOnlyPrefix, logTCPOnlySuffix); ok {
		l.table.metrics.tcpOnly.Inc()
		l.table.setUDPBlocked(name)
	}
	if text == logUnencrypted {
		return len(line), nil
	}
	if _, ok := cutBoth(text, logRemoved, errRemoved.Error()); ok {
		level = slog.LevelDebug
	}
	if level < slog.LevelWarn {
		l.log.Log(context.Background(), level, "gossip: memberlist log", "line", text)
		return len(line), nil
	}
	if skipped, ok := l.throttle.Allow(logKind(text)); ok {
		l.log.Warn("gossip: memberlist log", "line", text, "unreported", skipped)
	}
	return len(line), nil
}

func parseLogLine(line string) (slog.Level, string) {
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
	if len(line) > maxLogLine {
		line = strings.ToValidUTF8(line[:maxLogLine], "") + "…"
	}
	return level, line
}

// logKind is the constant start of a line, up to the first digit, quote or colon. What
// follows differs from line to line.
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
