package cluster

import (
	"context"
	"errors"
	"fmt"
	"math"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/clock"
)

// Leadership is an unbroken time of leading raft, seen from inside: it begins
// with the first commit and ends, with its context, when raft steps down or no
// tick was committed for a lease's length.
type Leadership struct {
	Term        uint64
	FirstCommit time.Duration // Boottime
}

// leadershipBoard tells waiters that leadership began.
type leadershipBoard struct {
	mu    sync.Mutex // guards what follows
	now   *Leadership
	ctx   context.Context
	begun chan struct{}
}

func (b *leadershipBoard) init() { b.begun = make(chan struct{}) }

func (b *leadershipBoard) begin(ctx context.Context, l Leadership) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.now, b.ctx = &l, ctx
	close(b.begun)
	b.begun = make(chan struct{})
}

func (b *leadershipBoard) current() (*Leadership, context.Context, <-chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ctx != nil && b.ctx.Err() != nil {
		b.now, b.ctx = nil, nil
	}
	return b.now, b.ctx, b.begun
}

// Leading gives the present leadership, false when this node has none.
func (c *Cluster) Leading() (Leadership, bool) {
	l, _, _ := c.leadership.current()
	if l == nil {
		return Leadership{}, false
	}
	return *l, true
}

// WhileLeader runs task each time this node leads, with a context that ends
// with the leadership, and blocks until ctx ends. A task that fails ends it.
func (c *Cluster) WhileLeader(ctx context.Context, task func(context.Context, Leadership) error) error {
	for {
		l, lctx, begun := c.leadership.current()
		if l == nil {
			select {
			case <-ctx.Done():
				return nil
			case <-begun:
			}
			continue
		}
		tctx, cancel := context.WithCancel(lctx)
		stop := context.AfterFunc(ctx, cancel)
		err := task(tctx, *l)
		stop()
		cancel()
		if ctx.Err() != nil {
			return nil
		}
		if lctx.Err() == nil {
			if err != nil {
				return err
			}
			// The task is done before its time; wait for the next leadership.
			select {
			case <-ctx.Done():
				return nil
			case <-lctx.Done():
			}
		}
	}
}

// leadLoop notices leadership and ticks through it, until ctx ends.
func (c *Cluster) leadLoop(ctx context.Context) error {
	// raft's own channel says that something changed, not what: it drops all but
	// the newest value, so the state is read. The ticker is for the case that it
	// once says nothing.
	tick := time.NewTimer(0)
	defer tick.Stop()
	for {
		for ctx.Err() == nil && c.raft.Load().State() == raft.Leader {
			if err := c.lead(ctx); err != nil {
				return err
			}
		}
		tick.Reset(clock.UntilTick(clock.Boottime(), c.Timing().Tick))
		select {
		case <-ctx.Done():
			return nil
		case <-c.raft.Load().LeaderCh():
		case <-tick.C:
		}
	}
}

type tickResult struct {
	proposed time.Duration
	err      error
}

// refusedTooLong is after how long of refused ticks a leader is taken for
// wedged: a failed transfer can leave one that refuses all writes for ever
// (hashicorp/raft #696). Only a restart helps.
const refusedTooLong = 10 * time.Second

// maxTicks bounds the ticks whose commit is awaited.
const maxTicks = 8

// lead commits ticks until raft steps down.
func (c *Cluster) lead(ctx context.Context) error {
	r := c.raft.Load()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var (
		term       = r.CurrentTerm()
		results    = make(chan tickResult, maxTicks)
		pending    = 0
		lastCommit time.Duration
		refused    time.Duration // since when ticks are refused, 0: they are not
		leading    = false
		end        = func() {} // ends the leadership's context
	)
	defer func() {
		end()
		c.quarantine.Store(nil)
		if leading {
			c.log.Info("raft leadership ended", "term", term)
		}
	}()
	tick := time.NewTimer(clock.UntilTick(clock.Boottime(), c.Timing().Tick))
	defer tick.Stop()
	overdue := time.NewTimer(0) // fires a lease's length after the newest commit
	defer overdue.Stop()
	propose := func() {
		if pending >= maxTicks || c.yielding.Load() || (lastCommit == 0 && c.holdStill()) {
			return
		}
		pending++
		go func() { results <- c.tick(r) }()
	}
	propose()
	for r.State() == raft.Leader && r.CurrentTerm() == term {
		if leading && clock.Boottime()-lastCommit > c.Timing().Lease {
			// Still raft's leader by name, but without proof of a quorum.
			leading = false
			end()
			c.log.Warn("leadership suspended: no tick was committed for a lease's length", "term", term)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-r.LeaderCh():
		case <-overdue.C:
		case <-tick.C:
			tick.Reset(clock.UntilTick(clock.Boottime(), c.Timing().Tick))
			propose()
		case <-c.committed:
			propose()
		case res := <-results:
			pending--
			switch {
			case res.err == nil:
				refused = 0
				lastCommit = max(lastCommit, res.proposed)
				c.lease.committed(res.proposed, fencesOf(c.State()))
				overdue.Reset(max(0, lastCommit+c.Timing().Lease-clock.Boottime()) + time.Millisecond)
				if !leading && clock.Boottime()-lastCommit <= c.Timing().Lease {
					lctx, cancelLeading := context.WithCancel(ctx)
					leading, end = true, cancelLeading
					c.leadership.begin(lctx, Leadership{Term: term, FirstCommit: clock.Boottime()})
					c.log.Info("raft leadership begins", "term", term)
				}
			case errors.Is(res.err, raft.ErrLeadershipTransferInProgress):
				if refused == 0 {
					refused = clock.Boottime()
				}
				if clock.Boottime()-refused > refusedTooLong {
					return fmt.Errorf("raft refuses all writes %s after a leadership transfer: stopping, a restart cures it", refusedTooLong)
				}
			}
		}
	}
	return nil
}

