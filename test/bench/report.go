//go:build linux

package main

import (
	"fmt"
	"io"
	"maps"
	"math"
	"slices"
	"strings"
	"text/tabwriter"
)

// figure is a compared quantity with the targets of the design.
type figure struct {
	what  string // of -what
	title string
	load  string
	unit  string
	of    func(m measurement) float64
	// against is the target that dsnode is compared with: its value divides dsnode's if
	// ratio is set, else it is subtracted. If empty, dsnode's value is taken as it is.
	against string
	ratio   bool
	atLeast bool    // more is better
	ofProxy bool    // not for the upstream itself
	first   float64 // target of the first complete version
	then    float64 // later target
}

func figures(set *settings) []figure {
	perAnswer := func(m measurement) float64 { return 1e6 * m.CPU / float64(max(1, m.Done)) }
	ms := func(of func(m measurement) float64) func(measurement) float64 {
		return func(m measurement) float64 { return 1e3 * of(m) }
	}
	mb := func(m measurement) float64 { return float64(m.Anonymous) / (1 << 20) }
	all := float64(set.Streams)
	return []figure{
		{what: "cpu", title: "CPU of a completion", load: loadClosed, unit: "µs", of: perAnswer, ofProxy: true, against: nameGoProxy, ratio: true, first: 1.2, then: 0.9},
		{
			what: "rps", title: fmt.Sprintf("completions/s at %d connections", set.Connections), load: loadClosed, unit: "/s",
			of: func(m measurement) float64 { return float64(m.Done) / m.Seconds }, against: nameGoProxy, ratio: true, atLeast: true, first: 0.85, then: 1.2,
		},
		{what: "latency", title: fmt.Sprintf("p50 at %.0f/s, upstream 60 ms", set.Rate), load: loadRate, unit: "ms", of: ms(func(m measurement) float64 { return m.P50 }), against: nameDirect, first: 0.5, then: 0.25},
		{what: "latency", title: fmt.Sprintf("p99 at %.0f/s, upstream 60 ms", set.Rate), load: loadRate, unit: "ms", of: ms(func(m measurement) float64 { return m.P99 }), against: nameDirect, first: 2, then: 1},
		{what: "streams", title: fmt.Sprintf("complete of %d streams", set.Streams), load: loadStreams, of: func(m measurement) float64 { return float64(m.Done) }, atLeast: true, first: all, then: all},
		{what: "streams", title: "first byte p50 of streams", load: loadStreams, unit: "ms", of: ms(func(m measurement) float64 { return m.FirstP50 }), against: nameDirect, first: 5, then: 1},
		{what: "streams", title: "between events p99 (20 ms)", load: loadStreams, unit: "ms", of: ms(func(m measurement) float64 { return m.GapP99 })},
		{what: "streams", title: "CPU of a stream's event", load: loadStreams, unit: "µs", of: func(m measurement) float64 { return perAnswer(m) / float64(set.Events) }, ofProxy: true},
		{what: "memory", title: "anonymous memory with the streams", load: loadStreams, unit: "MiB", of: mb, ofProxy: true, first: 120, then: 60},
		{what: "memory", title: "anonymous memory, idle", load: loadIdle, unit: "MiB", of: mb, ofProxy: true, first: 60, then: 40},
	}
}

// verdict is a figure with the values of all rounds.
type verdict struct {
	What   string               `json:"what"`
	Title  string               `json:"title"`
	Unit   string               `json:"unit,omitempty"`
	Values map[string][]float64 `json:"values"` // of each target by round
	// Judged is the value that is compared with First and Then, by round.
	Judged  []float64 `json:"judged"`
	Against string    `json:"against,omitempty"` // "" or "× goproxy", "− direct"
	Median  float64   `json:"median"`
	// First and Then are absent for a figure without targets.
	First        float64 `json:"first,omitempty"`
	Then         float64 `json:"then,omitempty"`
	AtLeast      bool    `json:"at_least,omitempty"`
	ReachedFirst bool    `json:"reached_first"`
	ReachedThen  bool    `json:"reached_then"`
}

