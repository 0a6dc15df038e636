package failover

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/dsnode/dsnode/cluster/agreed"
)

// ErrNotPrimary is why a primary context ended, or could not begin.
var ErrNotPrimary = errors.New("this site is not the primary, or this node may not act for it")

// StartWithin is the longest time between a lease check and the start of what
// it permits.
const StartWithin = 50 * time.Millisecond

// Standing is what Role needs of the cluster; *cluster.Cluster is one.
type Standing interface {
	State() *agreed.State
	Changed() <-chan struct{}
	Lease() (left time.Duration, epoch uint64)
	// LeaseChanged closes when a lease begins, or a higher epoch is heard of.
	LeaseChanged() <-chan struct{}
}

// Role is this node's part in being the primary: whether it may act, and the
// contexts of what runs because it may.
//
// A node may act as primary while all of this holds: the agreed primary is its
// site; it holds a lease; with that lease it has heard of no higher epoch; no
// switchover away from its site stands in the agreed state, by no clock but
// the state's own; and every lease of the primary before has ended, or all of
// its nodes have let go.
type Role struct {
	site     string
	standing Standing
	boottime func() time.Duration
	wait     time.Duration
	log      *slog.Logger

	// mu guards what follows. The agreed state and the lease are read under it,
	// so that nothing begins on a look from before a Release.
	mu sync.Mutex
	// epoch is the newest seen. Nothing starts before notBefore, when the
	// leases of the primaries before it have ended.
	epoch     uint64
	notBefore time.Duration
	lastToken time.Duration // deadline of the newest Token
	// held are the running primary contexts, ended those whose work has been
	// told to stop and has not come back yet.
	held    map[*tenure]struct{}
	ended   map[*tenure]struct{}
	holding bool
	change  chan struct{} // closes at the next change of any of the above
}

type tenure struct {
	epoch uint64
	end   context.CancelCauseFunc
}

// Token permits one start as primary.
type Token struct {
	Epoch    uint64
	deadline time.Duration
	boottime func() time.Duration
}

// InTime reports whether the start that it permits may still happen. What is
// found to have started later counts as a breach, and its result is not current.
func (t Token) InTime() bool { return t.boottime != nil && t.boottime() < t.deadline }

// NewRole makes a Role; Run keeps it up to date. newLeaderWait is 1.1 L of
// cluster.Timing, boottime the clock that leases are counted on.
func NewRole(site string, s Standing, newLeaderWait time.Duration, boottime func() time.Duration, log *slog.Logger) *Role {
	return &Role{
		site: site, standing: s, boottime: boottime, wait: newLeaderWait, log: log,
		held: map[*tenure]struct{}{}, ended: map[*tenure]struct{}{}, change: make(chan struct{}),
	}
}

// Check permits one start as primary, within StartWithin and while the lease
// lasts. It reads the agreed state and the lease as they are now.
func (r *Role) Check() (Token, error) {
	// The clock comes first: what is read after it is at least as new.
	now := r.boottime()
	r.mu.Lock()
	defer r.mu.Unlock()
	epoch, left, err := r.may(now)
	if err != nil {
		return Token{}, err
	}
	r.lastToken = now + min(StartWithin, left)
	return Token{Epoch: epoch, deadline: r.lastToken, boottime: r.boottime}, nil
}

// Holding reports whether this node may act as primary, and the epoch.
func (r *Role) Holding() (epoch uint64, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	epoch, _, err := r.may(r.boottime())
	return epoch, err == nil
}

// may assumes the lock. now is from before the call, left the rest of the lease.
func (r *Role) may(now time.Duration) (epoch uint64, left time.Duration, err error) {
	s := r.standing.State()
	// This clock is read after the state: a wait must not begin before what it
	// waits for was seen.
	r.note(s, r.boottime())
	left, heard := r.standing.Lease()
	p := s.Primary
	switch {
	case s.ClusterID == "" || p.Site != r.site:
		return 0, 0, fmt.Errorf("%w: the primary is %q in epoch %d", ErrNotPrimary, p.Site, p.Epoch)
	case left <= 0:
		return 0, 0, fmt.Errorf("%w: no lease", ErrNotPrimary)
	case heard > p.Epoch:
		return 0, 0, fmt.Errorf("%w: there is an epoch %d, this node has seen %d", ErrNotPrimary, heard, p.Epoch)
	case r.leaving(s):
		return 0, 0, fmt.Errorf("%w: it is being handed over to %s", ErrNotPrimary, s.Switchover.To)
	case now < r.notBefore:
		return 0, 0, fmt.Errorf("%w: leases of the primary before may still run", ErrNotPrimary)
	}
	return p.Epoch, left, nil
}

// leaving: a switchover away from here stands in the agreed state. Its deadline
// is not looked at: clocks differ, and a promotion by the coordinator's clock
// may still come. The raft leader clears what is overdue.
func (r *Role) leaving(s *agreed.State) bool {
	return s.Switchover != nil && s.Switchover.From == r.site
}

