//go:build linux

package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"path/filepath"
	"sync"
	"text/tabwriter"
	"time"
)

// churnSettings are the flags of `bench cache churn`.
type churnSettings struct {
	pairs      int
	rate       float64 // hits per second
	churn      float64 // new questions per second
	hot        int     // questions that are repeated
	answer     int     // bytes of a new answer
	local      int64   // bounds of the tiers that must evict
	shared     int64
	times      float64 // multiple of the greater bound that goes through the tiers
	binary     string
	json       bool
	roomLocal  int64 // bounds of the tiers that need not evict
	roomShared int64
}

// keptPart is the share of an answer's bytes that reaches the file: base64 of random
// bytes compresses to three quarters.
const keptPart = 0.76

// churnRun is one measurement. Times are in seconds, sizes in bytes.
type churnRun struct {
	Round    int     `json:"round"`
	Evicting bool    `json:"evicting"`
	Hits     int     `json:"hits"`
	New      int     `json:"new_questions"`
	Late     int     `json:"late"`
	P50      float64 `json:"p50_seconds"`
	P99      float64 `json:"p99_seconds"`
	P999     float64 `json:"p999_seconds"`
	// Shared counts hot questions that the file answered, Missed those that the upstream
	// answered.
	Shared int `json:"shared_hits"`
	Missed int `json:"missed"`
	// The largest sizes measured, and the bounds.
	Local       int64   `json:"local_bytes"`
	LocalBound  int64   `json:"local_bound"`
	File        int64   `json:"file_bytes"`
	FileBound   int64   `json:"file_bound"`
	Idle        int64   `json:"anonymous_bytes_before"`
	Anonymous   int64   `json:"anonymous_bytes"`
	DroppedFull int     `json:"writes_dropped"`
	Elsewhere   float64 `json:"elsewhere_cpus"`
}

