package cluster

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/clock"
	"github.com/dsnode/dsnode/storage/notify"
)

// Leadership is a period in which this node leads raft and commits ticks. It begins
// with the first commit. It ends, and its context with it, when raft steps down or when
// no tick was committed for the length of a lease.
type Leadership struct {
	Term        uint64
	FirstCommit time.Duration // Boottime
}

// leadershipState has the current leadership and notifies waiters when one begins.
type leadershipState struct {
	mu    sync.Mutex // guards the fields below
	now   *Leadership
	ctx   context.Context
	begun notify.Broadcast
}

func (b *leadershipState) begin(ctx context.Context, l Leadership) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.now, b.ctx = &l, ctx
	b.begun.Send()
}

func (b *leadershipState) current() (*Leadership, context.Context, <-chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ctx != nil && b.ctx.Err() != nil {
		b.now, b.ctx = nil, nil
	}
	return b.now, b.ctx, b.begun.Next()
}

// Leading returns the current leadership, false if this node does not lead.
func (c *Cluster) Leading() (Leadership, bool) {
	l, _, _ := c.leadership.current()
	if l == nil {
		return Leadership{}, false
	}
	return *l, true
}

// WhileLeader runs task in each leadership of this node, with a context that ends with
// the leadership, until ctx ends. It returns early with the error of a task that failed
// while its leadership lasted.
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
			// The task has ended before its leadership: wait for the next one.
			select {
			case <-ctx.Done():
				return nil
			case <-lctx.Done():
			}
		}
	}
}

// leadLoop calls lead whenever raft makes this node the leader, until ctx ends.
func (c *Cluster) leadLoop(ctx context.Context) error {
	// raft's LeaderCh keeps only its newest value, so it is used as a notification
	// and the state is read from raft. The timer covers a missed notification.
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		for ctx.Err() == nil && c.raft.Load().State() == raft.Leader {
			if err := c.lead(ctx); err != nil {
				return err
			}
		}
		timer.Reset(clock.UntilTick(c.opts.Host.Boottime(), c.Timing().Tick))
		select {
		case <-ctx.Done():
			return nil
		case <-c.raft.Load().LeaderCh():
		case <-timer.C:
		}
	}
}

type tickResult struct {
	proposed time.Duration
	err      error
}

// refusedTooLong is how long a leader may refuse ticks before this node stops: after a
// failed transfer a leader can refuse all writes until it is restarted (hashicorp/raft
// #696). That is the last resort: yield transfers only to a node that follows, and while
// ticks are refused no dial to an offline peer keeps raft waiting (see waitForPeer).
const refusedTooLong = 10 * time.Second

// maxTicks bounds the ticks that wait for their commit.
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
		refused    time.Duration // since when ticks have been refused; 0: they are not
		leading    = false
		end        = func() {} // ends the leadership's context
	)
	defer func() {
		end()
		c.refusing.Store(false)
		c.quarantine.Store(nil)
		if leading {
			c.log.Info("raft leadership ended", "term", term)
		}
	}()
	timer := time.NewTimer(clock.UntilTick(c.opts.Host.Boottime(), c.Timing().Tick))
	defer timer.Stop()
	leaseEnd := time.NewTimer(0) // fires a lease's length after the newest committed tick
	defer leaseEnd.Stop()
	propose := func() {
		// While this node's log is being filled again, raft's configuration in it may be from
		// when this node was the only voter: then it elects itself, which proves no quorum.
		if pending >= maxTicks || c.transferring.Load() || c.votes.tooEarly() || (lastCommit == 0 && c.checkQuarantine()) {
			return
		}
		pending++
		go func() { results <- c.tick(r) }()
	}
	propose()
	for r.State() == raft.Leader && r.CurrentTerm() == term {
		if leading && c.opts.Host.Boottime()-lastCommit > c.Timing().Lease {
			// Raft still reports this node as leader, but no quorum has confirmed it.
			leading = false
			end()
			c.log.Warn("leadership suspended: no tick was committed for a lease's length", "term", term)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-r.LeaderCh():
		case <-leaseEnd.C:
		case <-timer.C:
			timer.Reset(clock.UntilTick(c.opts.Host.Boottime(), c.Timing().Tick))
			propose()
		case <-c.committed:
			propose()
		case res := <-results:
			pending--
			switch {
			case res.err == nil:
				refused = 0
				c.refusing.Store(false)
				lastCommit = max(lastCommit, res.proposed)
				c.lease.committed(res.proposed, fencesOf(c.State()))
				leaseEnd.Reset(max(0, lastCommit+c.Timing().Lease-c.opts.Host.Boottime()) + time.Millisecond)
				if !leading && c.opts.Host.Boottime()-lastCommit <= c.Timing().Lease {
					lctx, cancelLeading := context.WithCancel(ctx)
					leading, end = true, cancelLeading
					c.leadership.begin(lctx, Leadership{Term: term, FirstCommit: c.opts.Host.Boottime()})
					c.log.Info("raft leadership began", "term", term)
				}
			case errors.Is(res.err, raft.ErrLeadershipTransferInProgress):
				if refused == 0 {
					refused = c.opts.Host.Boottime()
				}
				c.refusing.Store(true)
				if c.opts.Host.Boottime()-refused > refusedTooLong {
					return fmt.Errorf("raft has refused all writes for %s after a leadership transfer: this node stops and must be restarted", refusedTooLong)
				}
			}
		}
	}
	return nil
}