// judge compares within each round and takes the median of the rounds.
func judge(runs []measurement, set *settings) []verdict {
	var verdicts []verdict
	for _, f := range figures(set) {
		if !set.wants(f.what) {
			continue
		}
		v := verdict{What: f.what, Title: f.title, Unit: f.unit, Values: map[string][]float64{}, First: f.first, Then: f.then, AtLeast: f.atLeast}
		for _, m := range runs {
			if m.Load == f.load && (m.Target != nameDirect || !f.ofProxy) {
				v.Values[m.Target] = append(v.Values[m.Target], f.of(m))
			}
		}
		v.Judged = slices.Clone(v.Values[nameDsnode])
		for i := range v.Judged {
			switch {
			case f.against == "":
			case f.ratio:
				v.Judged[i] /= v.Values[f.against][i]
				v.Against = "× " + f.against
			default:
				v.Judged[i] -= v.Values[f.against][i]
				v.Against = "− " + f.against
			}
		}
		v.Median = median(v.Judged)
		reached := func(goal float64) bool {
			if f.atLeast {
				return v.Median >= goal
			}
			return v.Median <= goal
		}
		if f.first != 0 {
			v.ReachedFirst, v.ReachedThen = reached(f.first), reached(f.then)
		}
		if f.what == "streams" && f.atLeast { // the worst round counts
			v.ReachedFirst = slices.Min(v.Judged) >= f.first
			v.ReachedThen = v.ReachedFirst
		}
		verdicts = append(verdicts, v)
	}
	return verdicts
}

// print writes the tables.
func (c *comparison) print(w io.Writer) error {
	m := c.Machine
	p := &printer{w: tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)}
	p.f("%s, %d × %s, %d GiB, Linux %s, %s\n", m.Time.UTC().Format("2006-01-02 15:04 UTC"), m.CPUs, m.CPU, m.Memory>>30, m.Kernel, m.Go)
	var others []float64
	for _, r := range c.Runs {
		if r.Load != loadIdle {
			others = append(others, r.Elsewhere)
		}
	}
	p.f("load average at the start %s; other processes used %.2f CPUs (median; %.2f at most)\n", m.Load, median(others), slices.Max(others))
	for _, name := range slices.Sorted(maps.Keys(c.Versions)) {
		p.f("%s: %s\n", name, c.Versions[name])
	}
	targets := []string{nameDsnode, nameGoProxy, nameNginx, nameDirect}
	if c.Settings.beside != "" {
		targets = slices.Insert(targets, 1, nameBeside)
	}
	p.f("\nmedians of %d rounds\t%s\n", c.Settings.Pairs, strings.Join(targets, "\t"))
	for _, v := range c.Verdicts {
		p.f("%s", v.Title)
		for _, t := range targets {
			if values := v.Values[t]; len(values) == 0 {
				p.f("\t–")
			} else {
				p.f("\t%s", show(median(values), v.Unit))
			}
		}
		p.f("\n")
	}
	p.f("\ndsnode and its targets\tmedian\tby round\ttarget\tlater\n")
	for _, v := range c.Verdicts {
		if v.First == 0 {
			continue
		}
		sign, unit := "≤", v.Unit
		if v.AtLeast {
			sign = "≥"
		}
		if strings.HasPrefix(v.Against, "×") {
			unit = v.Against
		}
		var rounds []string
		for _, j := range v.Judged {
			rounds = append(rounds, show(j, ""))
		}
		title := v.Title
		if strings.HasPrefix(v.Against, "−") {
			title = "added " + title
		}
		p.f("%s\t%s\t%s\t%s %.4g %s\t%s %.4g %s\n", title, show(v.Median, unit), strings.Join(rounds, " "),
			sign, v.First, word(v.ReachedFirst), sign, v.Then, word(v.ReachedThen))
	}
	c.printFailures(p)
	if p.err != nil {
		return p.err
	}
	return p.w.Flush()
}

func (c *comparison) printFailures(p *printer) {
	p.f("\n")
	for _, r := range c.Runs {
		for _, text := range slices.Sorted(maps.Keys(r.Errors)) {
			p.f("round %d, %s, %s: %d times: %s\n", r.Round, r.Load, r.Target, r.Errors[text], text)
		}
		if r.Late > 0 {
			p.f("round %d, %s, %s: %d of %d started late\n", r.Round, r.Load, r.Target, r.Late, r.Done+r.Failed)
		}
	}
}

func word(reached bool) string {
	if reached {
		return "reached"
	}
	return "not yet"
}

// show formats a value with three significant digits, or with all digits before the
// decimal point.
func show(v float64, unit string) string {
	digits := 0
	for size := math.Abs(v); digits < 2 && size < 100; size *= 10 {
		digits++
	}
	return strings.TrimSpace(fmt.Sprintf("%.*f %s", digits, v, unit))
}

// printer keeps the first error.
type printer struct {
	w   *tabwriter.Writer
	err error
}

func (p *printer) f(format string, args ...any) {
	if p.err == nil {
		_, p.err = fmt.Fprintf(p.w, format, args...)
	}
}
