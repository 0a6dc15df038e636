package drill

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/storage/atomicfile"
)

// Isolator cuts this node off from the other sites while an agreed drill requires it.
// The node stays connected with its own site, and clients are still served.
//
// A dead-man timer ends the cut: Admit itself reads the clock, so the cut ends in
// time even when everything else in this process hangs. A file keeps the cut, so that a
// process that starts during it refuses the other sites from its first moment.
type Isolator struct {
	site     string
	file     string
	sever    func()
	boottime func() time.Duration
	now      func() time.Time
	log      *slog.Logger

	cut  atomic.Pointer[cut] // nil: there is none
	over atomic.Pointer[cut] // the last one that has ended; its drill does not cut again
	// known is the drill of the cut once its record was seen in the agreed state, which
	// after a start may be older. Only look uses it.
	known string

	saving sync.Mutex // held while the file is written
}

// NewIsolator makes the Isolator of a node of a site; Run starts it. The cut of an earlier
// process, which is in the file, goes on at once. sever ends the connections that Admit
// refuses.
func NewIsolator(site, file string, sever func(), boottime func() time.Duration, now func() time.Time, log *slog.Logger) *Isolator {
	i := &Isolator{site: site, file: file, sever: sever, boottime: boottime, now: now, log: log}
	if err := i.load(); err != nil {
		log.Warn("can't read the cut of a drill from before this start; it goes on when its record is known", "file", file, "err", err)
	}
	return i
}

// savedCut is the newest cut in the file.
type savedCut struct {
	Drill  string        `json:"drill"`
	EndsAt time.Time     `json:"ends_at"` // on this node's wall clock
	Length time.Duration `json:"length"`  // whatever the wall clock does, not longer
	Over   bool          `json:"over"`
}

func (i *Isolator) load() error {
	text, err := os.ReadFile(i.file)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var s savedCut
	if err := json.Unmarshal(text, &s); err != nil {
		return err
	}
	now := i.boottime()
	c := &cut{drill: s.Drill, begin: now, until: now + min(s.EndsAt.Sub(i.now()), s.Length, MaxFor+Lead)}
	if s.Over || c.until <= now {
		i.over.Store(c)
		return nil
	}
	i.cut.Store(c)
	i.log.Warn("this site is still cut off by a drill", "drill", c.drill, "for", c.until-now)
	return nil
}

// save writes a cut to the file. Without the file the cut is not kept over a restart.
func (i *Isolator) save(c *cut) {
	i.saving.Lock()
	defer i.saving.Unlock()
	left := c.until - i.boottime()
	text, err := json.Marshal(savedCut{Drill: c.drill, EndsAt: i.now().Add(left), Length: left, Over: i.over.Load() == c})
	if err == nil {
		err = atomicfile.Replace(i.file, text)
	}
	if err != nil {
		i.log.Warn("could not write the cut of a drill to its file: a restart would not know it", "drill", c.drill, "err", err)
	}
}

// cut is one isolation, from begin to until on CLOCK_BOOTTIME.
type cut struct {
	drill        string
	begin, until time.Duration
}

// isolateEvery is how often a node that is cut off, or about to be, looks at the clock.
// The cut begins and Run notices its end with this precision.
const isolateEvery = 100 * time.Millisecond

// Admit is cluster.Options.Admit: it refuses the other sites during a cut.
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

// look begins and ends cuts by the agreed drills and the clock.
func (i *Isolator) look(drills []agreed.DrillRecord) {
	now := i.boottime()
	c := i.cut.Load()
	if c != nil {
		switch {
		case now >= c.until:
			i.heal(c, "time_over")
		case i.ended(drills, c.drill):
			i.heal(c, "drill_ended")
		}
		return
	}
	over := i.over.Load()
	for _, d := range drills {
		if d.Kind != string(Isolation) || d.Site != i.site || d.Verdict != "" || over != nil && over.drill == d.ID {
			continue
		}
		// A node that restarts during the cut knows the rest by the wall clock alone,
		// which can only shorten the cut.
		length := min(d.Deadline.Sub(d.StartedAt), d.Deadline.Sub(i.now()), MaxFor+Lead)
		if length <= Lead {
			continue
		}
		lead := Lead
		if i.now().Sub(d.StartedAt) > 2*Lead {
			lead = 0 // this node restarted: the others have known the drill for long enough
		}
		c := &cut{drill: d.ID, begin: now + lead, until: now + length}
		i.log.Warn("a drill will cut this site off", "drill", d.ID, "by", d.By, "in", lead, "for", length-lead)
		i.cut.Store(c)
		i.known = d.ID
		i.save(c)
		return
	}
}

// ended reports whether a drill has a verdict, or no record any more.
func (i *Isolator) ended(drills []agreed.DrillRecord, id string) bool {
	for _, d := range drills {
		if d.ID == id {
			i.known = id
			return d.Verdict != ""
		}
	}
	return i.known == id // a restore removed it
}

func (i *Isolator) heal(c *cut, reason string) {
	i.over.Store(c) // before the cut is gone: look must not begin it again
	if !i.cut.CompareAndSwap(c, nil) {
		return
	}
	i.log.Warn("this site is no longer cut off", "drill", c.drill, "reason", reason)
	i.save(c)
}

// Heal ends a drill's cut on this node at once. It gives false when there is none.
func (i *Isolator) Heal(id string) bool {
	c := i.cut.Load()
	if c == nil || c.drill != id {
		return false
	}
	i.heal(c, "aborted_here")
	return true
}

// Run begins and ends cuts as agreed drills require until ctx ends.
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
