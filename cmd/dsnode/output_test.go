package main

import (
	"bytes"
	"context"
	"net/http"
	"net/http/httptest"
	"runtime/debug"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"go.yaml.in/yaml/v4"
	"pgregory.net/rapid"

	"github.com/dsnode/dsnode/node/admin"
)

func TestGridKeepsItsColumns(t *testing.T) {
	g := grid{heads: []string{"A", "BB", "C"}}
	g.add(plain("上海"), cell{"up", green}, plain(""))
	g.add(plain("x"), plain("evil\x1b[2J\nline"), plain("z"))
	want := "" +
		"A   BB             C\n" +
		"上海  up\n" +
		"x   evil?[2J line  z\n"
	var out bytes.Buffer
	if err := g.write(&out, palette{}); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, out.String()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	out.Reset()
	if err := g.write(&out, palette{on: true}); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(out.String(), "\x1b[32mup\x1b[0m             ") && !strings.Contains(out.String(), "\x1b[32mup\x1b[0m\n") {
		t.Errorf("no green in %q", out.String())
	}
	if strings.Contains(out.String(), "\x1b[2J") {
		t.Errorf("a peer's name controls the terminal: %q", out.String())
	}
}

func TestColourOnlyWhereItIsWanted(t *testing.T) {
	// A buffer is not a terminal, whatever the environment is.
	env := &environment{stdout: &bytes.Buffer{}, getenv: func(string) string { return "" }}
	if env.palette().on {
		t.Error("a buffer was taken for a terminal")
	}
}

// TestYAMLReadsBack: values of every type read back the same, also strings that look like
// another type.
func TestYAMLReadsBack(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		text := rapid.OneOf(
			rapid.SampledFrom([]string{"", "null", "true", "1", "0x1", "1e3", "~", "- a", "a: b", "a\nb\n", "  a", "#x", "2026-11-22", "yes", "'", "\""}),
			rapid.StringMatching(`[ -~\n]{0,20}`),
		)
		type inner struct {
			Name  string   `json:"name"`
			Count *int     `json:"count"`
			List  []string `json:"list"`
		}
		want := map[string]inner{"v": {Name: text.Draw(t, "name"), List: []string{text.Draw(t, "item")}}}
		out, err := yamlOf(want)
		if err != nil {
			t.Fatal(err)
		}
		var got map[string]map[string]any
		if err := yaml.Unmarshal(out, &got); err != nil {
			t.Fatalf("%q: %v", out, err)
		}
		v := got["v"]
		if v["name"] != want["v"].Name || v["count"] != nil || v["list"].([]any)[0] != want["v"].List[0] {
			t.Fatalf("%q became %#v", out, v)
		}
	})
}

func TestAge(t *testing.T) {
	for want, d := range map[string]time.Duration{
		"0s": -time.Second, "0.0s": 0, "0.2s": 200 * time.Millisecond, "12s": 12*time.Second + 900*time.Millisecond,
		"3m5s": 185 * time.Second, "10m": 10 * time.Minute, "4h10m": 4*time.Hour + 10*time.Minute + 5*time.Second, "12d3h": 12*day + 3*time.Hour,
	} {
		if got := age(d); got != want {
			t.Errorf("age(%s) is %q, want %q", d, got, want)
		}
	}
}

func TestSpanReadsWhatItWrites(t *testing.T) {
	for text, want := range map[string]time.Duration{"90d": 90 * day, "12h": 12 * time.Hour, "24h": day, "90m": 90 * time.Minute} {
		var s, again span
		if err := s.Set(text); err != nil || time.Duration(s) != want {
			t.Errorf("%s: %s, %v", text, time.Duration(s), err)
		}
		if err := again.Set(s.String()); err != nil || again != s {
			t.Errorf("%s: written as %s, read as %s, %v", text, s.String(), time.Duration(again), err)
		}
	}
	for _, text := range []string{"", "d", "-1d", "0d", "0s", "1.5d", "99999999d", "36501d", "forever", "90"} {
		var s span
		if err := s.Set(text); err == nil {
			t.Errorf("%q was parsed as %s", text, time.Duration(s))
		}
	}
}

func TestVersionOfABuild(t *testing.T) {
	if got := stampedVersion("1.2.3"); got != "1.2.3" {
		t.Errorf("stamped: %s", got)
	}
	for want, info := range map[string]*debug.BuildInfo{
		"0.1.0-dev": {Main: debug.Module{Version: "(devel)"}},
		"v0.3.0":    {Main: debug.Module{Version: "v0.3.0"}},
		"0.1.0-dev+0123456789ab.changed": {
			Main:     debug.Module{Version: "(devel)"},
			Settings: []debug.BuildSetting{{Key: "vcs.revision", Value: "0123456789abcdef"}, {Key: "vcs.modified", Value: "true"}},
		},
	} {
		if got := buildVersion(info); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

// countdown ends a watch after some outputs.
type countdown struct {
	bytes.Buffer
	mark  string
	after int
	done  context.CancelFunc
}

func (c *countdown) Write(p []byte) (int, error) {
	n, err := c.Buffer.Write(p)
	if strings.Count(c.String(), c.mark) >= c.after {
		c.done()
	}
	return n, err
}

func TestWatchGoesOnThroughAnOutage(t *testing.T) {
	f := &fakeCluster{state: "healthy"}
	port := admin.New(admin.Options{Cluster: f, Gatherer: prometheus.NewRegistry(), Health: http.NotFoundHandler()})
	var asked atomic.Int32
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if asked.Add(1) == 2 {
			panic(http.ErrAbortHandler) // the connection breaks
		}
		port.ServeHTTP(w, r)
	}))
	defer server.Close()
	server.Config.SetKeepAlivesEnabled(false) // else net/http repeats the request by itself
	client, err := admin.NewClient([]string{server.URL}, admin.ClientOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	out := &countdown{mark: "\n", after: 2, done: cancel}
	var stderr bytes.Buffer
	env := &environment{stdout: out, stderr: &stderr, getenv: func(string) string { return "" }}
	if err := watchStatus(ctx, &session{Client: client, env: env, output: outputJSON}, time.Millisecond); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	if len(lines) != 2 || !strings.HasPrefix(lines[0], `{"cluster":"dev"`) {
		t.Errorf("want two statuses on a line each, got %q", out.String())
	}
	if !strings.Contains(stderr.String(), "dsnode: error: cannot reach the cluster") {
		t.Errorf("the outage was not reported: %q", stderr.String())
	}
}