func runChurn(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	var set churnSettings
	flags := flag.NewFlagSet("bench cache churn", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.IntVar(&set.pairs, "pairs", 5, "rounds, each with a node whose cache must evict and one whose cache need not")
	flags.Float64Var(&set.rate, "rate", 1000, "requests per second for cached questions")
	flags.Float64Var(&set.churn, "churn", 500, "new questions per second")
	flags.IntVar(&set.hot, "hot", 64, "questions that are repeated")
	flags.IntVar(&set.answer, "answer", 16<<10, "bytes of an answer to a new question")
	flags.Int64Var(&set.local, "local", 16<<20, "bound in bytes of the tier in memory, when it must evict")
	flags.Int64Var(&set.shared, "shared", 16<<20, "bound in bytes of the file, when it must evict")
	flags.Float64Var(&set.times, "times", 10, "multiple of the greater bound that goes through the tiers")
	flags.StringVar(&set.binary, "binary", "", "dsnode binary (default: build it)")
	flags.BoolVar(&set.json, "json", false, "print the measurements as JSON lines")
	if err := parse(flags, args); err != nil {
		return err
	}
	if set.pairs < 1 || set.rate <= 0 || set.churn <= 0 || set.hot < 1 || set.answer < 1 || set.answer > 1<<20 || set.times <= 0 {
		return fmt.Errorf("%w: numbers must be positive, and -answer 1 MiB at most", errUsage)
	}
	through := int64(set.length().Seconds() * set.churn * float64(set.answer+1024))
	set.roomLocal, set.roomShared = 2*through+set.local, 3*through+set.shared
	s, err := newSandbox()
	if err != nil {
		return err
	}
	runs, err := set.compare(ctx, s, stderr)
	if err = errors.Join(err, s.close()); err != nil {
		return err
	}
	return set.print(stdout, runs)
}

// length returns the time until enough bytes have gone through both tiers.
func (set *churnSettings) length() time.Duration {
	through := set.times * float64(max(set.local, int64(float64(set.shared)/keptPart)))
	return time.Duration(through / (set.churn * float64(set.answer)) * float64(time.Second))
}

func (set *churnSettings) compare(ctx context.Context, s *sandbox, progress io.Writer) (runs []churnRun, err error) {
	if set.binary == "" {
		if set.binary, err = s.buildNode(ctx); err != nil {
			return nil, err
		}
	}
	_, upstream, err := s.startSelf("upstream", childUpstream)
	if err != nil {
		return nil, err
	}
	fmt.Fprintf(progress, "each of %d measurements takes %s\n", 2*set.pairs, set.length().Round(time.Second))
	for round := range set.pairs {
		for i := range 2 {
			evicting := (round+i)%2 == 0
			run, err := set.measure(ctx, s, upstream, fmt.Sprintf("%s-%d-%v", nameDsnode, round+1, evicting), evicting)
			if err != nil {
				return nil, fmt.Errorf("round %d, evicting %v: %w", round+1, evicting, err)
			}
			run.Round = round + 1
			runs = append(runs, run)
			fmt.Fprintf(progress, "round %d, evicting %-5v: p50 %.2f ms, p99 %.2f ms, p99.9 %.2f ms of %d hits (%d late, %d from the file, %d missed) with %d new questions; memory tier %s of %s, file %s of %s, anonymous %s (%s before), %d writes dropped; other processes used %.2f CPUs\n",
				run.Round, evicting, run.P50*1e3, run.P99*1e3, run.P999*1e3, run.Hits, run.Late, run.Shared, run.Missed, run.New,
				inMiB(run.Local), inMiB(run.LocalBound), inMiB(run.File), inMiB(run.FileBound), inMiB(run.Anonymous), inMiB(run.Idle), run.DroppedFull, run.Elsewhere)
		}
	}
	return runs, nil
}

// measure starts a node, sends hot and new questions at their rates, and watches the
// sizes of the tiers and of the memory.
func (set *churnSettings) measure(ctx context.Context, s *sandbox, upstream, name string, evicting bool) (churnRun, error) {
	run := churnRun{Evicting: evicting, LocalBound: set.roomLocal, FileBound: set.roomShared}
	if evicting {
		run.LocalBound, run.FileBound = set.local, set.shared
	}
	fresh := modelNoise(set.answer)
	text := clusterText(upstream, []string{modelAtOnce, fresh}) +
		fmt.Sprintf("cache: {local_bytes: %d, shared_bytes: %d, entry_bytes: %d}\n", run.LocalBound, run.FileBound, min(set.local/4, set.shared/8))
	n, err := s.startNode(ctx, name, set.binary, text)
	if err != nil {
		return run, err
	}
	defer n.stop()
	t := target{name: nameDsnode, addr: n.api, key: n.key, proc: n.process}
	hot := make([][]byte, set.hot)
	for i := range hot {
		hot[i] = t.post(question(modelAtOnce, fmt.Sprintf(" (%d)", i)))
	}
	if err := n.until(ctx, func() error { return warm(ctx, t.addr, hot) }); err != nil {
		return run, fmt.Errorf("wait for hits: %w", err)
	}
	if run.Idle, err = anonymous(n.pid()); err != nil {
		return run, err
	}
	before, err := s.busy()
	if err != nil {
		return run, err
	}
	peak, held := t.watchMemory(), set.watchTiers(ctx, n, filepath.Join(s.dir, name))

	var asked, others result
	var labels tallyLabels
	var both sync.WaitGroup
	both.Go(func() {
		others = openLoopOf(ctx, t.addr, func(c *client, i int64) error {
			return c.ask(t.post(question(fresh, fmt.Sprintf(" (%08d)", i))))
		}, set.churn, 64, set.length())
	})
	both.Go(func() {
		asked = openLoopOf(ctx, t.addr, func(c *client, i int64) error {
			h, err := c.answer(hot[i%int64(len(hot))])
			if err == nil {
				labels.add(h.Get("X-Dsnode-Cache"))
			}
			return err
		}, set.rate, 64, set.length())
	})
	both.Wait()
	var errs [3]error
	run.Anonymous, errs[0] = peak()
	run.Local, run.File, run.DroppedFull, errs[1] = held()
	after, err := s.busy()
	errs[2] = err
	if err := errors.Join(errs[:]...); err != nil {
		return run, err
	}
	switch {
	case ctx.Err() != nil:
		return run, context.Cause(ctx)
	case asked.Failed+others.Failed > 0:
		return run, fmt.Errorf("%w: %v %v", errWrong, asked.Errors, others.Errors)
	}
	run.Hits, run.New, run.Late = labels.of("hit-local"), others.Done, asked.Late
	run.Shared, run.Missed = labels.of("hit-shared"), asked.Done-run.Hits-labels.of("hit-shared")
	run.P50, run.P99, run.P999 = asked.P50, asked.P99, asked.P999
	run.Elsewhere = elsewhere(before, after)
	return run, nil
}

// warm sends all questions; an answer that is no hit is an error.
func warm(ctx context.Context, addr string, questions [][]byte) error {
	c, err := dial(ctx, addr)
	if err != nil {
		return err
	}
	defer c.close()
	var missed error
	for _, q := range questions {
		h, err := c.answer(q)
		if err != nil {
			return err
		}
		if from := h.Get("X-Dsnode-Cache"); from != "hit-local" {
			missed = fmt.Errorf("%w: %q", errNoHit, from)
		}
	}
	return missed
}

// watchTiers samples the two tiers until the returned function is called. That returns
// the largest size of each and how many writes were dropped.
func (set *churnSettings) watchTiers(ctx context.Context, n *dsnode, dir string) func() (local, file int64, dropped int, err error) {
	var local, file int64
	var dropped int
	var failed error
	look := func() {
		st, err := n.admin.CacheStats(ctx)
		if err != nil {
			failed = err
			return
		}
		if st.Local.Bytes != nil {
			local = max(local, *st.Local.Bytes)
		}
		dropped = int(st.Dropped["queue_full"] + st.Dropped["write_failed"]) //nolint:gosec // a few
		size, err := bytesUnder(filepath.Join(dir, "data", "cache"))
		if err != nil {
			failed = err
		}
		file = max(file, size)
	}
	end := make(chan struct{})
	var watch sync.WaitGroup
	watch.Go(func() {
		for {
			look()
			select {
			case <-end:
				look()
				return
			case <-time.After(250 * time.Millisecond):
			}
		}
	})
	return func() (int64, int64, int, error) {
		close(end)
		watch.Wait()
		return local, file, dropped, failed
	}
}

// tallyLabels counts answers by X-Dsnode-Cache.
type tallyLabels struct {
	mu sync.Mutex // guards n
	n  map[string]int
}

func (l *tallyLabels) add(label string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.n == nil {
		l.n = map[string]int{}
	}
	l.n[label]++
}

func (l *tallyLabels) of(label string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.n[label]
}

// print shows each round and the median of the ratios.
func (set *churnSettings) print(w io.Writer, runs []churnRun) error {
	if set.json {
		out := json.NewEncoder(w)
		for _, r := range runs {
			if err := out.Encode(r); err != nil {
				return err
			}
		}
		return nil
	}
	p := &printer{w: tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)}
	p.f("round\tp99.9 without eviction\twith\tratio\thits from memory\tmemory tier / bound\tfile / bound\tanonymous\t\n")
	var ratios []float64
	bounds := true
	for round := range set.pairs {
		var with, without churnRun
		for _, r := range runs {
			switch {
			case r.Round != round+1:
			case r.Evicting:
				with = r
			default:
				without = r
			}
		}
		ratios = append(ratios, with.P999/without.P999)
		bounds = bounds && with.Local <= with.LocalBound && with.File <= with.FileBound
		p.f("%d\t%.2f ms\t%.2f ms\t%.2f ×\t%.2f %%\t%s / %s\t%s / %s\t%s (%s before)\t\n", round+1, without.P999*1e3, with.P999*1e3, ratios[round],
			100*float64(with.Hits)/float64(max(1, with.Hits+with.Shared+with.Missed)),
			inMiB(with.Local), inMiB(with.LocalBound), inMiB(with.File), inMiB(with.FileBound), inMiB(with.Anonymous), inMiB(with.Idle))
	}
	if p.err == nil {
		p.err = p.w.Flush()
	}
	within := "within"
	if !bounds {
		within = "NOT within"
	}
	if p.err == nil {
		_, p.err = fmt.Fprintf(w, "p99.9 of %.0f hits/s with %.0f new questions/s: %.2f × (median) that without eviction, target 2 ×; both tiers stayed %s their bounds while %.0f × these went through\n",
			set.rate, set.churn, median(ratios), within, set.times)
	}
	return p.err
}

func inMiB(n int64) string { return fmt.Sprintf("%.1f MiB", mib(n)) }
