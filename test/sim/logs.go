package sim

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"
)

// logs keep the newest lines of all nodes, in virtual time.
type logs struct {
	level slog.Level
	began time.Time

	mu    sync.Mutex // guards lines
	lines []string
}

const maxLines = 4000

type handler struct {
	l    *logs
	node string
	with []slog.Attr
}

func (l *logs) handler(node string) slog.Handler { return &handler{l: l, node: node} }

func (h *handler) Enabled(_ context.Context, level slog.Level) bool { return level >= h.l.level }

func (h *handler) WithAttrs(a []slog.Attr) slog.Handler {
	next := *h
	next.with = append(next.with[:len(next.with):len(next.with)], a...)
	return &next
}

func (h *handler) WithGroup(string) slog.Handler { return h }

func (h *handler) Handle(_ context.Context, r slog.Record) error {
	var b bytes.Buffer
	_, _ = fmt.Fprintf(&b, "%9.3f %-10s %-5s %s", time.Since(h.l.began).Seconds(), h.node, r.Level, r.Message)
	r.Attrs(func(a slog.Attr) bool {
		_, _ = fmt.Fprintf(&b, " %s=%v", a.Key, a.Value)
		return true
	})
	h.l.add(b.String())
	return nil
}

func (l *logs) add(line string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.lines) >= maxLines {
		l.lines = append(l.lines[:0], l.lines[maxLines/2:]...)
	}
	l.lines = append(l.lines, line)
}

func (l *logs) all() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.lines)
}
