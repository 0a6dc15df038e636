//go:build linux

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/sync/errgroup"
)

// jobsSettings are the flags of `bench jobs`.
type jobsSettings struct {
	pairs    int
	seconds  float64
	inFlight []int
	// durability of the submissions, and the number of nodes of the only site
	durability string
	nodes      int
	peer       string // command that prints "N msg/s", in place of RabbitMQ; peerNone: nothing
	binary     string // dsnode; empty: build it
	profile    string // prefix of profiles of dsnode's first node
	json       bool
}

// jobsRun is one measurement of one system.
type jobsRun struct {
	Round     int     `json:"round"`
	System    string  `json:"system"`
	InFlight  int     `json:"in_flight"`
	PerSecond float64 `json:"per_second"`
	P50       float64 `json:"p50_seconds,omitempty"`
	P99       float64 `json:"p99_seconds,omitempty"`
	CPU       float64 `json:"cpu_seconds_per_1000,omitempty"`
	// Publisher is the CPU time of this process for 1000 submissions.
	Publisher float64 `json:"publisher_cpu_seconds_per_1000,omitempty"`
	Failed    int     `json:"failed,omitempty"`
}

const (
	jobBytes = 1024
	peerNone = "none"
)

func runJobs(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	var set jobsSettings
	inFlight := ""
	flags := flag.NewFlagSet("bench jobs", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.IntVar(&set.pairs, "pairs", 5, "rounds")
	flags.Float64Var(&set.seconds, "seconds", 3, "length of each measurement")
	flags.StringVar(&inFlight, "in-flight", "1,64", "submissions in flight")
	flags.StringVar(&set.durability, "durability", "node", "of the submissions: node or site")
	flags.IntVar(&set.nodes, "nodes", 1, "nodes of the site")
	flags.StringVar(&set.peer, "peer", "", `command to measure in place of RabbitMQ; {n} is replaced by the number in flight, {s} by the seconds; it must print "N msg/s", and may print p50=1.2ms and p99=3ms; none measures dsnode alone`)
	flags.StringVar(&set.binary, "binary", "", "dsnode binary (default: build it)")
	flags.StringVar(&set.profile, "profile", "", "write CPU and allocation profiles of dsnode's first node to files with this prefix, one per number in flight (slows it down by some %)")
	flags.BoolVar(&set.json, "json", false, "print the measurements as JSON lines")
	if err := parse(flags, args); err != nil {
		return err
	}
	for text := range strings.SplitSeq(inFlight, ",") {
		n, err := strconv.Atoi(text)
		if err != nil || n < 1 {
			return fmt.Errorf("%w: -in-flight %q is not a list of numbers", errUsage, inFlight)
		}
		set.inFlight = append(set.inFlight, n)
	}
	s, err := newSandbox()
	if err != nil {
		return err
	}
	runs, err := set.compare(ctx, s, stderr)
	if closed := s.close(); err == nil {
		err = closed
	}
	if err != nil {
		return err
	}
	return set.print(stdout, runs)
}

// compare measures both systems in turn with each number in flight. Each round has the
// reverse order of the one before.
func (set *jobsSettings) compare(ctx context.Context, s *sandbox, progress io.Writer) ([]jobsRun, error) {
	ours, err := s.startJobNodes(ctx, set)
	if err != nil {
		return nil, err
	}
	theirs, err := set.startPeer(ctx, s)
	if err != nil {
		return nil, err
	}
	var runs []jobsRun
	for round := range set.pairs {
		for _, n := range set.inFlight {
			both := []func(context.Context, int) (jobsRun, error){ours}
			if theirs != nil {
				both = append(both, theirs)
			}
			if round%2 == 1 {
				slices.Reverse(both)
			}
			for _, measure := range both {
				publishing := ownCPU()
				run, err := measure(ctx, n)
				if err != nil {
					return nil, err
				}
				run.Publisher = (ownCPU() - publishing).Seconds() / (run.PerSecond * set.seconds) * 1000
				run.Round, run.InFlight = round+1, n
				runs = append(runs, run)
				if _, err := fmt.Fprintf(progress, "round %d: %-12s %3d in flight: %8.0f/s  p50 %6.2f ms  p99 %6.2f ms  CPU %3.0f µs, of the publisher %3.0f µs\n",
					run.Round, run.System, n, run.PerSecond, run.P50*1e3, run.P99*1e3, run.CPU*1e3, run.Publisher*1e3); err != nil {
					return nil, err
				}
			}
		}
	}
	return runs, nil
}

// startJobNodes starts dsnode with job execution paused, so that only submissions are
// measured.
func (s *sandbox) startJobNodes(ctx context.Context, set *jobsSettings) (func(context.Context, int) (jobsRun, error), error) {
	binary := set.binary
	if binary == "" {
		var err error
		if binary, err = s.buildNode(ctx); err != nil {
			return nil, err
		}
	}
	text := fmt.Sprintf("version: 1\nsites: {%s: {city: here, priority: 1}}\nupstreams: {none: {site: %s, url: \"http://127.0.0.1:9/v1\"}}\n"+
		"models: {m: {serve: [{upstream: none, model: m}]}}\njobs: {paused: true, max_queued: 1000000}\n", siteName, siteName)
	nodes, err := s.startSite(ctx, binary, text, set.nodes)
	if err != nil {
		return nil, err
	}
	first := nodes[0]
	job := fmt.Sprintf(`{"endpoint":"/v1/chat/completions","durability":%q,"body":{"model":"m","messages":[{"role":"user","content":"`, set.durability)
	job += strings.Repeat("x", jobBytes-len(job)-6) + `"}]}}`
	request := fmt.Appendf(nil, "POST /v1/jobs HTTP/1.1\r\nHost: %s\r\nContent-Type: application/json\r\nAuthorization: Bearer %s\r\nContent-Length: %d\r\n\r\n%s",
		first.api, first.key, len(job), job)
	if err := first.until(ctx, func() error { // succeeds once the cluster has agreed on a data key
		c, err := dial(ctx, first.api)
		if err != nil {
			return err
		}
		defer c.close()
		return c.submit(request)
	}); err != nil {
		return nil, fmt.Errorf("submit a first job: %w", err)
	}
	return func(ctx context.Context, n int) (jobsRun, error) {
		before, err := cpuOf(nodes)
		if err != nil {
			return jobsRun{}, err
		}
		done := set.profileOf(ctx, first, n)
		r := closedLoopOf(ctx, first.api, (*client).submit, request, n, set.length())
		if err := done(); err != nil {
			return jobsRun{}, err
		}
		after, err := cpuOf(nodes)
		if err != nil {
			return jobsRun{}, err
		}
		if r.Done == 0 {
			return jobsRun{}, fmt.Errorf("no job was accepted: %v", r.Errors)
		}
		return jobsRun{
			System: "dsnode", PerSecond: float64(r.Done) / r.Seconds, P50: r.P50, P99: r.P99, Failed: r.Failed,
			CPU: (after - before).Seconds() / float64(r.Done) * 1000,
		}, nil
	}, nil
}

func (set *jobsSettings) length() time.Duration {
	return time.Duration(set.seconds * float64(time.Second))
}

// profileOf writes profiles of a node during a measurement if -profile is set. The
// returned function waits for them.
func (set *jobsSettings) profileOf(ctx context.Context, n *dsnode, inFlight int) (done func() error) {
	if set.profile == "" {
		return func() error { return nil }
	}
	var all errgroup.Group
	for _, kind := range []string{"profile", "allocs"} {
		all.Go(func() error {
			return n.profile(ctx, kind, set.length(), fmt.Sprintf("%s.%d.%s.pb.gz", set.profile, inFlight, kind))
		})
	}
	return all.Wait
}

func cpuOf(nodes []*dsnode) (time.Duration, error) {
	var all time.Duration
	for _, n := range nodes {
		d, err := cpuTime(n.pid())
		if err != nil {
			return 0, err
		}
		all += d
	}
	return all, nil
}

// submit sends one job and reads the 202. It parses as little of the HTTP response as
// possible, since the client of the other system has little to parse too.
func (c *client) submit(request []byte) error {
	if err := c.conn.SetDeadline(time.Now().Add(answerWithin)); err != nil {
		return err
	}
	if _, err := c.conn.Write(request); err != nil {
		return err
	}
	status, length := "", -1
	for {
		line, err := c.in.ReadSlice('\n')
		if err != nil {
			return err
		}
		line = bytes.TrimRight(line, "\r\n")
		switch value, found := bytes.CutPrefix(line, contentLength); {
		case status == "":
			status = string(line)
			continue
		case found:
			if length, err = strconv.Atoi(string(value)); err != nil {
				return fmt.Errorf("%w: %q", errWrong, line)
			}
			continue
		case len(line) > 0:
			continue
		}
		break
	}
	if length < 0 || length > c.in.Size() {
		return fmt.Errorf("%w: a body of %d bytes", errWrong, length)
	}
	text, err := c.in.Peek(length)
	if err != nil {
		return err
	}
	if status != accepted || !bytes.HasPrefix(text, jobBegins) {
		return fmt.Errorf("%w: %s: %.200s", errWrong, status, text)
	}
	_, err = c.in.Discard(length)
	return err
}

const accepted = "HTTP/1.1 202 Accepted"

var (
	contentLength = []byte("Content-Length: ")
	jobBegins     = []byte(`{"id":"job_`)
)

var messagesPerSecond = regexp.MustCompile(`([0-9.]+) msg/s`)

// startPeer returns the measurement of the other system: RabbitMQ, a command, or nil.
func (set *jobsSettings) startPeer(ctx context.Context, s *sandbox) (func(context.Context, int) (jobsRun, error), error) {
	switch set.peer {
	case peerNone:
		return nil, nil //nolint:nilnil // no peer is no error
	case "":
		r, err := s.startRabbit(ctx)
		if err != nil {
			return nil, err
		}
		return func(ctx context.Context, n int) (jobsRun, error) {
			return r.publish(ctx, n, set.length())
		}, nil
	}
	return func(ctx context.Context, n int) (jobsRun, error) {
		words := strings.Fields(strings.NewReplacer("{n}", strconv.Itoa(n), "{s}", fmt.Sprint(set.seconds)).Replace(set.peer))
		out, err := exec.CommandContext(ctx, words[0], words[1:]...).CombinedOutput()
		found := messagesPerSecond.FindSubmatch(out)
		if err != nil || found == nil {
			return jobsRun{}, fmt.Errorf("%s: %w: %s", set.peer, err, out)
		}
		rate, err := strconv.ParseFloat(string(found[1]), 64)
		return jobsRun{System: "peer", PerSecond: rate, P50: printed(out, "p50="), P99: printed(out, "p99=")}, err
	}, nil
}

// printed returns a time that a command has printed, in seconds, 0 without one.
func printed(out []byte, name string) float64 {
	_, rest, _ := strings.Cut(string(out), name)
	word, _, _ := strings.Cut(rest, " ")
	d, err := time.ParseDuration(word)
	if err != nil {
		return 0
	}
	return d.Seconds()
}

// print shows the ratio of each round and the median.
func (set *jobsSettings) print(w io.Writer, runs []jobsRun) error {
	if set.json {
		out := json.NewEncoder(w)
		for _, r := range runs {
			if err := out.Encode(r); err != nil {
				return err
			}
		}
		return nil
	}
	p := &printer{w: tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)}
	for _, n := range set.inFlight {
		var ratios, rates, p50, p99, cpu []float64
		for round := range set.pairs {
			var ours, theirs jobsRun
			for _, r := range runs {
				switch {
				case r.Round != round+1 || r.InFlight != n:
				case r.System == "dsnode":
					ours = r
				default:
					theirs = r
				}
			}
			ratios, rates = append(ratios, ours.PerSecond/theirs.PerSecond), append(rates, ours.PerSecond)
			p50, p99, cpu = append(p50, ours.P50*1e3), append(p99, ours.P99*1e3), append(cpu, ours.CPU*1e3)
		}
		beside := "alone"
		if set.peer != peerNone {
			beside = fmt.Sprintf("%.2f × the peer (rounds %.2f)", median(ratios), ratios)
		}
		p.f("%d in flight, durability %s: %s; %.0f/s, p50 %.2f ms, p99 %.2f ms, %.0f µs of CPU per job\n",
			n, set.durability, beside, median(rates), median(p50), median(p99), median(cpu))
	}
	if p.err == nil {
		p.err = p.w.Flush()
	}
	return p.err
}
