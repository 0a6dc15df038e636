//go:build linux

package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"
)

// Names of the targets.
const (
	nameDirect  = "direct"
	nameDsnode  = "dsnode"
	nameGoProxy = "goproxy"
	nameNginx   = "nginx"
	nameBeside  = "beside" // another dsnode binary
)

// Names of the loads.
const (
	loadClosed  = "closed"
	loadRate    = "rate"
	loadStreams = "streams"
	loadIdle    = "idle" // no load, right after the start
)

// settings of a comparison.
type settings struct {
	Pairs       int     `json:"pairs"`
	Seconds     float64 `json:"seconds"` // length of the closed loop and of the fixed rate
	Connections int     `json:"connections"`
	Rate        float64 `json:"rate"`
	Streams     int     `json:"streams"`
	Events      int     `json:"events"`
	what        []string
	wrk         string // path; empty: the built-in generator
	nginx       string // path; empty: not measured
	binary      string // dsnode; empty: build it
	beside      string // another dsnode; empty: none
	profile     string // prefix of CPU profiles of dsnode
	conf        string // appended to cluster.yaml
}

func (s *settings) length() time.Duration { return time.Duration(s.Seconds * float64(time.Second)) }

func (s *settings) wants(what ...string) bool {
	return slices.ContainsFunc(what, func(w string) bool { return slices.Contains(s.what, w) })
}

// measurement is one load on one target in one round.
type measurement struct {
	Round  int    `json:"round"`
	Target string `json:"target"`
	Load   string `json:"load"`
	result
	CPU       float64 `json:"cpu_seconds"`     // of the proxy's process
	Anonymous int64   `json:"anonymous_bytes"` // its maximum
	Elsewhere float64 `json:"elsewhere_cpus"`  // CPUs that other processes kept busy
}

// comparison is the whole result, as -json writes it.
type comparison struct {
	Machine  machine           `json:"machine"`
	Settings settings          `json:"settings"`
	Versions map[string]string `json:"versions"`
	Runs     []measurement     `json:"runs"`
	Verdicts []verdict         `json:"verdicts"`
}

const whatAll = "cpu,rps,latency,streams,memory"

func runCompare(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	var s settings
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.IntVar(&s.Pairs, "pairs", 5, "rounds; in each, every proxy is started again and gets each load in turn")
	flags.Float64Var(&s.Seconds, "seconds", 5, "length of the closed loop and of the fixed rate")
	flags.IntVar(&s.Connections, "connections", 32, "connections of the closed loop")
	flags.Float64Var(&s.Rate, "rate", 1000, "requests per second of the fixed rate")
	flags.IntVar(&s.Streams, "streams", 500, "streams, started within half a second")
	flags.IntVar(&s.Events, "events", 50, "events of each stream, 20 ms apart")
	what := flags.String("what", whatAll, "what to measure, separated by commas")
	file := flags.String("json", "", "also write everything to this file")
	format := flags.String("o", "table", "table or json")
	generator := flags.String("generator", "auto", "of the closed loop: wrk, own, or auto for wrk if it is installed")
	flags.StringVar(&s.binary, "binary", "", "dsnode binary (default: build it)")
	flags.StringVar(&s.beside, "beside", "", "another dsnode binary to measure too, such as an older one")
	flags.StringVar(&s.profile, "profile", "", "write CPU profiles of dsnode to files with this prefix, one per load (slows it down by some %)")
	flags.StringVar(&s.conf, "cluster", "", "text to append to cluster.yaml")
	if err := parse(flags, args); err != nil {
		return err
	}
	s.what = strings.Split(*what, ",")
	for _, w := range s.what {
		if !slices.Contains(strings.Split(whatAll, ","), w) {
			return fmt.Errorf("%w: -what %q: write some of %s", errUsage, w, whatAll)
		}
	}
	switch {
	case *format != "table" && *format != "json":
		return fmt.Errorf("%w: -o %q: write table or json", errUsage, *format)
	case s.Pairs < 1 || s.Seconds <= 0 || s.Connections < 1 || s.Rate <= 0 || s.Streams < 1:
		return fmt.Errorf("%w: numbers must be positive", errUsage)
	case s.Events < 1 || s.Events > maxEvents:
		return fmt.Errorf("%w: -events must be between 1 and %d", errUsage, maxEvents)
	}
	if err := s.findTools(*generator, stderr); err != nil {
		return err
	}
	c, err := compare(ctx, s, stderr)
	if err != nil {
		return err
	}
	text, err := json.MarshalIndent(c, "", " ")
	if err != nil {
		return fmt.Errorf("encode the figures: %w", err)
	}
	if *file != "" {
		if err := os.WriteFile(*file, append(text, '\n'), 0o644); err != nil {
			return fmt.Errorf("write the figures: %w", err)
		}
	}
	if *format == "json" {
		_, err = fmt.Fprintf(stdout, "%s\n", text)
		return err
	}
	return c.print(stdout)
}

func (s *settings) findTools(generator string, stderr io.Writer) error {
	wrk, err := exec.LookPath("wrk")
	switch {
	case generator == "wrk" && err != nil:
		return fmt.Errorf("wrk is not installed (Debian: apt-get install wrk): %w", err)
	case generator == "wrk", generator == "auto" && err == nil:
		s.wrk = wrk
	case generator != "auto" && generator != "own":
		return fmt.Errorf("%w: -generator %q: write wrk, own or auto", errUsage, generator)
	}
	if s.nginx, err = findNginx(); err != nil {
		fmt.Fprintf(stderr, "%v: not measured\n", err)
	}
	return nil
}

// compare runs the rounds.
func compare(ctx context.Context, set settings, progress io.Writer) (c *comparison, err error) {
	s, err := newSandbox()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	c = &comparison{Machine: thisMachine(), Settings: set}
	if set.binary == "" {
		if set.binary, err = s.buildNode(ctx); err != nil {
			return nil, err
		}
	}
	c.Versions = versions(ctx, set)
	_, upstream, err := s.startSelf("upstream", childUpstream)
	if err != nil {
		return nil, err
	}
	for i := range set.Pairs {
		r := round{sandbox: s, set: &set, number: i, upstream: upstream, progress: progress}
		runs, err := r.run(ctx)
		c.Runs = append(c.Runs, runs...)
		if err != nil {
			return nil, fmt.Errorf("round %d: %w", i+1, err)
		}
	}
	c.Verdicts = judge(c.Runs, &set)
	return c, nil
}

func versions(ctx context.Context, set settings) map[string]string {
	found := map[string]string{"generator": "own"}
	ask := func(name, binary string, args ...string) {
		// nginx prints its version to stderr; wrk prints it and exits with an error.
		out, _ := exec.CommandContext(ctx, binary, args...).CombinedOutput()
		line, _, _ := strings.Cut(string(out), "\n")
		found[name] = strings.TrimPrefix(line, "nginx version: ")
	}
	ask(nameDsnode, set.binary, "version")
	if set.beside != "" {
		ask(nameBeside, set.beside, "version")
	}
	if set.nginx != "" {
		ask(nameNginx, set.nginx, "-v")
	}
	if set.wrk != "" {
		ask("generator", set.wrk, "-v")
	}
	return found
}
