package sim

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/dsnode/dsnode/node/admin"
)

// Breach is a broken law of the design.
type Breach struct {
	Law  int
	At   time.Duration
	What string
	// Kind is What without names and numbers: breaches of one kind have one cause.
	Kind string
}

func (b Breach) String() string {
	return fmt.Sprintf("law %d at %s: %s", b.Law, b.At.Round(time.Millisecond), b.What)
}

// mayLie is for how long a status may be false to the world: the patience, and 2 s, and the
// time between two looks.
const mayLie = 2500*time.Millisecond + 2*time.Second + lookEvery

const (
	lookEvery   = 500 * time.Millisecond // at statuses
	actingEvery = 50 * time.Millisecond
	// mayLag is how long a job may be on its way to every site.
	mayLag = 10 * time.Second
	// mayIdle is for how long nobody may act as the primary when one site has faults and the
	// others and the network have none: more than twice the longest unplanned change.
	mayIdle = 15 * time.Second
	dwell   = 2 * time.Minute // between two automatic promotions; a cluster that has just moved the role may wait
	// mayQueue is how long a job may wait in a cluster that says that it is healthy.
	mayQueue = 30 * time.Second
	// mayRun is how many goroutines there may be for each node, with those of its clients and
	// of processes that are ending.
	mayRun = 1500
)

// observer looks at all nodes during the whole run.
type observer struct {
	w      *World
	ledger *Ledger

	mu       sync.Mutex // guards all below
	breaches []Breach
	seen     map[string]bool // kinds and subjects that are reported already
	looks    map[string]*look
	acting   map[uint64]string // site by epoch
	idle     time.Time         // since when nobody acts as the primary; zero: somebody does
	away     map[string]time.Time
	why      map[string]string
	faulty   map[string]int // sites with a fault, "" for the network between them
	one      time.Time      // since when at most one site has had faults; zero: more have
	moved    time.Time      // when the newest epoch was seen first; zero: it is the first one
}

// look is the newest status of a node.
type look struct {
	healthy time.Time // since when it says so without a break
	status  *admin.Status
	fewer   time.Time // since when it has fewer jobs than were acknowledged
}

func newObserver(w *World, l *Ledger) *observer {
	return &observer{
		w: w, ledger: l, seen: map[string]bool{}, looks: map[string]*look{}, acting: map[uint64]string{},
		away: map[string]time.Time{}, why: map[string]string{}, faulty: map[string]int{}, one: time.Now(),
	}
}

// fault notes that a site, or the network between sites, has a fault (by is 1) or has one
// less (-1).
func (o *observer) fault(site string, by int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.faulty[site] += by; o.faulty[site] == 0 {
		delete(o.faulty, site)
	}
	_, network := o.faulty[""]
	switch single := len(o.faulty) <= 1 && !network; {
	case !single:
		o.one = time.Time{}
	case o.one.IsZero():
		o.one = time.Now()
	}
}

func (o *observer) all() []Breach {
	o.mu.Lock()
	defer o.mu.Unlock()
	return slices.Clone(o.breaches)
}

// broken reports a breach, one of each kind.
func (o *observer) broken(law int, format string, args ...any) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.report(law, format, args...)
}

func (o *observer) report(law int, format string, args ...any) {
	kind := fmt.Sprintf("%d %s", law, format)
	if o.seen[kind] {
		return
	}
	o.seen[kind] = true
	b := Breach{Law: law, At: time.Since(o.w.began), What: fmt.Sprintf(format, args...), Kind: kind}
	o.breaches = append(o.breaches, b)
	o.w.logs.add("!!! " + b.String())
}

// setAway tells that a node can't take part, since now; an empty reason: it can.
func (o *observer) setAway(node, why string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if why == "" {
		delete(o.away, node)
		delete(o.why, node)
		return
	}
	if _, is := o.away[node]; !is {
		o.away[node], o.why[node] = time.Now(), why
	}
}

func (o *observer) run(ctx context.Context) {
	var work sync.WaitGroup
	for _, m := range o.w.machines {
		work.Go(func() {
			for sleep(ctx, lookEvery) == nil {
				o.look(m)
			}
		})
	}
	work.Go(func() {
		for sleep(ctx, actingEvery) == nil {
			o.lookAtPrimary()
		}
	})
	work.Go(func() {
		for sleep(ctx, lookEvery) == nil {
			o.compare()
		}
	})
	work.Wait()
}