// holdStill asks for the quarantine and logs when the answer changes. A
// majority that was replaced by a recovery while it was down would, coming back
// together, elect a leader in its old generation; without ticks it gives no
// lease and changes nothing until somebody who would know was asked.
func (c *Cluster) holdStill() bool {
	if c.opts.Quarantined == nil {
		return false
	}
	why, quarantined := c.opts.Quarantined()
	before := c.quarantine.Load()
	switch {
	case !quarantined:
		if before != nil {
			c.quarantine.Store(nil)
			c.log.Info("quarantine ended", "because", why)
		}
		return false
	case before == nil || *before != why:
		c.quarantine.Store(&why)
		c.log.Warn("quarantined: this majority restarted cold", "why", why)
	}
	return true
}

// tick commits one entry; the time counts from before it was proposed.
func (c *Cluster) tick(r *raft.Raft) tickResult {
	res := tickResult{proposed: clock.Boottime()}
	cmd, err := agreed.NewCommand(agreed.CmdTick, time.Now(), nil)
	if err == nil {
		var b []byte
		if b, err = cmd.Encode(); err == nil {
			err = r.Apply(b, c.Timing().Lease).Error()
		}
	}
	res.err = err
	return res
}

// Times of a leadership transfer: each step has its deadline.
const (
	transferTimeout = 5 * time.Second
	canaryTimeout   = 3 * time.Second
)

// TransferLeadership moves raft's leadership to a voter and checks that it went
// there: the future of raft's own transfer is nil even when another node won.
// It may be called on any node.
func (c *Cluster) TransferLeadership(ctx context.Context, to string) error {
	ctx, cancel := context.WithTimeout(ctx, transferTimeout+canaryTimeout)
	defer cancel()
	leader, _ := c.leader()
	switch leader {
	case to:
		return nil
	case "":
		return ErrNoQuorum
	case c.opts.Name:
		if err := c.yield(ctx, to); err != nil {
			return err
		}
	default:
		if err := c.askToYield(ctx, leader, to); err != nil {
			return err
		}
	}
	// A canary entry: raft can name a leader that refuses writes.
	cctx, cancelCanary := context.WithTimeout(ctx, canaryTimeout)
	defer cancelCanary()
	if err := c.waitLeader(cctx, to); err != nil {
		return err
	}
	if _, err := c.Propose(cctx, agreed.CmdTick, nil); err != nil {
		return fmt.Errorf("leadership went to %s, but it takes no entries: %w", to, err)
	}
	return nil
}

// yield is the leader's part of a transfer.
func (c *Cluster) yield(ctx context.Context, to string) error {
	r := c.raft.Load()
	if r == nil || r.State() != raft.Leader {
		return ErrNotLeader
	}
	// No tick while leadership moves, so no lease is granted by a leader that
	// is about to be another.
	if !c.yielding.CompareAndSwap(false, true) {
		return fmt.Errorf("transfer to %s: another transfer is under way: %w", to, ErrNotLeader)
	}
	defer c.yielding.Store(false)
	term := r.CurrentTerm()
	done := make(chan error, 1)
	go func() { done <- r.LeadershipTransferToServer(raft.ServerID(to), raft.ServerAddress(to)).Error() }()
	select {
	case err := <-done:
		if err != nil {
			return fmt.Errorf("transfer leadership to %s: %w", to, err)
		}
	case <-ctx.Done():
		return fmt.Errorf("transfer leadership to %s: %w", to, ctx.Err())
	}
	// Not longer than anybody else leads: should that be this node again, it has
	// ticks to commit.
	return c.waitSuccessor(ctx, to, term)
}

// waitLeader waits until this node sees want lead.
func (c *Cluster) waitLeader(ctx context.Context, want string) error {
	return c.waitSuccessor(ctx, want, math.MaxUint64)
}

// waitSuccessor gives up when it sees another lead in a later term than after.
func (c *Cluster) waitSuccessor(ctx context.Context, want string, after uint64) error {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		leader, term := c.leader()
		if leader == want {
			return nil
		}
		// While it steps down, raft names itself in a term that is another's.
		other := leader != "" && (leader != c.opts.Name || c.raft.Load().State() == raft.Leader)
		if other && term > after {
			return fmt.Errorf("leadership went to %s in term %d, not to %s: %w", leader, term, want, ErrLeadershipMoved)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("leadership is with %q, not with %s: %w", leader, want, ctx.Err())
		case <-tick.C:
		}
	}
}

// handOver gives leadership away before this node stops, so that its end is no
// election. Failure is no harm: the others elect.
func (c *Cluster) handOver(ctx context.Context) {
	r := c.raft.Load()
	if r == nil || r.State() != raft.Leader {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, transferTimeout)
	defer cancel()
	to := c.successor()
	if to == "" {
		return
	}
	if err := c.yield(ctx, to); err != nil {
		c.log.Warn("leadership was not handed over; the others elect", "to", to, "err", err)
		return
	}
	c.log.Info("leadership handed over", "to", to)
}

// successor is the voter that was heard last, of the own site if there is one.
func (c *Cluster) successor() string {
	best, bestAgo, bestNear := "", c.Timing().Patience, false
	peers := c.Peers()
	for _, s := range c.Raft().Servers {
		p := peers[s.Name]
		if !s.Voter || p.Draining || !p.HeardWithin(c.Timing().Patience) {
			continue
		}
		near := p.Site == c.opts.Site
		if best == "" || (near && !bestNear) || (near == bestNear && p.Ago < bestAgo) {
			best, bestAgo, bestNear = s.Name, p.Ago, near
		}
	}
	return best
}
