package ports

import (
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/dsnode/dsnode/test/async"
)

// A handler that panics with a request's text leaves its stack in the log, and not the text.
func TestPanicIsLoggedWithoutItsValue(t *testing.T) {
	const canary = "canary-of-a-prompt\ngoroutine 7 [canary-of-a-prompt]:"
	var log async.Buffer
	srv := httptest.NewUnstartedServer(nil)
	srv.Config = NewHTTPServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic(canary) }), 1<<20,
		slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug})))
	srv.Start()
	defer srv.Close()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, srv.URL, nil)
	if err != nil {
		t.Fatal(err)
	}
	if resp, err := http.DefaultClient.Do(req); err == nil {
		_ = resp.Body.Close()
		t.Error("a handler that panicked has answered")
	}
	async.Await(t, "the panic is logged", func() bool { return strings.Contains(string(log.Bytes()), "server_log_test.go") })
	if got := string(log.Bytes()); strings.Contains(got, "canary-of") || !strings.Contains(got, "level=ERROR") {
		t.Errorf("the log has %s", got)
	}
}
