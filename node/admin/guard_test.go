package admin

import (
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

func TestAccess(t *testing.T) {
	const status = "/admin/v1/status"
	tests := map[string]struct {
		token  string // configured
		method string
		path   string
		change []func(*http.Request)
		want   int
	}{
		"loopback needs no token": {want: 200},
		"localhost by name":       {change: []func(*http.Request){host("localhost:8081")}, want: 200},
		"localhost with a dot":    {change: []func(*http.Request){host("LocalHost.")}, want: 200},
		"a forwarded port":        {change: []func(*http.Request){host("127.0.0.1:9999")}, want: 200},
		"another loopback":        {change: []func(*http.Request){host("127.8.8.8")}, want: 200},
		"IPv6 loopback":           {change: []func(*http.Request){host("[::1]:8081")}, want: 200},

		"a rebound name":               {change: []func(*http.Request){host("evil.example:8081")}, want: 403},
		"a rebound name, with token":   {token: "t", change: []func(*http.Request){host("evil.example"), header("Authorization", "Bearer t")}, want: 403},
		"a rebound name at the page":   {path: "/", change: []func(*http.Request){host("evil.example")}, want: 403},
		"a rebound name at health":     {path: "/healthz/live", change: []func(*http.Request){host("evil.example")}, want: 403},
		"a name that looks like ours":  {change: []func(*http.Request){host("127.0.0.1.evil.example")}, want: 403},
		"a name that ends like ours":   {change: []func(*http.Request){host("evil.localhost")}, want: 403},
		"an address that is not ours":  {change: []func(*http.Request){host("10.0.0.1")}, want: 403},
		"the whole world":              {change: []func(*http.Request){host("0.0.0.0:8081")}, want: 403},
		"a page of a foreign origin":   {change: []func(*http.Request){header("Origin", "http://evil.example")}, want: 403},
		"a page without an origin":     {change: []func(*http.Request){header("Origin", "null")}, want: 403},
		"a page of another local port": {change: []func(*http.Request){header("Origin", "http://127.0.0.1:1")}, want: 403},
		"a foreign page's fetch":       {change: []func(*http.Request){header("Sec-Fetch-Site", "cross-site")}, want: 403},
		"a sibling page's fetch":       {change: []func(*http.Request){header("Sec-Fetch-Site", "same-site")}, want: 403},
		"a foreign page's post":        {method: "POST", path: "/admin/v1/nodes/me-1/drain", change: []func(*http.Request){header("Sec-Fetch-Site", "cross-site")}, want: 403},
		"a foreign link to the API":    {change: []func(*http.Request){header("Sec-Fetch-Site", "cross-site"), header("Sec-Fetch-Mode", "navigate")}, want: 403},
		"a foreign link to the page":   {path: "/", change: []func(*http.Request){header("Sec-Fetch-Site", "cross-site"), header("Sec-Fetch-Mode", "navigate")}, want: 200},
		"our own page's fetch":         {change: []func(*http.Request){header("Sec-Fetch-Site", "same-origin")}, want: 200},
		"an address typed in":          {path: "/", change: []func(*http.Request){header("Sec-Fetch-Site", "none")}, want: 200},

		"a proxy on this machine":          {change: []func(*http.Request){header("X-Forwarded-For", "203.0.113.9")}, want: 401},
		"a CDN's tunnel":                   {change: []func(*http.Request){header("CF-Connecting-IP", "203.0.113.9")}, want: 401},
		"a proxy, for a change":            {method: "POST", path: "/admin/v1/nodes/me-1/drain", change: []func(*http.Request){header("Via", "1.1 p")}, want: 401},
		"a proxy, with the token":          {token: "s3cret", change: []func(*http.Request){header("Authorization", "Bearer s3cret"), header("Forwarded", "for=203.0.113.9")}, want: 200},
		"a proxy, for a probe":             {path: "/healthz/live", change: []func(*http.Request){header("X-Real-IP", "203.0.113.9")}, want: 200},
		"one of two Sec-Fetch-Site allows": {change: []func(*http.Request){func(r *http.Request) { r.Header["Sec-Fetch-Site"] = []string{"none", "cross-site"} }}, want: 403},

		"token right":           {token: "s3cret", change: []func(*http.Request){header("Authorization", "Bearer s3cret")}, want: 200},
		"token wrong":           {token: "s3cret", change: []func(*http.Request){header("Authorization", "Bearer s3crets")}, want: 401},
		"token empty":           {token: "s3cret", change: []func(*http.Request){header("Authorization", "Bearer ")}, want: 401},
		"token absent":          {token: "s3cret", want: 401},
		"token as a password":   {token: "s3cret", change: []func(*http.Request){header("Authorization", "Basic czNjcmV0")}, want: 401},
		"metrics need it":       {token: "s3cret", path: "/metrics", want: 401},
		"profiles need it":      {token: "s3cret", path: "/debug/pprof/", want: 401},
		"changes need it":       {token: "s3cret", method: "DELETE", path: "/admin/v1/nodes/gone-1", want: 401},
		"probes do not":         {token: "s3cret", path: "/healthz/live", want: 200},
		"the page itself none":  {token: "s3cret", path: "/", want: 200},
		"its script does not":   {token: "s3cret", path: "/console.js", want: 200},
		"unknown paths do not":  {token: "s3cret", path: "/nothing", want: 404},
		"a token not asked for": {change: []func(*http.Request){header("Authorization", "Bearer whatever")}, want: 200},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			if tt.method == "" {
				tt.method = http.MethodGet
			}
			if tt.path == "" {
				tt.path = status
			}
			resp, text := send(t, serve(t, newFake("me-1"), tt.token), tt.method, tt.path, "", tt.change...)
			if resp.StatusCode != tt.want {
				t.Errorf("got %d, want %d: %s", resp.StatusCode, tt.want, text)
			}
			if tt.want == http.StatusUnauthorized && (resp.Header.Get("WWW-Authenticate") == "" || !strings.Contains(text, "the operator's token is")) {
				t.Errorf("a 401 must say what is missing: %s", text)
			}
		})
	}
}

// TestMetricsPort: a page that has rebound its name to loopback can't read the metrics, a
// scraper can.
func TestMetricsPort(t *testing.T) {
	h := httptest.NewServer(ForMetrics(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "up 1") })))
	defer h.Close()
	for name, want := range map[string]int{"localhost:9090": 200, "127.0.0.1": 200, "evil.example:9090": 403, "127.0.0.1.evil.example": 403} {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, h.URL+"/metrics", nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Host = name
		resp, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		text, _ := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if resp.StatusCode != want || (string(text) == "up 1") != (want == 200) {
			t.Errorf("Host %s: %d %s, want %d", name, resp.StatusCode, text, want)
		}
	}
}

// TestWithoutTokenOnlyLoopback: when no token is configured, a request over another
// address than loopback is refused, whatever its headers are.
func TestWithoutTokenOnlyLoopback(t *testing.T) {
	h := New(Options{Cluster: newFake("me-1"), Gatherer: prometheus.NewRegistry(), Health: http.NotFoundHandler()})
	w := httptest.NewRecorder()
	r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/admin/v1/status", nil) // no local address
	r.Host = "127.0.0.1"
	h.ServeHTTP(w, r)
	if w.Code != http.StatusUnauthorized || !strings.Contains(w.Body.String(), "this port serves only loopback") {
		t.Errorf("got %d %s", w.Code, w.Body)
	}
}
