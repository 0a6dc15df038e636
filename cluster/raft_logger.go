package cluster

import (
	"context"
	"log/slog"

	"github.com/hashicorp/go-hclog"
)

// raftLogger sends raft's log lines to slog. While a peer is offline, raft logs missed
// heartbeats and failed dials several times per second at error level, although they are
// expected, so every level is lowered by one.
type raftLogger struct {
	hclog.Logger // for the methods that raft does not use: a null logger
	log          *slog.Logger
}

func newRaftLogger(l *slog.Logger) hclog.Logger { return raftLogger{hclog.NewNullLogger(), l} }

func (l raftLogger) write(level slog.Level, msg string, args []any) {
	if !l.log.Enabled(context.Background(), level) {
		return
	}
	for i, a := range args {
		if f, ok := a.(hclog.Format); ok && len(f) > 0 {
			args[i] = f[0]
		}
	}
	l.log.Log(context.Background(), level, "raft", append([]any{"logger", "raft", "message", msg}, args...)...)
}

func (l raftLogger) Debug(msg string, args ...any) { l.write(slog.LevelDebug, msg, args) }
func (l raftLogger) Info(msg string, args ...any)  { l.write(slog.LevelDebug, msg, args) }
func (l raftLogger) Warn(msg string, args ...any)  { l.write(slog.LevelInfo, msg, args) }
func (l raftLogger) Error(msg string, args ...any) { l.write(slog.LevelWarn, msg, args) }
func (l raftLogger) With(args ...any) hclog.Logger { return raftLogger{l.Logger, l.log.With(args...)} }
