package drill

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dsnode/dsnode/cluster/agreed"
)

// Isolator cuts this node off from the other sites while an agreed drill says so.
// Nodes of its own site stay connected, and clients go on being served.
//
// A dead-man timer ends the cut: Admit itself reads the clock, so the cut ends in
// time even when everything else in this process hangs.
type Isolator struct {
	site     string
	sever    func()
	boottime func() time.Duration
	now      func() time.Time
	log      *slog.Logger

	cut atomic.Pointer[cut] // nil: there is none

	mu sync.Mutex // guards over
	// over is the drill whose cut has ended here; it does not begin again.
	over string
}

// NewIsolator makes the Isolator of a node of a site; Run starts it. sever ends the
// connections that Admit refuses.
func NewIsolator(site string, sever func(), boottime func() time.Duration, now func() time.Time, log *slog.Logger) *Isolator {
	return &Isolator{site: site, sever: sever, boottime: boottime, now: now, log: log}
}

// cut is one isolation, from begin to until on CLOCK_BOOTTIME.
type cut struct {
	drill        string
	begin, until time.Duration
}

// isolateEvery is how often a node that is cut off, or about to be, looks at the
// clock: the end of a cut and the reconnection after it are that exact.
const isolateEvery = 100 * time.Millisecond

// Admit is cluster.Options.Admit.
func (i *Isolator) Admit(site string) error {
	c := i.cut.Load()
	if c == nil || site == i.site {
		return nil
	}
	if now := i.boottime(); now < c.begin || now >= c.until {
		return nil
	}
	return fmt.Errorf("site %s is cut off by %s", i.site, c.drill)
}

// look begins and ends cuts as the agreed drills and the clock say.
func (i *Isolator) look(drills []agreed.DrillRecord) {
	now := i.boottime()
	c := i.cut.Load()
	if c != nil {
		switch {
		case now >= c.until:
			i.heal(c, "its time is over")
		case ended(drills, c.drill):
			i.heal(c, "the drill has ended")
		}
		return
	}
	for _, d := range drills {
		if d.Kind != string(Isolation) || d.Site != i.site || d.Verdict != "" || i.isOver(d.ID) {
			continue
		}
		// A node that restarts in the middle has the wall clock alone; it only
		// shortens.
		length := min(d.Deadline.Sub(d.StartedAt), d.Deadline.Sub(i.now()), MaxFor+Lead)
		if length <= Lead {
			continue
		}
		lead := Lead
		if i.now().Sub(d.StartedAt) > 2*Lead {
			lead = 0 // everybody has heard of it long ago; this node restarted
		}
		c := &cut{drill: d.ID, begin: now + lead, until: now + length}
		i.log.Warn("this site is about to be cut off by a drill", "drill", d.ID, "by", d.By, "in", lead, "for", length-lead)
		i.cut.Store(c)
		return
	}
}

func ended(drills []agreed.DrillRecord, id string) bool {
	for _, d := range drills {
		if d.ID == id {
			return d.Verdict != ""
		}
	}
	return true // a restore took it away
}

func (i *Isolator) isOver(id string) bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.over == id
}

func (i *Isolator) heal(c *cut, why string) {
	if !i.cut.CompareAndSwap(c, nil) {
		return
	}
	i.mu.Lock()
	i.over = c.drill
	i.mu.Unlock()
	i.log.Warn("this site is no longer cut off", "drill", c.drill, "why", why)
}

// Heal ends a drill's cut here and now, false when it has none.
func (i *Isolator) Heal(id string) bool {
	c := i.cut.Load()
	if c == nil || c.drill != id {
		return false
	}
	i.heal(c, "an operator aborted the drill here")
	return true
}

// Run follows the agreed drills until ctx ends.
func (i *Isolator) Run(ctx context.Context, state func() *agreed.State, changed func() <-chan struct{}) error {
	severed := "" // the drill for which connections were ended
	for {
		next := changed()
		i.look(state().Drills)
		var again <-chan time.Time // only a change of the agreed state begins a cut
		if c := i.cut.Load(); c != nil {
			wait := c.begin - i.boottime()
			if wait <= 0 && severed != c.drill {
				severed = c.drill
				i.sever()
				i.log.Warn("this site is cut off from the others", "drill", c.drill)
			}
			if wait <= 0 {
				wait = isolateEvery
			}
			again = time.After(min(wait, isolateEvery))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-next:
		case <-again:
		}
	}
}
