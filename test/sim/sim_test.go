package sim

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

var (
	firstSeed = flag.Uint64("sim.first", 2, "the first seed")
	seedCount = flag.Int("sim.seeds", 2, "how many seeds")
	only      = flag.String("sim.only", "", "these seeds, with commas between them")
	hours     = flag.Float64("sim.hours", 0, "go on with further seeds until this much virtual time has passed")
	parallel  = flag.Int("sim.parallel", 2, "plans at a time")
	replays   = flag.Int("sim.replays", 0, "how often a plan that breaks a law is run again")
	out       = flag.String("sim.out", "", "a directory for the findings: plans and logs")
)

// TestPlan runs one plan: that of a campaign, whose child this process is, else a plan without
// faults.
func TestPlan(t *testing.T) {
	p, level, err := planOf()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp(memory(), "dsnode-sim-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) }) // a leftover harms nobody
	var res *Result
	synctest.Test(t, func(*testing.T) { res, err = simulate(dir, p, level) })
	if err != nil {
		t.Fatal(err)
	}
	if reported, err := report(res); reported || err != nil {
		if err != nil {
			t.Fatal(err)
		}
		return
	}
	for _, b := range res.Breaches {
		t.Error(b)
	}
	if res.Jobs < 20 {
		t.Errorf("only %d jobs were acknowledged", res.Jobs)
	}
}

// memory is where data directories are quick; empty for the default.
func memory() string {
	const shm = "/dev/shm"
	if info, err := os.Stat(shm); err == nil && info.IsDir() {
		return shm
	}
	return ""
}

func TestSimulate(t *testing.T) {
	c := &Campaign{Parallel: *parallel, Out: os.Stderr, Replays: *replays, Dir: memory()}
	if !testing.Verbose() {
		c.Out = t.Output()
	}
	var seeds []uint64
	for i := range *seedCount {
		seeds = append(seeds, *firstSeed+uint64(i))
	}
	if *only != "" {
		seeds = nil
		for text := range strings.SplitSeq(*only, ",") {
			s, err := strconv.ParseUint(text, 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			seeds = append(seeds, s)
		}
	}
	c.Run(seeds, time.Duration(*hours*float64(time.Hour)))
	for _, f := range c.Found {
		t.Errorf("seeds %v, replays %q: %s\n%s", f.Seeds, f.Rate, f.Breach, f.Plan)
		if *out == "" {
			continue
		}
		name := filepath.Join(*out, fmt.Sprintf("law%d-seed%d", f.Breach.Law, f.Plan.Seed))
		if err := f.write(name); err != nil {
			t.Error(err)
		}
	}
}
