package sim

import (
	"container/heap"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/dsnode/dsnode/node/modelsim"
)

// Result is what a simulation found.
type Result struct {
	Plan     *Plan
	Breaches []Breach
	Virtual  time.Duration
	CPU      time.Duration
	Jobs     int // acknowledged
	Left     int // faults that were left out, see Fault.Await
	Log      []string
}

const (
	settleFor  = time.Minute // law 11: everything comes back within this time
	awaitFor   = time.Minute
	restartIn  = 2 * time.Second  // a supervisor starts a node again that has ended by itself
	calmBefore = 8 * time.Second  // after a disk was lost, before another one may be
	recovery   = 20 * time.Second // after a fault's end the site counts as faulty for so long
)

// run is one simulation, in the bubble of its caller.
type run struct {
	w      *World
	plan   *Plan
	ledger *Ledger
	laws   *observer
	events events
	result *Result

	ended   time.Time // of the last fault so far
	lost    time.Time // when a lost disk's node was started again
	images  map[string]string
	hands   sync.WaitGroup // operators who are at work
	removed map[string]bool
	offline map[string]bool // nodes that a fault has stopped
}

// simulate runs a plan. It must be called in a bubble of its own.
func simulate(dir string, p *Plan, level slog.Level) (*Result, error) {
	l := &logs{level: level}
	w, err := newWorld(dir, p.Nodes, rand.New(rand.NewPCG(p.Seed, 1)), l)
	if err != nil {
		return nil, err
	}
	ledger := newLedger(w, p.Seed)
	r := &run{
		w: w, plan: p, ledger: ledger, laws: newObserver(w, ledger), result: &Result{Plan: p},
		images: map[string]string{}, removed: map[string]bool{}, offline: map[string]bool{},
	}
	err = r.all()
	r.result.Breaches = r.laws.all()
	r.result.Jobs = len(ledger.acknowledged(time.Now(), func(*Job) bool { return true }))
	r.result.Log = l.all()
	return r.result, err
}

func (r *run) all() error {
	w := r.w
	if err := w.boot(); err != nil {
		return errors.Join(fmt.Errorf("start the cluster: %w", err), w.close())
	}
	ctx, stop := context.WithCancel(w.ctx)
	defer stop()
	var work, load sync.WaitGroup
	work.Go(func() { r.laws.run(ctx) })
	loading, stopLoad := context.WithCancel(ctx)
	defer stopLoad()
	for _, site := range r.sites() {
		if len(r.plan.Sites) > 0 && !slices.Contains(r.plan.Sites, site) {
			continue
		}
		load.Go(func() { r.ledger.submitAll(loading, r.of(site), r.plan.Every, r.plan.Body) })
	}
	load.Go(func() { r.ledger.watch(loading, w.machines, r.laws.broken) })
	for _, m := range w.machines {
		load.Go(func() { r.chats(loading, m) })
		load.Go(func() { r.streams(loading, m) })
		load.Go(func() { r.leaves(loading, m) })
	}

	start := time.Now()
	if r.plan.Upgrade {
		if err := r.upgrade(); err != nil {
			return errors.Join(err, w.close())
		}
		start = time.Now()
	}
	for i := range r.plan.Faults {
		f := &r.plan.Faults[i]
		r.events.add(start.Add(f.At), func() error { return r.begin(f, time.Now().Add(awaitFor)) })
		if f.Kind == Restore {
			r.events.add(start.Add(f.At*2/3), func() (err error) {
				r.images[f.Nodes[0]], err = r.machine(f.Nodes[0]).Image()
				return err
			})
		}
	}
	r.ended = start
	err := r.drive()
	stopLoad()
	load.Wait()
	r.hands.Wait()
	if err == nil {
		r.laws.checkClear()
		r.laws.checkEnd(slices.ContainsFunc(r.plan.Faults, Fault.losesDisk))
	}
	stop()
	work.Wait()
	r.result.Virtual = time.Since(w.began)
	return errors.Join(err, w.close())
}

