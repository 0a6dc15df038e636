//go:build linux

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dsnode/dsnode/node/admin"
)

// Targets of an idle node.
const (
	idleMemory = 100 << 20
	idleCPU    = 0.02 // of one core
)

// idle is three sites with many finished jobs and no requests.
type idle struct {
	jobs     int
	length   time.Duration
	settle   time.Duration
	dir      string
	basePort int
	binary   string
	profile  string
	sandbox  *sandbox
	dev      *process
	nodes    []*idleNode
	progress io.Writer
}

// idleNode is the node of one site.
type idleNode struct {
	name      string
	pid       int
	api, addr string // host:port for clients and for operators
	admin     *admin.Client
}

// idleSites are the sites of dsnode dev.
var idleSites = []string{"shanghai-a", "shanghai-b", "beijing"}

// runIdle fills three sites with finished jobs, restarts them, and measures what they
// use without requests.
func runIdle(ctx context.Context, args []string, stdout, stderr io.Writer) (err error) {
	b := idle{progress: stderr}
	flags := flag.NewFlagSet("idle", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.IntVar(&b.jobs, "jobs", 1_000_000, "finished jobs; each is on all three nodes")
	flags.DurationVar(&b.length, "for", time.Minute, "how long to measure")
	flags.DurationVar(&b.settle, "settle", time.Minute, "how long to wait after the start before measuring")
	flags.StringVar(&b.dir, "data", "", "the cluster's directory, which is kept; jobs in it are not made again (default: a temporary directory)")
	flags.IntVar(&b.basePort, "base-port", 18100, "first port")
	flags.StringVar(&b.binary, "binary", "", "dsnode binary (default: build it)")
	flags.StringVar(&b.profile, "profile", "", "write CPU and heap profiles of each node to files with this prefix, after the measurement")
	if err := parse(flags, args); err != nil {
		return err
	}
	if b.jobs < 0 || b.length < time.Second {
		return fmt.Errorf("%w: -jobs must not be negative, and -for be at least a second", errUsage)
	}
	if b.sandbox, err = newSandbox(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.sandbox.close()) }()
	if b.dir == "" {
		b.dir = filepath.Join(b.sandbox.dir, "cluster")
	}
	if b.binary == "" {
		if b.binary, err = b.sandbox.buildNode(ctx); err != nil {
			return err
		}
	}
	if err := b.start(ctx); err != nil {
		return err
	}
	filled, err := b.fill(ctx)
	if err != nil {
		return err
	}
	if filled {
		b.say("before the restart, with memory still in use from the submissions:\n")
		if err := b.measure(ctx, stdout); err != nil {
			return err
		}
		b.dev.stop()
		if err := b.start(ctx); err != nil {
			return err
		}
	}
	b.say("restarted with %d finished jobs; waiting %v until it has settled\n", b.jobs, b.settle)
	if err := pause(ctx, b.settle); err != nil {
		return err
	}
	if err := b.measure(ctx, stdout); err != nil {
		return err
	}
	return b.writeProfiles(ctx)
}

func (b *idle) say(format string, args ...any) {
	_, _ = fmt.Fprintf(b.progress, format, args...) // only for a person
}