func (o *observer) look(m *Machine) {
	s, err := o.w.Status(m)
	o.mu.Lock()
	defer o.mu.Unlock()
	l := o.looks[m.Name]
	if l == nil {
		l = &look{}
		o.looks[m.Name] = l
	}
	if err != nil || !s.Healthy {
		l.healthy, l.status, l.fewer = time.Time{}, nil, time.Time{}
		return
	}
	if l.healthy.IsZero() {
		l.healthy = time.Now()
	}
	l.status = s
}

// lookAtPrimary asks each process itself, so that the answers are of one moment.
func (o *observer) lookAtPrimary() {
	o.mu.Lock()
	defer o.mu.Unlock()
	sites := map[string]uint64{}
	for _, m := range o.w.machines {
		p := m.current()
		if p == nil {
			continue
		}
		h := p.node.Health()
		if !h.Acting {
			continue
		}
		sites[m.Site] = h.Epoch
		if before := o.acting[h.Epoch]; before != "" && before != m.Site {
			o.report(1, "%s and %s acted as the primary in epoch %d", before, m.Site, h.Epoch)
		}
		if o.acting[h.Epoch] == "" && len(o.acting) > 0 {
			o.moved = time.Now()
		}
		o.acting[h.Epoch] = m.Site
	}
	if len(sites) > 1 {
		o.report(1, "two sites act as the primary at once: %v", sites)
	}
	switch {
	case len(sites) > 0:
		o.idle = time.Time{}
	case o.idle.IsZero():
		o.idle = time.Now()
	case time.Since(o.idle) > mayIdle && !o.one.IsZero() && time.Since(o.one) > mayIdle && o.idle.Sub(o.moved) > dwell:
		o.report(6, "nobody acts as the primary for more than %s, and two of three sites are well", mayIdle)
	}
}

// checkClear looks for secrets where they may not be: on the wires between nodes, as long as
// the run has lasted, and on the disks now.
func (o *observer) checkClear() {
	n := o.w.net
	n.mu.Lock()
	clear := n.clear
	n.mu.Unlock()
	if clear != "" {
		o.broken(7, "in clear on a wire: %s", clear)
	}
	for _, m := range o.w.machines {
		err := filepath.WalkDir(m.dataDir(), func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			text, err := os.ReadFile(path)
			for _, s := range secrets {
				if bytes.Contains(text, []byte(s)) {
					o.broken(7, "in clear on a disk: %q in %s of %s", s, filepath.Base(path), m.Name)
				}
			}
			if errors.Is(err, fs.ErrNotExist) {
				return nil // it was replaced just now
			}
			return err
		})
		if err != nil {
			o.broken(7, "the disk of %s: %s", m.Name, err)
		}
	}
}

// compare compares the statuses with the world.
func (o *observer) compare() {
	if n := runtime.NumGoroutine(); n > mayRun*len(o.w.machines) {
		o.broken(10, "%d goroutines for %d nodes", n, len(o.w.machines))
	}
	now := time.Now()
	acked := o.ledger.acknowledged(now.Add(-mayLag), (*Job).strong)
	waiting := o.ledger.acknowledged(now.Add(-mayQueue), func(j *Job) bool { return j.strong() && j.Final == "" })
	o.mu.Lock()
	defer o.mu.Unlock()
	allHealthy := now
	for _, m := range o.w.machines {
		l := o.looks[m.Name]
		if l == nil || l.healthy.IsZero() {
			allHealthy = time.Time{}
			continue
		}
		if !allHealthy.IsZero() && l.healthy.After(now.Add(-mayQueue)) {
			allHealthy = time.Time{}
		}
		long := now.Sub(l.healthy)
		if long < mayLie {
			continue
		}
		if !o.idle.IsZero() && now.Sub(o.idle) >= mayLie {
			o.report(5, "%s says healthy, and no node has acted as the primary for %s", m.Name, now.Sub(o.idle))
		}
		for node, since := range o.away {
			if now.Sub(since) >= mayLie {
				o.report(5, "%s says healthy, and "+o.why[node]+" has lasted for %s at %s", m.Name, now.Sub(since), node)
			}
		}
		have := total(l.status)
		switch {
		case have >= len(acked):
			l.fewer = time.Time{}
		case l.fewer.IsZero():
			l.fewer = now
		case now.Sub(l.fewer) >= mayLie:
			o.report(5, "%s says healthy and has %d of %d jobs that were acknowledged at two sites", m.Name, have, len(acked))
		}
	}
	if !allHealthy.IsZero() && len(waiting) > 0 {
		go o.stillWaiting(waiting[0])
	}
}

