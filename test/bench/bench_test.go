//go:build linux

package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// The bench starts its own binary as child processes; in tests that is the test binary.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && slices.Contains([]string{childUpstream, childReverseProxy}, os.Args[1]) {
		main()
		return
	}
	os.Exit(m.Run())
}

// built builds dsnode once for all tests.
func built(t *testing.T) string {
	t.Helper()
	s := &sandbox{dir: t.TempDir()}
	binary, err := s.buildNode(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return binary
}

func TestBench(t *testing.T) {
	binary := built(t)

	t.Run("compare", func(t *testing.T) {
		t.Parallel() // the figures do not matter here
		file := filepath.Join(t.TempDir(), "figures.json")
		var out, progress strings.Builder
		err := run(t.Context(), []string{
			"-pairs", "1", "-seconds", "0.2", "-connections", "4", "-rate", "200", "-streams", "10", "-events", "3",
			"-generator", "own", "-json", file, "-binary", binary,
		}, &out, &progress)
		if err != nil {
			t.Fatalf("%v\n%s", err, progress.String())
		}
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var c comparison
		if err := json.Unmarshal(text, &c); err != nil {
			t.Fatal(err)
		}
		names := []string{nameDirect, nameDsnode, nameGoProxy}
		if _, err := findNginx(); err == nil {
			names = append(names, nameNginx)
		} else if os.Getenv("DSNODE_TEST_REQUIRE") == "1" {
			t.Error(err)
		}
		for _, name := range names {
			for _, load := range []string{loadClosed, loadRate, loadStreams} {
				wantRuns(t, c.Runs, name, load)
			}
		}
		for _, v := range c.Verdicts {
			if len(v.Judged) != 1 || len(v.Values[nameDsnode]) != 1 {
				t.Errorf("%s: %d and %d values of one round", v.Title, len(v.Judged), len(v.Values[nameDsnode]))
			}
			if !strings.Contains(out.String(), v.Title) {
				t.Errorf("the table has no line %q:\n%s", v.Title, out.String())
			}
		}
		if len(c.Verdicts) != len(figures(&c.Settings)) {
			t.Errorf("%d verdicts", len(c.Verdicts))
		}
	})

	t.Run("cache", func(t *testing.T) {
		t.Parallel()
		var out, progress strings.Builder
		err := run(t.Context(), []string{
			"cache", "-pairs", "1", "-seconds", "0.2", "-connections", "4", "-generator", "own", "-binary", binary,
		}, &out, &progress)
		if err != nil {
			t.Fatalf("%v\n%s", err, progress.String())
		}
		for _, want := range []string{nameDsnode, "net/http alone"} {
			if !strings.Contains(out.String(), want) {
				t.Errorf("the table has no %q:\n%s", want, out.String())
			}
		}
	})

	t.Run("churn", func(t *testing.T) {
		t.Parallel()
		var out, progress strings.Builder
		err := run(t.Context(), []string{
			"cache", "churn", "-json", "-pairs", "1", "-times", "0.3", "-local", "1048576", "-rate", "50", "-hot", "4", "-churn", "400", "-binary", binary,
		}, &out, &progress)
		if err != nil {
			t.Fatalf("%v\n%s", err, progress.String())
		}
		for d := json.NewDecoder(strings.NewReader(out.String())); d.More(); {
			var r churnRun
			if err := d.Decode(&r); err != nil {
				t.Fatal(err)
			}
			if r.Hits == 0 || r.New == 0 || r.P999 <= 0 || r.Anonymous == 0 || r.File == 0 {
				t.Errorf("figures are missing: %+v", r)
			}
			if r.File > r.FileBound || r.Evicting && 2*r.Local < r.LocalBound {
				t.Errorf("the file exceeds its bound, or the tier in memory was not filled: %+v", r)
			}
		}
	})

	t.Run("idle", func(t *testing.T) {
		t.Parallel()
		port, err := freePort()
		if err != nil {
			t.Fatal(err)
		}
		var out, progress strings.Builder
		if err := run(t.Context(), []string{
			"idle", "-jobs", "20", "-for", "1s", "-settle", "0s", "-base-port", strconv.Itoa(port), "-binary", binary,
		}, &out, &progress); err != nil {
			t.Fatalf("%v\n%s", err, progress.String())
		}
		for _, want := range []string{"switches/s", "of anonymous memory", "beijing-1", "target:"} {
			if strings.Count(out.String(), want) != 2 { // before and after the restart
				t.Errorf("%q is not in both reports:\n%s", want, out.String())
			}
		}
	})

	t.Run("soak", func(t *testing.T) {
		t.Parallel()
		var out, progress strings.Builder
		if err := run(t.Context(), []string{"soak", "-for", "1s", "-clients", "16", "-binary", binary}, &out, &progress); err != nil {
			t.Fatalf("%v\n%s%s", err, out.String(), progress.String())
		}
		for _, want := range []string{"requests served", "goroutines", "anonymous"} {
			if !strings.Contains(out.String(), want) {
				t.Errorf("the report has no %q:\n%s", want, out.String())
			}
		}
	})
}

// wantRuns checks that all requests of a load were answered, and that the process's
// memory was measured.
func wantRuns(t *testing.T, runs []measurement, name, load string) {
	t.Helper()
	n := 0
	for _, m := range runs {
		if m.Target != name || m.Load != load {
			continue
		}
		n++
		if m.Done == 0 || m.Failed > 0 && (name != nameGoProxy || load != loadStreams) { // golang/go#40747
			t.Errorf("%s, %s: %d done, %d failed: %v", name, load, m.Done, m.Failed, m.Errors)
		}
		if m.P50 <= 0 || m.P99 < m.P50 {
			t.Errorf("%s, %s: p50 %v, p99 %v", name, load, m.P50, m.P99)
		}
		if (m.Anonymous > 0) != (name != nameDirect) {
			t.Errorf("%s, %s: %d bytes of memory", name, load, m.Anonymous)
		}
		if load == loadStreams && (m.FirstP50 <= 0 || m.GapP99 <= 0) {
			t.Errorf("%s: first event after %v s, %v s between events", name, m.FirstP50, m.GapP99)
		}
	}
	if n != 1 {
		t.Errorf("%s, %s: %d runs in one round", name, load, n)
	}
}

func TestJudge(t *testing.T) {
	set := &settings{Streams: 10, Events: 1, what: strings.Split(whatAll, ",")}
	var runs []measurement
	add := func(round int, target, load string, r result, cpu float64) {
		runs = append(runs, measurement{Round: round, Target: target, Load: load, result: r, CPU: cpu, Anonymous: 50 << 20})
	}
	for i, cpu := range []float64{1, 3, 2} {
		add(i, nameDsnode, loadClosed, result{Done: 1000, Seconds: 1}, cpu)
		add(i, nameGoProxy, loadClosed, result{Done: 2000, Seconds: 1}, 2)
		add(i, nameDirect, loadRate, result{P50: 0.060, P99: 0.061}, 0)
		add(i, nameDsnode, loadRate, result{P50: 0.0604, P99: 0.0625}, 0)
		add(i, nameDirect, loadStreams, result{Done: 10, FirstP50: 0.001}, 0)
		add(i, nameDsnode, loadStreams, result{Done: 10 - i/2, FirstP50: 0.003}, 0)
		add(i, nameDsnode, loadIdle, result{}, 0)
	}
	want := map[string]struct {
		median      float64
		first, then bool
	}{
		"CPU of a completion":               {2, false, false}, // of 1, 3 and 2
		"completions/s at 0 connections":    {0.5, false, false},
		"p50 at 0/s, upstream 60 ms":        {0.4, true, false},
		"p99 at 0/s, upstream 60 ms":        {1.5, true, false},
		"complete of 10 streams":            {10, false, false}, // one round lost one
		"first byte p50 of streams":         {2, true, false},
		"CPU of a stream's event":           {0, false, false}, // no target
		"between events p99 (20 ms)":        {0, false, false}, // no target
		"anonymous memory with the streams": {50, true, true},
		"anonymous memory, idle":            {50, true, false},
	}
	for _, v := range judge(runs, set) {
		w, ok := want[v.Title]
		if !ok {
			t.Errorf("unexpected: %s", v.Title)
			continue
		}
		delete(want, v.Title)
		if diff := v.Median - w.median; diff > 1e-9 || diff < -1e-9 || v.ReachedFirst != w.first || v.ReachedThen != w.then {
			t.Errorf("%s: %v, reached %v and %v; want %+v", v.Title, v.Median, v.ReachedFirst, v.ReachedThen, w)
		}
	}
	for title := range want {
		t.Errorf("not judged: %s", title)
	}
}

func TestReadWrk(t *testing.T) {
	const out = `Running 5s test @ http://127.0.0.1:1/v1/chat/completions
  2 threads and 32 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     7.63ms    5.04ms  69.33ms   84.63%
    Req/Sec     2.25k   271.41     2.77k    68.00%
  Latency Distribution
     50%  660.00us
     75%    9.42ms
     90%   13.19ms
     99%   26.02ms
  22412 requests in 5.01s, 30.27MB read
  Socket errors: connect 0, read 2, write 0, timeout 1
  Non-2xx or 3xx responses: 12
Requests/sec:   4474.59
`
	r, err := readWrk(out)
	if err != nil {
		t.Fatal(err)
	}
	if r.Done != 22400 || r.Failed != 15 || r.Seconds != 5.01 || r.P50 != 660e-6 || r.P99 != 26.02e-3 || len(r.Errors) != 2 {
		t.Errorf("%+v", r)
	}
	if _, err := readWrk("unable to connect"); err == nil {
		t.Error("no error for output that is not of wrk")
	}
}

func TestQuantiles(t *testing.T) {
	var d []time.Duration
	for i := range 101 {
		d = append(d, time.Duration(i)*time.Second)
	}
	if p50, p99 := quantile(d, 0.5), quantile(d, 0.99); p50 != 50 || p99 != 99 {
		t.Errorf("p50 %v, p99 %v", p50, p99)
	}
	if quantile(nil, 0.5) != 0 || median(nil) != 0 || median([]float64{3, 1}) != 2 || median([]float64{9, 1, 2}) != 2 {
		t.Error("wrong for empty or short input")
	}
}

func TestUsage(t *testing.T) {
	for _, args := range [][]string{
		{"-what", "speed"},
		{"-o", "xml"},
		{"-pairs", "0"},
		{"-events", "0"},
		{"-generator", "ab"},
		{"now"},
		{"-x"},
		{"soak", "-clients", "1"},
		{"soak", "x"},
		{"cache", "-pairs", "0"},
		{"cache", "-generator", "ab"},
		{"cache", "churn", "-times", "0"},
		{"cache", "churn", "x"},
	} {
		var out, progress strings.Builder
		if err := run(t.Context(), args, &out, &progress); err == nil || out.Len() > 0 {
			t.Errorf("%q: error %v, output %q", args, err, out.String())
		}
	}
}
