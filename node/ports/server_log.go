package ports

import (
	"bytes"
	"context"
	"log"
	"log/slog"
	"strings"
)

// maxServerLine bounds a line of net/http's server: some quote what a client sent.
const maxServerLine = 300

// serverLog takes the lines of a net/http server. One is about a panic of a handler, with
// its value, which may hold a request's text: the log gets the stack alone.
type serverLog struct{ log *slog.Logger }

func newServerLog(to *slog.Logger) *log.Logger { return log.New(serverLog{to}, "", 0) }

// Write implements io.Writer for a log.Logger, which calls it once a line.
func (l serverLog) Write(line []byte) (int, error) {
	ctx := context.Background()
	if bytes.HasPrefix(line, []byte("http: panic serving ")) {
		stack := line[len(line):]
		if at := bytes.LastIndex(line, []byte("\ngoroutine ")); at >= 0 {
			stack = line[at:]
		}
		l.log.LogAttrs(ctx, slog.LevelError, "panic while serving a request", slog.String("stack", strings.TrimSpace(string(stack))))
		return len(line), nil
	}
	text := strings.TrimSpace(string(line))
	if len(text) > maxServerLine {
		text = text[:maxServerLine] + "…"
	}
	l.log.LogAttrs(ctx, slog.LevelDebug, "http server", slog.String("line", strings.ToValidUTF8(text, "?")))
	return len(line), nil
}