// upgrade restarts the nodes one after the other, each when the cluster is healthy, and lets
// the jobs of the streams before end.
func (r *run) upgrade() error {
	for _, m := range r.w.machines {
		if err := r.w.within(time.Minute, r.w.healthy); err != nil {
			return fmt.Errorf("rolling restart: %w", err)
		}
		r.laws.setAway(m.Name, "that it was stopped")
		m.Stop()
		if err := r.start(m); err != nil {
			return err
		}
		time.Sleep(2 * time.Second)
	}
	time.Sleep(15 * time.Second)
	return nil
}

// drive does what is due, and keeps processes running, until a minute after the last fault.
func (r *run) drive() error {
	for len(r.events) > 0 || time.Since(r.ended) < settleFor {
		time.Sleep(50 * time.Millisecond)
		for len(r.events) > 0 && !time.Now().Before(r.events[0].at) {
			if err := r.events.next().do(); err != nil {
				return err
			}
		}
		if err := r.supervise(); err != nil {
			return err
		}
	}
	return nil
}

// supervise starts nodes again that have ended by themselves.
func (r *run) supervise() error {
	for _, m := range r.w.machines {
		if m.ended() == "" || r.offline[m.Name] || r.removed[m.Name] {
			continue
		}
		r.w.logs.add(fmt.Sprintf("%9.3f %s ended: %s", time.Since(r.w.began).Seconds(), m.Name, m.ended()))
		r.offline[m.Name] = true
		r.laws.setAway(m.Name, "that its process has ended")
		if err := m.Crash(true); err != nil { // what is left of it ends with the process
			return err
		}
		r.after(restartIn, func() error { return r.start(m) })
	}
	return nil
}

func (r *run) after(d time.Duration, do func() error) { r.events.add(time.Now().Add(d), do) }

func (r *run) note(format string, args ...any) {
	r.w.logs.add(fmt.Sprintf("%9.3f *** ", time.Since(r.w.began).Seconds()) + fmt.Sprintf(format, args...))
}

func (r *run) start(m *Machine) error {
	r.offline[m.Name] = false
	r.laws.setAway(m.Name, "")
	return m.Start()
}

func (r *run) sites() []string {
	var s []string
	for i := range r.plan.Nodes {
		s = append(s, siteNames[i].name)
	}
	return s
}

func (r *run) of(site string) []*Machine {
	var of []*Machine
	for _, m := range r.w.machines {
		if m.Site == site {
			of = append(of, m)
		}
	}
	return of
}

func (r *run) machine(name string) *Machine {
	for _, m := range r.w.machines {
		if m.Name == name {
			return m
		}
	}
	return nil
}

// calm reports whether an operator would dare to lose another disk.
func (r *run) calm() bool {
	return time.Since(r.lost) >= calmBefore && r.w.healthy() == nil
}

// begin begins a fault; its end is another event.
func (r *run) begin(f *Fault, until time.Time) error {
	if f.Await && !r.calm() {
		if time.Now().After(until) {
			r.note("left out, the cluster is not healthy: %s", f)
			r.result.Left++
			return nil
		}
		r.after(250*time.Millisecond, func() error { return r.begin(f, until) })
		return nil
	}
	r.note("%s", f)
	end, err := r.do(f)
	if err != nil {
		return err
	}
	where := r.places(f)
	for _, site := range where {
		r.laws.fault(site, 1)
	}
	r.after(f.For, func() error {
		r.note("ends: %s", f)
		r.ended = time.Now()
		err := end()
		r.after(recovery, func() error {
			for _, site := range where {
				r.laws.fault(site, -1)
			}
			return nil
		})
		return err
	})
	return nil
}

