package cluster

import (
	"context"
	"io"
	"log"
	"log/slog"

	"github.com/hashicorp/go-hclog"
)

// raftLogger sends raft's log lines to slog. While a peer is offline, raft logs missed
// heartbeats and failed dials several times per second at error level, although they are
// expected, so every level is lowered by one.
type raftLogger struct {
	log  *slog.Logger
	name string
	args []any
}

func newRaftLogger(l *slog.Logger) hclog.Logger { return &raftLogger{log: l, name: "raft"} }

func (l *raftLogger) level(level hclog.Level) slog.Level {
	switch level {
	case hclog.Error:
		return slog.LevelWarn
	case hclog.Warn:
		return slog.LevelInfo
	default:
		return slog.LevelDebug
	}
}

func (l *raftLogger) Log(level hclog.Level, msg string, args ...any) {
	sl := l.level(level)
	if !l.log.Enabled(context.Background(), sl) {
		return
	}
	for i, a := range args {
		if f, ok := a.(hclog.Format); ok && len(f) > 0 {
			args[i] = f[0]
		}
	}
	l.log.Log(context.Background(), sl, "raft", append([]any{"logger", l.name, "message", msg}, args...)...)
}

func (l *raftLogger) Trace(string, ...any)             {}
func (l *raftLogger) Debug(msg string, args ...any)    { l.Log(hclog.Debug, msg, args...) }
func (l *raftLogger) Info(msg string, args ...any)     { l.Log(hclog.Info, msg, args...) }
func (l *raftLogger) Warn(msg string, args ...any)     { l.Log(hclog.Warn, msg, args...) }
func (l *raftLogger) Error(msg string, args ...any)    { l.Log(hclog.Error, msg, args...) }
func (l *raftLogger) IsTrace() bool                    { return false }
func (l *raftLogger) IsDebug() bool                    { return l.log.Enabled(context.Background(), slog.LevelDebug) }
func (l *raftLogger) IsInfo() bool                     { return true }
func (l *raftLogger) IsWarn() bool                     { return true }
func (l *raftLogger) IsError() bool                    { return true }
func (l *raftLogger) ImpliedArgs() []any               { return l.args }
func (l *raftLogger) Name() string                     { return l.name }
func (l *raftLogger) SetLevel(hclog.Level)             {}
func (l *raftLogger) GetLevel() hclog.Level            { return hclog.Debug }
func (l *raftLogger) ResetNamed(n string) hclog.Logger { return l.Named(n) }

func (l *raftLogger) With(args ...any) hclog.Logger {
	return &raftLogger{log: l.log.With(args...), name: l.name, args: append(l.args, args...)}
}

func (l *raftLogger) Named(name string) hclog.Logger {
	return &raftLogger{log: l.log, name: l.name + "." + name, args: l.args}
}

func (l *raftLogger) StandardLogger(o *hclog.StandardLoggerOptions) *log.Logger {
	return log.New(l.StandardWriter(o), "", 0)
}

func (l *raftLogger) StandardWriter(*hclog.StandardLoggerOptions) io.Writer { return io.Discard }
