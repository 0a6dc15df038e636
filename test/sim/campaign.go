package sim

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Campaign runs plans, each in a process of its own, so that a panic or a virtual clock that
// stands still ends only one of them.
type Campaign struct {
	Parallel int
	Out      io.Writer
	// Replays is how often a plan that broke a law is run again; 0: never.
	Replays int
	Dir     string // for data directories

	mu    sync.Mutex // guards Out and what follows
	Plans int
	Time  time.Duration // virtual
	CPU   time.Duration // of the plans, without replays
	Found map[string]*Finding
}

// Finding is a kind of breach.
type Finding struct {
	Breach Breach
	Plan   *Plan // the smallest that breaks it
	Seeds  []uint64
	Rate   string
	Log    []string
}

// realLimit is for one plan on a busy machine. A plan takes seconds.
const realLimit = 5 * time.Minute

// Child environment: the file of the plan and that of the result.
const (
	envPlan   = "DSNODE_SIM_PLAN"
	envResult = "DSNODE_SIM_RESULT"
	envLog    = "DSNODE_SIM_LOG"
)

// run runs a plan in a child process.
func (c *Campaign) run(p *Plan, verbose bool) *Result {
	dir, err := os.MkdirTemp(c.Dir, "dsnode-sim-")
	if err != nil {
		return failed(p, err, "")
	}
	defer func() { _ = os.RemoveAll(dir) }() // a leftover harms nobody
	text, err := json.Marshal(p)
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "plan"), text, 0o600)
	}
	if err != nil {
		return failed(p, err, "")
	}
	binary, err := os.Executable()
	if err != nil {
		return failed(p, err, "")
	}
	ctx, cancel := context.WithTimeout(context.Background(), realLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, binary, "-test.run=^TestPlan$", "-test.timeout=0")
	cmd.Env = append(os.Environ(), envPlan+"="+filepath.Join(dir, "plan"), envResult+"="+filepath.Join(dir, "result"), "GOMAXPROCS=1", "GOGC=400")
	if verbose {
		cmd.Env = append(cmd.Env, envLog+"=info")
	}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr, cmd.Dir = &out, &out, dir
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGQUIT) } // it prints all goroutines
	cmd.WaitDelay = 10 * time.Second
	err = cmd.Run()
	var used time.Duration
	if cmd.ProcessState != nil {
		used = cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	}
	text, readErr := os.ReadFile(filepath.Join(dir, "result"))
	res := &Result{}
	if readErr == nil {
		readErr = json.Unmarshal(text, res)
	}
	if err = errors.Join(err, readErr); err != nil {
		if ctx.Err() != nil {
			err = fmt.Errorf("virtual time stands still: %w", err)
		}
		res = failed(p, err, out.String())
	}
	res.Plan, res.CPU = p, used
	return res
}

var panicLine = regexp.MustCompile(`(?m)^(panic|fatal error): .*$`)

// failed is the result of a process that has ended with an error.
func failed(p *Plan, err error, out string) *Result {
	what := panicLine.FindString(out)
	what = cmp.Or(what, err.Error())
	tail := strings.Split(out, "\n")
	return &Result{Plan: p, Breaches: []Breach{{What: what, Kind: "0 " + dull(what)}}, Log: tail[:min(len(tail), 400)]}
}

// planOf is the plan that another process gave to this one, else one without faults.
func planOf() (*Plan, slog.Level, error) {
	path, level := os.Getenv(envPlan), slog.LevelWarn
	if os.Getenv(envLog) != "" {
		level = slog.LevelInfo
	}
	p := &Plan{Seed: 1, Nodes: []int{1, 1, 1}, Every: time.Second, Body: 100}
	if path == "" {
		return p, level, nil
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, 0, err
	}
	return p, level, json.Unmarshal(text, p)
}

// report gives the result to the process that gave the plan; false if there is none.
func report(res *Result) (bool, error) {
	path := os.Getenv(envResult)
	if path == "" {
		return false, nil
	}
	text, err := json.Marshal(res)
	if err != nil {
		return true, err
	}
	return true, os.WriteFile(path, text, 0o600)
}