// places are the sites that a fault concerns; "" is the network between sites, and what
// concerns all of them.
func (r *run) places(f *Fault) []string {
	switch {
	case f.Kind == ModelServer:
		return nil // the role does not depend on it
	case len(f.Nodes) == 0 && (f.Site == "" || f.Kind == Switchover):
		return []string{""}
	}
	if f.Site != "" {
		return []string{f.Site}
	}
	var sites []string
	for _, name := range f.Nodes {
		sites = append(sites, r.machine(name).Site)
	}
	return slices.Compact(sites)
}

func (r *run) do(f *Fault) (end func() error, err error) {
	var machines []*Machine
	for _, name := range f.Nodes {
		machines = append(machines, r.machine(name))
	}
	if f.Site != "" && f.Kind == Crash {
		machines = r.of(f.Site)
	}
	nothing := func() error { return nil }
	switch f.Kind {
	case Packets:
		var ends []func()
		for _, rule := range f.Rules {
			ends = append(ends, r.w.net.Set(rule))
		}
		away := isolated(f.Rules, r.w.machines)
		for _, name := range away {
			r.laws.setAway(name, "that no packet reaches it or leaves it")
		}
		return func() error {
			for _, end := range ends {
				end()
			}
			for _, name := range away {
				r.laws.setAway(name, "")
			}
			return nil
		}, nil
	case Crash, Wipe, Restore:
		return r.crash(f, machines)
	case Switchover:
		r.hands.Go(func() { r.switchover(f.Site) })
		return nothing, nil
	case Remove:
		return r.remove(f, machines[0])
	case ModelServer:
		server := r.w.models[f.Site]
		if err := server.SetFault(modelsim.Fault{Mode: f.Mode, After: f.After, Probability: f.Share}); err != nil {
			return nil, err
		}
		r.w.modelFault.Store(&f.Site)
		return func() error {
			server.ClearFault()
			r.after(recovery, func() error { r.w.modelFault.Store(nil); return nil })
			return nil
		}, nil
	case Restart:
		m := machines[0]
		r.offline[m.Name] = true
		r.hands.Go(m.Stop)
		r.laws.setAway(m.Name, "that it was stopped")
		var end func() error
		end = func() error {
			if p := m.process.Load(); p != nil && p.stopping.Load() {
				r.after(100*time.Millisecond, end)
				return nil
			}
			return r.start(m)
		}
		return end, nil
	}
	m := machines[0]
	d := &m.disk
	switch f.Kind {
	case DiskHang:
		end := d.hang()
		r.laws.setAway(m.Name, "that its disk hangs")
		return func() error { end(); r.laws.setAway(m.Name, ""); return nil }, nil
	case DiskFail:
		d.set(func() { d.failing = syscall.EIO })
		return func() error { d.set(func() { d.failing = nil }); return nil }, nil
	case DiskFull:
		d.set(func() { d.full, d.free = true, f.Free })
		return func() error { d.set(func() { d.full = false }); return nil }, nil
	case DiskSlow:
		d.set(func() { d.every = time.Second / time.Duration(f.Writes) })
		return func() error { d.set(func() { d.every = 0 }); return nil }, nil
	}
	return nil, fmt.Errorf("unknown kind of fault %q", f.Kind)
}

func (r *run) crash(f *Fault, machines []*Machine) (end func() error, err error) {
	for _, m := range machines {
		r.offline[m.Name] = true
		r.laws.setAway(m.Name, "that it has crashed")
		if err := m.Crash(f.Resets); err != nil {
			return nil, err
		}
		switch f.Kind {
		case Wipe:
			m.Wipe()
		case Restore:
			if image := r.images[m.Name]; image != "" {
				if err := m.Restore(image); err != nil {
					return nil, err
				}
			}
		}
	}
	return func() error {
		for _, m := range machines {
			if f.losesDisk() {
				r.lost = time.Now()
			}
			if err := r.start(m); err != nil {
				return err
			}
		}
		return nil
	}, nil
}

