package failover

import (
	"context"
	"fmt"
	"time"
)

// primaryContext is a context of WhilePrimary.
type primaryContext struct {
	epoch uint64
	end   context.CancelCauseFunc
}

// WhilePrimary gives a context that ends, with ErrNotPrimary as its cause, when
// this node may no longer act as primary; at once if it may not now. The caller
// calls done when what ran under it has stopped: a switchover waits for that.
//
// After a suspend the context lives on for up to StartWithin of running time. A
// start that must not happen then needs a Check of its own.
func (f *Fence) WhilePrimary(ctx context.Context) (primary context.Context, done func()) {
	primary, end := context.WithCancelCause(ctx)
	f.mu.Lock()
	defer f.mu.Unlock()
	token, _, err := f.prove(Primary, f.boottime())
	if err != nil {
		end(err)
		return primary, func() { end(nil) }
	}
	c := &primaryContext{epoch: token.Index, end: end}
	f.running[c] = struct{}{}
	f.changed() // Run looks more often now
	return primary, func() {
		end(nil)
		f.mu.Lock()
		defer f.mu.Unlock()
		delete(f.running, c)
		delete(f.stopping, c)
		f.changed()
	}
}

// Release blocks until this node has seen the switchover and nothing that ran here
// as primary runs any more; from then on nothing starts until the switchover is off
// the agreed state. It is the peer's side of Releaser.
func (f *Fence) Release(ctx context.Context, switchoverID string) error {
	for {
		agreed := f.standing.Changed()
		s := f.standing.State()
		_, change := f.refresh()
		f.mu.Lock()
		busy := len(f.running) + len(f.stopping)
		unused := f.lastPermit - f.boottime()
		f.mu.Unlock()
		seen := s.Switchover != nil && s.Switchover.ID == switchoverID && s.Switchover.From == f.site
		var expired <-chan time.Time
		if seen && busy == 0 {
			if unused <= 0 {
				return nil
			}
			// A Permit that was given may still be used.
			expired = time.After(unused)
		}
		select {
		case <-expired:
		case <-ctx.Done():
			if !seen {
				return fmt.Errorf("release for switchover %s: not seen here: %w", switchoverID, ctx.Err())
			}
			return fmt.Errorf("release for switchover %s: %d runs have not stopped: %w", switchoverID, busy, ctx.Err())
		case <-agreed:
		case <-change:
		}
	}
}

const (
	// busyLook is the longest sleep of Run while something runs as primary. Run
	// sleeps until the lease ends at the latest, but on a clock that stands still
	// while the machine is suspended, and the lease's clock doesn't: contexts live
	// on for this long after the machine wakes.
	busyLook = StartWithin
	idleLook = time.Second
)

// Run ends the contexts of WhilePrimary when this node may no longer act as
// primary, and starts the waits for new claims, until ctx ends; then it ends all
// contexts.
func (f *Fence) Run(ctx context.Context) error {
	wake := time.NewTimer(0)
	defer wake.Stop()
	for {
		agreed, leased := f.standing.Changed(), f.standing.LeaseChanged()
		sleep, change := f.refresh()
		wake.Reset(sleep)
		select {
		case <-ctx.Done():
			f.mu.Lock()
			f.endAll(fmt.Errorf("%w: this node stops", ErrNotPrimary))
			f.mu.Unlock()
			return nil
		case <-agreed:
		case <-leased:
		case <-change:
		case <-wake.C:
		}
	}
}

// refresh ends the contexts that may not go on, and closes change when this node
// begins or ceases to act as primary. It gives the time until that can happen
// without an event, and the channel of the next change.
func (f *Fence) refresh() (sleep time.Duration, change <-chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := f.boottime()
	token, left, err := f.prove(Primary, now)
	if err == nil {
		for c := range f.running {
			if c.epoch != token.Index {
				f.end(c, fmt.Errorf("%w: epoch %d has ended", ErrNotPrimary, c.epoch))
			}
		}
	} else {
		f.endAll(err)
	}
	if f.acting != (err == nil) {
		f.acting = err == nil
		if f.acting {
			f.log.Info("acting as primary", "site", f.site, "epoch", token.Index)
		} else {
			f.log.Info("no longer acting as primary", "site", f.site, "reason", err)
		}
		f.changed()
	}
	sleep = idleLook
	switch {
	case err == nil && len(f.running) > 0:
		sleep = min(left, busyLook)
	case err == nil:
		sleep = min(left, idleLook)
	case now < f.primaryFrom:
		sleep = min(f.primaryFrom-now, idleLook)
	}
	return sleep, f.change
}

func (f *Fence) endAll(cause error) {
	for c := range f.running {
		f.end(c, cause)
	}
}

// end assumes the lock. A CancelCauseFunc runs no foreign code before it returns:
// functions of context.AfterFunc run in goroutines of their own.
func (f *Fence) end(c *primaryContext, cause error) {
	c.end(cause)
	delete(f.running, c)
	f.stopping[c] = struct{}{}
}

func (f *Fence) changed() {
	close(f.change)
	f.change = make(chan struct{})
}