// checkQuarantine calls Options.Quarantined and logs changes of its result. If a
// majority was down while the cluster was recovered without it, it would elect a leader
// of its old generation when it restarts. While quarantined, that leader commits no
// ticks, so no node gets a lease, and it refuses changes, until it has compared
// generations with the other sites.
func (c *Cluster) checkQuarantine() bool {
	if c.opts.Quarantined == nil {
		return false
	}
	why, quarantined := c.opts.Quarantined()
	before := c.quarantine.Load()
	switch {
	case !quarantined:
		if before != nil {
			c.quarantine.Store(nil)
			c.log.Info("quarantine ended", "reason", why)
		}
		return false
	case before == nil || *before != why:
		c.quarantine.Store(&why)
		c.log.Warn("quarantined: this majority restarted cold", "reason", why)
	}
	return true
}

// tick commits a tick. The result has the time from before it was proposed.
func (c *Cluster) tick(r *raft.Raft) tickResult {
	res := tickResult{proposed: c.opts.Host.Boottime()}
	cmd, err := agreed.NewCommand(agreed.CmdTick, c.opts.Host.Now(), nil)
	if err == nil {
		var b []byte
		if b, err = cmd.Encode(); err == nil {
			err = r.Apply(b, c.Timing().Lease).Error()
		}
	}
	res.err = err
	return res
}

// Timeouts of the two steps of a leadership transfer.
const (
	transferTimeout = 5 * time.Second
	canaryTimeout   = 3 * time.Second
)

// TransferLeadership transfers raft's leadership to a voter and verifies the new leader:
// raft's own transfer returns no error even if another node was elected. It may be
// called on any node.
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
		if err := c.requestYield(ctx, leader, to); err != nil {
			return err
		}
	}
	// Commit a canary entry: the new leader may refuse writes.
	cctx, cancelCanary := context.WithTimeout(ctx, canaryTimeout)
	defer cancelCanary()
	if err := c.waitLeader(cctx, to); err != nil {
		return err
	}
	if _, err := c.Propose(cctx, agreed.CmdTick, nil); err != nil {
		return fmt.Errorf("leadership was transferred to %s, but it does not commit entries: %w", to, err)
	}
	return nil
}

// yield is the leader's part of TransferLeadership.
func (c *Cluster) yield(ctx context.Context, to string) error {
	r := c.raft.Load()
	if r == nil || r.State() != raft.Leader {
		return ErrNotLeader
	}
	if err := c.proveFollows(ctx, to); err != nil {
		return fmt.Errorf("don't transfer leadership to %s: %w", to, err)
	}
	// Commit no ticks during the transfer, so that this leader extends no lease while
	// another node may become leader.
	if !c.transferring.CompareAndSwap(false, true) {
		return fmt.Errorf("transfer leadership to %s: another transfer is in progress: %w", to, ErrNotLeader)
	}
	defer c.transferring.Store(false)
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
	// If another node or this one is elected instead, return at once: this node may
	// have to commit ticks again.
	return c.waitSuccessor(ctx, to, term)
}

// waitLeader waits until this node knows want as the leader.
func (c *Cluster) waitLeader(ctx context.Context, want string) error {
	return c.waitSuccessor(ctx, want, math.MaxUint64)
}

// waitSuccessor is waitLeader, but fails when another node leads in a term later than
// after.
func (c *Cluster) waitSuccessor(ctx context.Context, want string, after uint64) error {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		leader, term := c.leader()
		if leader == want {
			return nil
		}
		// While this node steps down, raft reports it as leader of the new term.
		other := leader != "" && (leader != c.opts.Name || c.raft.Load().State() == raft.Leader)
		if other && term > after {
			return fmt.Errorf("%s became leader in term %d, not %s: %w", leader, term, want, ErrLeadershipMoved)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the leader is %q, not %s: %w", leader, want, ctx.Err())
		case <-tick.C:
		}
	}
}

// handOver transfers leadership before this node stops, which avoids the delay of an
// election. If it fails, the other nodes elect a leader.
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
		c.log.Warn("could not transfer leadership before stopping; the other nodes elect a leader", "to", to, "err", err)
		return
	}
	c.log.Info("leadership transferred before stopping", "to", to)
}

// successor is the voter that should lead when this node stops; empty: there is none. A
// voter that does not follow the agreed state is none.
func (c *Cluster) successor() string {
	able, _ := c.heardVoters(c.Timing().Patience)
	able = slices.DeleteFunc(able, func(p PeerView) bool { return p.Stuck >= c.stuckAfter() })
	if len(able) == 0 {
		return ""
	}
	return slices.MinFunc(able, c.bySuccession).Name
}

// heardVoters are the other voters that have answered a ping of the last while and don't
// drain. voters counts all.
func (c *Cluster) heardVoters(while time.Duration) (heard []PeerView, voters int) {
	peers := c.Peers()
	for _, s := range c.Raft().Servers {
		if !s.Voter {
			continue
		}
		voters++
		if p := peers[s.Name]; p.HeardWithin(while) && !p.Draining {
			heard = append(heard, p)
		}
	}
	return heard, voters
}

// bySuccession orders voters: one with a slow disk last, then one of another site, then
// one whose answer is older.
func (c *Cluster) bySuccession(a, b PeerView) int {
	last := func(aIs, bIs bool) int {
		switch {
		case aIs == bIs:
			return 0
		case aIs:
			return 1
		}
		return -1
	}
	return cmp.Or(last(a.Disk.SlowFor > 0, b.Disk.SlowFor > 0),
		last(a.Site != c.opts.Site, b.Site != c.opts.Site), cmp.Compare(a.Ago, b.Ago))
}