// isolated are the nodes that exchange no packet with any other site.
func isolated(rules []Rule, machines []*Machine) []string {
	var out, in []string
	for _, m := range machines {
		for i := range rules {
			u := &rules[i]
			if !u.Cut || u.Traffic != "" || u.Over > 0 {
				continue
			}
			if (u.From == m.Name || u.From == m.Site) && u.To == "" {
				out = append(out, m.Name)
			}
			if (u.To == m.Name || u.To == m.Site) && u.From == "" {
				in = append(in, m.Name)
			}
		}
	}
	return slices.DeleteFunc(out, func(name string) bool { return !slices.Contains(in, name) })
}

// change sends an operator's change to the first node that makes it.
func (r *run) change(method, path, body string, except string) error {
	var last error
	for _, m := range r.w.machines {
		if m.Name == except || m.current() == nil {
			continue
		}
		ctx, cancel := context.WithTimeout(r.w.ctx, 20*time.Second)
		_, err := r.w.call(ctx, m, method, m.at(portAdmin)+path+"?author=sim", body, nil)
		cancel()
		if err == nil {
			return nil
		}
		last = err
	}
	return last
}

func (r *run) switchover(to string) {
	body, _ := json.Marshal(map[string]any{"to": to, "waive": []string{"dwell"}}) // strings
	err := r.change(http.MethodPost, "/admin/v1/failover", string(body), "")
	r.note("switchover to %s: %v", to, err)
}

// remove is what an operator does with a node that has not been heard for a while, and that
// comes back after all. The node must not serve as a member then.
func (r *run) remove(f *Fault, m *Machine) (end func() error, err error) {
	cut := []func(){r.w.net.Set(Rule{From: m.Name, Cut: true}), r.w.net.Set(Rule{To: m.Name, Cut: true})}
	r.laws.setAway(m.Name, "that no packet reaches it or leaves it")
	r.removed[m.Name] = true
	var gone atomic.Bool
	r.after(f.For/2, func() error {
		r.hands.Go(func() {
			err := r.change(http.MethodDelete, "/admin/v1/nodes/"+m.Name, "", m.Name)
			r.note("removed %s: %v", m.Name, err)
			if err == nil {
				gone.Store(true)
				r.laws.setAway(m.Name, "")
			}
		})
		return nil
	})
	return func() error {
		for _, heal := range cut {
			heal()
		}
		r.laws.setAway(m.Name, "")
		r.after(15*time.Second, func() error {
			if p := m.current(); gone.Load() && p != nil && p.node.Health().Quorum {
				r.laws.broken(4, "%s holds a lease %s after it was heard again, though it was removed", m.Name, 15*time.Second)
			}
			if err := m.Crash(true); err != nil {
				return err
			}
			if gone.Load() {
				m.Wipe()
				delete(r.images, m.Name) // it is of the removed member, which no cluster takes back by itself
			}
			r.after(2*time.Second, func() error {
				r.removed[m.Name] = false
				r.lost, r.ended = time.Now(), time.Now()
				if gone.Load() { // it asks until an operator has admitted it again
					r.hands.Go(func() {
						err := r.change(http.MethodPost, "/admin/v1/nodes/"+m.Name+"/admit", "", m.Name)
						r.note("admitted %s again: %v", m.Name, err)
					})
				}
				return r.start(m)
			})
			return nil
		})
		return nil
	}, nil
}

// events are what is to be done, the next one first.
type events []event

type event struct {
	at time.Time
	do func() error
}

func (e *events) Len() int           { return len(*e) }
func (e *events) Less(i, k int) bool { return (*e)[i].at.Before((*e)[k].at) }
func (e *events) Swap(i, k int)      { (*e)[i], (*e)[k] = (*e)[k], (*e)[i] }
func (e *events) Push(x any)         { *e = append(*e, x.(event)) }
func (e *events) Pop() any {
	last := (*e)[len(*e)-1]
	*e = (*e)[:len(*e)-1]
	return last
}

func (e *events) add(at time.Time, do func() error) { heap.Push(e, event{at, do}) }
func (e *events) next() event                       { return heap.Pop(e).(event) }