// start starts the cluster in its directory and waits until it is healthy.
func (b *idle) start(ctx context.Context) (err error) {
	args := []string{"dev", "--data-dir", b.dir, "--base-port", fmt.Sprint(b.basePort)}
	if _, err := os.Stat(b.dir); errors.Is(err, os.ErrNotExist) {
		file := filepath.Join(b.sandbox.dir, "cluster.yaml")
		if err := os.WriteFile(file, []byte(b.config()), 0o600); err != nil {
			return fmt.Errorf("write the configuration: %w", err)
		}
		args = append(args, "--config", file)
	}
	begun := time.Now()
	cmd := exec.Command(b.binary, args...)
	// dsnode dev records the running cluster there; this must not be the user's record.
	cmd.Env = append(os.Environ(), "XDG_CACHE_HOME="+b.sandbox.dir)
	if b.dev, err = b.sandbox.start("dev", cmd); err != nil {
		return err
	}
	b.nodes = nil
	for i, site := range idleSites {
		n := &idleNode{
			name: site + "-1", api: fmt.Sprintf("127.0.0.1:%d", b.basePort+100*i+1),
			addr: fmt.Sprintf("127.0.0.1:%d", b.basePort+100*i+2),
		}
		if n.admin, err = admin.NewClient([]string{"http://" + n.addr}, admin.ClientOptions{Author: "bench", Timeout: 20 * time.Second}); err != nil {
			return err
		}
		b.nodes = append(b.nodes, n)
	}
	err = b.wait(ctx, 5*time.Minute, func() error {
		for _, n := range b.nodes {
			s, err := n.admin.Status(ctx)
			if err != nil {
				return err
			}
			if !s.Healthy {
				return fmt.Errorf("%s is not healthy: %s", n.name, strings.Join(s.Reasons, "; "))
			}
			i := slices.IndexFunc(s.Nodes, func(other admin.NodeStatus) bool { return other.Name == n.name })
			if i < 0 || s.Nodes[i].PID == nil {
				return fmt.Errorf("%s does not show its process id", n.name)
			}
			n.pid = *s.Nodes[i].PID
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("start three sites: %w\n%s", err, b.dev.logTail())
	}
	b.say("three sites are healthy %.1f s after their start\n", time.Since(begun).Seconds())
	return nil
}

// config returns a configuration with model servers that answer at once and a long
// retention of jobs.
func (b *idle) config() string {
	var sites, upstreams, serve strings.Builder
	for i, site := range idleSites {
		city := strings.TrimSuffix(strings.TrimSuffix(site, "-a"), "-b")
		fmt.Fprintf(&sites, "  %s: {city: %s, priority: %d}\n", site, city, i+1)
		fmt.Fprintf(&upstreams, "  %s-server: {site: %s, url: \"http://127.0.0.1:%d/v1\"}\n", site, site, b.basePort+100*i+90)
		fmt.Fprintf(&serve, "{upstream: %s-server, model: \"deepseek-chat@first=0s,rate=0,tokens=8\"}, ", site)
	}
	return fmt.Sprintf("version: 1\nsites:\n%supstreams:\n%smodels:\n  deepseek-chat: {serve: [%s]}\njobs: {retention: 720h, max_queued: 1000000, concurrency: 64}\n",
		&sites, &upstreams, strings.TrimSuffix(serve.String(), ", "))
}

// wait calls try until it returns no error.
func (b *idle) wait(ctx context.Context, most time.Duration, try func() error) error {
	deadline := time.Now().Add(most)
	for {
		err := try()
		if err == nil || time.Now().After(deadline) {
			return err
		}
		if gone := b.dev.alive(); gone != nil {
			return gone
		}
		if err := pause(ctx, 100*time.Millisecond); err != nil {
			return err
		}
	}
}

// finished returns how many jobs a node shows as finished, and how many as not finished.
func (n *idleNode) finished(ctx context.Context) (done, open int, err error) {
	s, err := n.admin.Status(ctx)
	if err != nil {
		return 0, 0, err
	}
	if s.Jobs == nil {
		return 0, 0, fmt.Errorf("%s shows no jobs", n.name)
	}
	for to, counts := range map[*int][]*int64{&done: {s.Jobs.Succeeded, s.Jobs.Failed}, &open: {s.Jobs.Queued, s.Jobs.Running}} {
		for _, c := range counts {
			if c == nil {
				return 0, 0, fmt.Errorf("%s does not show all counts of jobs", n.name)
			}
			*to += int(*c)
		}
	}
	return done, open, nil
}

// submitters is the number of clients per node while the cluster is filled.
const submitters = 64

// maxWaiting bounds the jobs that wait while the cluster is filled.
const maxWaiting = 5000

// fill submits jobs to all three sites until there are enough, and waits until every
// node shows all of them as finished. It returns false if there were enough before.
func (b *idle) fill(ctx context.Context) (filled bool, err error) {
	var have int
	if err := b.wait(ctx, time.Minute, func() error {
		have, _, err = b.nodes[0].finished(ctx)
		return err
	}); err != nil {
		return false, err
	}
	if have >= b.jobs {
		return false, nil
	}
	begun := time.Now()
	var next atomic.Int64
	var waiting atomic.Bool
	next.Store(int64(have))
	fctx, stop := context.WithCancel(ctx)
	defer stop()
	var clients sync.WaitGroup
	defer clients.Wait()
	for _, n := range b.nodes {
		for range submitters {
			clients.Go(func() { n.submitAll(fctx, &next, int64(b.jobs), &waiting) })
		}
	}
	for logged := time.Now(); ; {
		if err := pause(ctx, 250*time.Millisecond); err != nil {
			return true, err
		}
		if gone := b.dev.alive(); gone != nil {
			return true, gone
		}
		all, most := true, 0
		for _, n := range b.nodes {
			done, open, err := n.finished(ctx)
			if err != nil {
				return true, err
			}
			all = all && done >= b.jobs && open == 0
			most = max(most, open)
			have = done
		}
		waiting.Store(most > maxWaiting)
		if time.Since(logged) > 10*time.Second {
			logged = time.Now()
			b.say("%d jobs submitted, %d finished, %d waiting\n", min(next.Load(), int64(b.jobs)), have, most)
		}
		if all {
			b.say("%d jobs finished in %.0f s\n", b.jobs, time.Since(begun).Seconds())
			return true, nil
		}
	}
}

// submitAll submits jobs unless too many are waiting. All clients share the counter
// next.
func (n *idleNode) submitAll(ctx context.Context, next *atomic.Int64, jobs int64, waiting *atomic.Bool) {
	var c *client
	defer func() {
		if c != nil {
			c.close()
		}
	}()
	i := next.Add(1)
	for ctx.Err() == nil && i <= jobs {
		if waiting.Load() {
			_ = pause(ctx, 20*time.Millisecond) // the loop ends with ctx
			continue
		}
		var err error
		if c == nil {
			c, err = dial(ctx, n.api)
		}
		if err == nil {
			err = c.submit(n.job(i))
		}
		if err == nil {
			i = next.Add(1)
			continue
		}
		if c != nil {
			c.close()
			c = nil
		}
		_ = pause(ctx, 50*time.Millisecond) // the queue is full, or the node not ready yet
	}
}

// job returns the request that submits a small job.
func (n *idleNode) job(i int64) []byte {
	body := fmt.Sprintf(`{"endpoint":"/v1/chat/completions","body":{"model":"deepseek-chat","messages":[{"role":"user","content":"What is the sum of %d and %d, and why is it?"}]}}`, i, i/7)
	return fmt.Appendf(nil, "POST /v1/jobs HTTP/1.1\r\nHost: %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", n.api, len(body), body)
}