// Run runs the plans of these seeds, and goes on with the following ones until so much virtual
// time has passed.
func (c *Campaign) Run(seeds []uint64, least time.Duration) {
	c.Found = map[string]*Finding{}
	began := time.Now()
	queue := make(chan uint64)
	var work sync.WaitGroup
	for range c.Parallel {
		work.Go(func() {
			for seed := range queue {
				c.plan(newPlan(seed), began)
			}
		})
	}
	for _, s := range seeds {
		queue <- s
	}
	for next := seeds[len(seeds)-1] + 1; c.passed() < least; next++ {
		queue <- next
	}
	close(queue)
	work.Wait()
	c.printf("%d plans, %s of virtual time in %s (%s of CPU), %d kinds of breaches\n", c.Plans, c.Time.Round(time.Second), time.Since(began).Round(time.Second), c.CPU.Round(time.Second), len(c.Found))
}

func (c *Campaign) passed() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.Time
}

func (c *Campaign) printf(format string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, _ = fmt.Fprintf(c.Out, format, args...) // a log
}

func (c *Campaign) plan(p *Plan, began time.Time) {
	res := c.run(p, false)
	c.mu.Lock()
	c.Plans++
	c.Time += res.Virtual
	c.CPU += res.CPU
	var fresh []Breach
	for _, b := range res.Breaches {
		f := c.Found[b.Kind]
		if f == nil {
			f = &Finding{Breach: b, Plan: p, Log: res.Log}
			c.Found[b.Kind] = f
			fresh = append(fresh, b)
		}
		f.Seeds = append(f.Seeds, p.Seed)
	}
	_, _ = fmt.Fprintf(c.Out, "%7s seed %d %v: %s in %s of CPU, %d jobs, %d faults (%d left out), %d breaches\n",
		time.Since(began).Round(time.Second), p.Seed, p.Nodes, res.Virtual.Round(time.Second), res.CPU.Round(100*time.Millisecond), res.Jobs, len(p.Faults), res.Left, len(res.Breaches))
	for _, b := range res.Breaches {
		_, _ = fmt.Fprintf(c.Out, "        %s\n", b)
	}
	c.mu.Unlock()
	if c.Replays > 0 {
		for _, b := range fresh {
			c.replay(p, b)
		}
	}
}

// replay runs a plan again, to learn how often it breaks the law, and drops faults while half
// of the replays still do.
func (c *Campaign) replay(p *Plan, b Breach) {
	breaks, res := c.rate(p, b, c.Replays)
	rate := fmt.Sprintf("%d of %d", breaks, c.Replays)
	small := p
	if 2*breaks >= c.Replays {
		for i := 0; i < len(small.Faults) && len(small.Faults) > 1; {
			try := *small
			try.Faults = slices.Delete(slices.Clone(small.Faults), i, i+1)
			few := max(4, c.Replays/4)
			if n, r := c.rate(&try, b, few); 2*n >= few {
				small, res = &try, cmp.Or(r, res)
				continue
			}
			i++
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	f := c.Found[b.Kind]
	f.Plan, f.Rate = small, rate
	if res != nil {
		f.Log = res.Log
	}
	_, _ = fmt.Fprintf(c.Out, "        replayed: %s; law %d: %s\n", rate, b.Law, b.What)
	for _, fault := range small.Faults {
		_, _ = fmt.Fprintf(c.Out, "          %s\n", fault)
	}
}

// rate runs a plan n times, and returns how many runs break the law and one of those.
func (c *Campaign) rate(p *Plan, b Breach, n int) (breaks int, one *Result) {
	for i := range n {
		if breaks+n-i < (n+1)/2 && i >= 4 {
			break // it is rare, and exactly how rare does not matter
		}
		res := c.run(p, true)
		if slices.ContainsFunc(res.Breaches, func(o Breach) bool { return o.Kind == b.Kind }) {
			breaks++
			one = res
		}
	}
	return breaks, one
}

// write writes the plan, to run it again, and the log.
func (f *Finding) write(name string) error {
	text, err := json.MarshalIndent(f.Plan, "", " ")
	if err == nil {
		err = os.WriteFile(name+".json", text, 0o600)
	}
	return errors.Join(err, os.WriteFile(name+".log", []byte(f.Breach.String()+"\n"+strings.Join(f.Log, "\n")+"\n"), 0o600))
}