// stillWaiting asks for a job that nobody has asked for lately.
func (o *observer) stillWaiting(j *Job) {
	for _, m := range o.w.machines {
		status, err := o.ledger.ask(o.w.ctx, m, j)
		if err == nil && status != "" {
			o.ledger.seen(j, m, status, o.broken)
			if !final(status) {
				o.broken(5, "every node says healthy, and %s shows %s as %s after %s", m.Name, j.ID, status, time.Since(j.Acked))
			}
			return
		}
	}
}

func total(s *admin.Status) int {
	if s == nil || s.Jobs == nil {
		return 0
	}
	n := 0
	for _, p := range []*int64{s.Jobs.Queued, s.Jobs.Running, s.Jobs.Succeeded, s.Jobs.Failed} {
		if p != nil {
			n += int(*p)
		}
	}
	return n
}

// checkEnd checks what must hold a minute after the last fault.
func (o *observer) checkEnd(lostDisk bool) {
	w := o.w
	for _, m := range w.machines {
		if m.current() == nil {
			o.broken(11, "a minute after the last fault %s does not run: "+dull(m.ended()), m.Name)
			continue
		}
		s, err := w.Status(m)
		switch {
		case err != nil:
			o.broken(11, "a minute after the last fault %s does not answer: %s", m.Name, err)
		case !s.Healthy:
			o.broken(11, "a minute after the last fault %s says: "+dull(strings.Join(s.Reasons, "; ")), m.Name)
		}
	}
	o.mu.Lock()
	if !o.idle.IsZero() {
		o.report(11, "a minute after the last fault nobody has acted as the primary for %s", time.Since(o.idle))
	}
	o.mu.Unlock()
	o.checkNewJobs()
	o.checkOldJobs(lostDisk)
}

// dull cuts what follows the first number or name, so that breaches of one kind have one text.
func dull(s string) string {
	s = strings.ReplaceAll(s, "%", "%%")
	if i := strings.IndexAny(s, "0123456789"); i > 0 {
		s = s[:i] + "…"
	}
	return s
}

// checkNewJobs submits a job of each durability to each node.
func (o *observer) checkNewJobs() {
	w := o.w
	var jobs []*Job
	for _, m := range w.machines {
		for _, d := range []string{"node", "two-sites", "two-cities"} {
			j, err := o.ledger.submit(w.ctx, m, d, 10)
			if err != nil {
				o.broken(11, "a minute after the last fault a job of "+d+" is refused by %s: %s", m.Name, err)
				continue
			}
			jobs = append(jobs, j)
		}
	}
	end := time.Now().Add(15 * time.Second)
	for _, j := range jobs {
		for _, m := range w.machines {
			var status string
			var err error
			for {
				if status, err = o.ledger.ask(w.ctx, m, j); err == nil && final(status) || time.Now().After(end) {
					break
				}
				time.Sleep(100 * time.Millisecond)
			}
			if err != nil || status != "succeeded" {
				o.broken(11, "a minute after the last fault a job accepted at %s is shown by %s as %q: %v", j.Node, m.Name, status, err)
			}
		}
	}
}

// checkOldJobs asks for every acknowledged job at a node of each site.
func (o *observer) checkOldJobs(lostDisk bool) {
	w := o.w
	var ask []*Machine
	for _, m := range w.machines {
		if !slices.ContainsFunc(ask, func(o *Machine) bool { return o.Site == m.Site }) {
			ask = append(ask, m)
		}
	}
	lost, stuck, all := 0, 0, 0
	var example *Job
	for _, j := range o.ledger.acknowledged(time.Now(), func(j *Job) bool { return j.strong() || !lostDisk }) {
		all++
		for _, m := range ask {
			status, err := o.ledger.ask(w.ctx, m, j)
			switch {
			case err != nil:
				o.broken(11, "%s does not answer for a job: %s", m.Name, err)
			case status == "":
				lost++
				example = j
			case !final(status):
				stuck++
				example = j
			default:
				o.ledger.seen(j, m, status, o.broken)
			}
		}
	}
	if lost > 0 {
		o.broken(2, "acknowledged jobs are gone: %d × 404 for %d jobs, such as %s of %s", lost, all, example.ID, example.Durability)
	}
	if stuck > 0 {
		o.broken(11, "a minute after the last fault acknowledged jobs have not run: %d answers for %d jobs, such as %s of %s", stuck, all, example.ID, example.Durability)
	}
}