// note moves notBefore at a change of the primary: 1.1 L after it was seen here,
// unless everybody before had let go; what was still running of earlier waits
// goes on. Epochs that were not seen one by one are not known to be released.
//
// A process that has just started doesn't know what it promised before, nor how
// far behind its copy of the state is, so it waits twice that.
func (r *Role) note(s *agreed.State, now time.Duration) {
	p := s.Primary
	switch {
	case p.Epoch <= r.epoch:
		return
	case r.epoch == 0:
		r.notBefore = now + 2*r.wait
	case !p.Released || p.Epoch != r.epoch+1:
		r.notBefore = now + r.wait
	}
	r.epoch = p.Epoch
}

// WhilePrimary gives a context that ends, with ErrNotPrimary as its cause, when
// this node may no longer act as primary; at once if it may not now. The
// caller calls done when what ran under it has stopped: a switchover waits for
// that.
func (r *Role) WhilePrimary(ctx context.Context) (primary context.Context, done func()) {
	primary, end := context.WithCancelCause(ctx)
	r.mu.Lock()
	defer r.mu.Unlock()
	epoch, _, err := r.may(r.boottime())
	if err != nil {
		end(err)
		return primary, func() { end(nil) }
	}
	t := &tenure{epoch: epoch, end: end}
	r.held[t] = struct{}{}
	r.changed() // Run looks more often now
	return primary, func() {
		end(nil)
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.held, t)
		delete(r.ended, t)
		r.changed()
	}
}

// Await blocks until this node may act as primary.
func (r *Role) Await(ctx context.Context) (epoch uint64, err error) {
	for {
		r.mu.Lock()
		epoch, _, err := r.may(r.boottime())
		change := r.change
		r.mu.Unlock()
		if err == nil {
			return epoch, nil
		}
		select {
		case <-ctx.Done():
			return 0, fmt.Errorf("wait for the role: %w", ctx.Err())
		case <-change:
		}
	}
}

// Release blocks until this node has seen the switchover and all that ran here
// as primary has stopped; from then on nothing starts until the switchover is
// off the agreed state. It is the peer's side of Releaser.
func (r *Role) Release(ctx context.Context, switchoverID string) error {
	for {
		agreed := r.standing.Changed()
		s := r.standing.State()
		_, change := r.refresh()
		r.mu.Lock()
		busy := len(r.held) + len(r.ended)
		unused := r.lastToken - r.boottime()
		r.mu.Unlock()
		seen := s.Switchover != nil && s.Switchover.ID == switchoverID && s.Switchover.From == r.site
		var expired <-chan time.Time
		if seen && busy == 0 {
			if unused <= 0 {
				return nil
			}
			// A Token that was given out may still be used.
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
	// heldLook is the longest sleep of Run while something runs as primary. The
	// end of the lease wakes it by itself, but on a clock that stands still while
	// the machine is suspended: this is how long after that contexts live on.
	// They are the courtesy; Check and the epoch are the fence.
	heldLook = StartWithin
	idleLook = time.Second
)

// Run ends the primary contexts when their time is over, until ctx ends; then
// it ends all of them.
func (r *Role) Run(ctx context.Context) error {
	wake := time.NewTimer(0)
	defer wake.Stop()
	for {
		agreed, leased := r.standing.Changed(), r.standing.LeaseChanged()
		sleep, change := r.refresh()
		wake.Reset(sleep)
		select {
		case <-ctx.Done():
			r.mu.Lock()
			r.endAll(fmt.Errorf("%w: this node stops", ErrNotPrimary))
			r.mu.Unlock()
			return nil
		case <-agreed:
		case <-leased:
		case <-change:
		case <-wake.C:
		}
	}
}

// refresh ends what may not go on, and tells waiters of a change. It gives the
// time until something may change by itself, and what closes at the next change
// from elsewhere.
func (r *Role) refresh() (sleep time.Duration, change <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := r.boottime()
	epoch, left, err := r.may(now)
	if err == nil {
		for t := range r.held {
			if t.epoch != epoch {
				r.end(t, fmt.Errorf("%w: epoch %d has ended", ErrNotPrimary, t.epoch))
			}
		}
	} else {
		r.endAll(err)
	}
	if r.holding != (err == nil) {
		r.holding = err == nil
		if r.holding {
			r.log.Info("acting as primary", "site", r.site, "epoch", epoch)
		} else {
			r.log.Info("no longer acting as primary", "site", r.site, "why", err)
		}
		r.changed()
	}
	sleep = idleLook
	switch {
	case err == nil && len(r.held) > 0:
		sleep = min(left, heldLook)
	case err == nil:
		sleep = min(left, idleLook)
	case now < r.notBefore:
		sleep = min(r.notBefore-now, idleLook)
	}
	return sleep, r.change
}

func (r *Role) endAll(cause error) {
	for t := range r.held {
		r.end(t, cause)
	}
}

// end assumes the lock. CancelCauseFunc runs no foreign code before it returns,
// except functions given to context.AfterFunc, which run on their own.
func (r *Role) end(t *tenure, cause error) {
	t.end(cause)
	delete(r.held, t)
	r.ended[t] = struct{}{}
}

func (r *Role) changed() {
	close(r.change)
	r.change = make(chan struct{})
}
