package failover

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/clock"
	"github.com/dsnode/dsnode/cluster/config"
)

// Agreement is what failover needs of the cluster; *cluster.Cluster is one.
type Agreement interface {
	// State is the agreed state, immutable; Changed closes at its next change.
	State() *agreed.State
	Changed() <-chan struct{}
	// Lease is how long this node's lease is good and the highest epoch heard.
	Lease() (left time.Duration, epoch uint64)
	// Paused is the longest recent time in which this process did not run.
	Paused() time.Duration
	Peers() map[string]cluster.PeerView
	Raft() cluster.RaftView
	Leading() (cluster.Leadership, bool)
	Timing() config.Timing
	Propose(ctx context.Context, t agreed.CommandType, data any) (index uint64, err error)
	// TransferLeadership moves raft's leadership and proves with a canary entry
	// that it arrived.
	TransferLeadership(ctx context.Context, to string) error
}

var _ Agreement = (*cluster.Cluster)(nil)

// Releaser asks a node of the primary site to let go.
type Releaser interface {
	// Release returns once the node has ended everything that it ran as
	// primary because of this switchover, and will not begin again before the
	// switchover is off the agreed state; see Fence.Release.
	Release(ctx context.Context, node, switchoverID string) error
}

// Options is what a Coordinator is made of. All of it is needed unless it says
// otherwise.
type Options struct {
	Name, Site string
	Agreement  Agreement
	Releaser   Releaser
	// Health is what this node says of itself; it must not block.
	Health func() cluster.Health
	// Boottime is the clock that leases are counted on; Now the wall clock.
	Boottime func() time.Duration
	Now      func() time.Time
	// Quarantined says that this cluster restarted cold; see Quarantine.
	Quarantined func() bool
	// Behind is how many records each site's copy lacks, absent when unknown.
	// Nil while there is no replication.
	Behind func() map[string]int64
	// AtRisk is how many records a change of primary from a site to another
	// could lose, nil when unknown. The func is nil while there is no
	// replication: then nothing is at risk, and no figure is given.
	AtRisk func(from, to string) *int64

	Logger     *slog.Logger
	Registerer prometheus.Registerer
}

const (
	// lookEvery is how often the coordinator looks: twice for each ping.
	lookEvery = 125 * time.Millisecond
	// grudgeTime is how long a site that was replaced is the last choice.
	grudgeTime = 60 * time.Second
	// followFor is how long after a promotion the raft leader is moved to the
	// primary site at once; of a later election elsewhere see GoHome.
	followFor = 2 * time.Minute
	// followTries bounds the attempts of one leadership to move itself.
	followTries   = 6
	followBackoff = time.Second
)

// dwell is the least time between two automatic promotions: four times the
// patience (10 s), so a second loss right after the first leaves the cluster
// without a primary for about as long as the first one did, while nothing can
// change the primary more than six times a minute.
func dwell(t config.Timing) time.Duration { return 4 * t.Patience }

// Coordinator replaces a lost primary, and carries out planned switchovers.
// Every node has one: it looks all the time, and acts while its node leads.
type Coordinator struct {
	o       Options
	log     *slog.Logger
	timing  config.Timing
	metrics *metrics

	mu     sync.Mutex // guards what follows
	view   View
	action Action
	reason Reason
	looked bool
}

// NewCoordinator makes a Coordinator; Run starts it.
func NewCoordinator(o Options) *Coordinator {
	return &Coordinator{o: o, log: o.Logger, timing: o.Agreement.Timing(), metrics: newMetrics(o.Registerer)}
}

// Look is the newest view of this node, what it would do if it led, and why.
// False before the first look.
func (c *Coordinator) Look() (View, Action, Reason, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.view, c.action, c.reason, c.looked
}

// watch is the state of Run's loop.
type watch struct {
	memory Memory
	// epochAt is when this process first saw the present epoch.
	epoch   uint64
	epochAt time.Duration
	// said is what was last logged as leader.
	said Reason
	// moves counts the attempts to move the leadership since the epoch or the
	// term changed; the next one is not before moveAt.
	term   uint64
	moves  int
	moveAt time.Duration
	homing homing
	// homingSaid is what was last logged of it.
	homingSaid HomingReason
}

// Run looks and acts until ctx ends.
func (c *Coordinator) Run(ctx context.Context) error {
	tick := time.NewTimer(0)
	defer tick.Stop()
	var w watch
	// One act at a time, beside the loop: a proposal that hangs must not look
	// like a pause of this node.
	var acting sync.WaitGroup
	defer acting.Wait()
	actx, stop := context.WithCancel(ctx)
	defer stop()
	idle := make(chan struct{}, 1)
	idle <- struct{}{}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		tick.Reset(clock.UntilTick(c.o.Boottime(), lookEvery))
		act := c.look(&w)
		if act == nil {
			continue
		}
		select {
		case <-idle:
			acting.Go(func() {
				act(actx)
				idle <- struct{}{}
			})
		default: // the one before is still under way
		}
	}
}

// look takes one view and returns what is to be done about it, nil for nothing.
func (c *Coordinator) look(w *watch) func(context.Context) {
	s := c.o.Agreement.State()
	if s.ClusterID == "" || s.Parsed == nil {
		return nil
	}
	now := c.o.Boottime()
	if w.epoch != s.Primary.Epoch {
		at := now
		if w.epoch == 0 {
			// Just started: how long ago it was is on others' wall clocks only.
			at = now - max(0, c.o.Now().Sub(s.Primary.Since))
		}
		w.epoch, w.epochAt, w.moves, w.moveAt = s.Primary.Epoch, at, 0, now
	}
	in := c.input(s, now)
	w.homing.observe(s, in, in.RaftLeader)
	var sites []SiteView
	w.memory, sites = Observe(w.memory, in)
	v := c.newView(s, sites, now, w)
	action, reason := Decide(v)
	c.mu.Lock()
	c.view, c.action, c.reason, c.looked = v, action, reason, true
	c.mu.Unlock()

	l, leads := c.o.Agreement.Leading()
	if !leads {
		w.said = ""
		return nil
	}
	if w.term != l.Term {
		w.term, w.moves, w.moveAt = l.Term, 0, now
	}
	if w.said != reason {
		w.said = reason
		c.metrics.decisions.WithLabelValues(string(reason)).Inc()
		c.log.Info("failover decision", "action", action.Kind, "site", action.Site, "reason", reason,
			"primary", s.Primary.Site, "epoch", s.Primary.Epoch, "term", l.Term)
	}
	switch action.Kind {
	case Promote:
		return func(ctx context.Context) { c.promote(ctx, s, action.Site, reason, v, l.Term) }
	case ExpireSwitchover:
		return func(ctx context.Context) { c.expire(ctx, s) }
	case Stay:
	}
	if act := c.follow(w, s, in, now); act != nil {
		w.homing.try(l.Term, now)
		return act
	}
	return c.goHome(w, s, in, l, reason)
}

// promote proposes the one entry that changes the primary. Only if the epoch is
// still the one that was looked at does it have any effect.
func (c *Coordinator) promote(ctx context.Context, s *agreed.State, site string, reason Reason, v View, term uint64) {
	if l, leads := c.o.Agreement.Leading(); !leads || l.Term != term {
		return // a new leader waits before it promotes; this decision is the old one's
	}
	ctx, cancel := context.WithTimeout(ctx, c.timing.Transport)
	defer cancel()
	down, known := outage(v, reason)
	p := agreed.Promote{
		Site: site, ExpectEpoch: s.Primary.Epoch, Generation: s.Generation.Number,
		Reason: string(reason), Kind: agreed.FailoverUnplanned,
		// Another may be elected at this moment, and be handed the proposal.
		Term: term,
	}
	if known {
		seconds := down.Seconds()
		p.RTOSeconds = &seconds
	}
	began := c.o.Boottime()
	_, err := c.o.Agreement.Propose(ctx, agreed.CmdPromote, p)
	switch {
	case err == nil:
		down += c.o.Boottime() - began
		c.metrics.duration.WithLabelValues(string(agreed.FailoverUnplanned)).Observe(down.Seconds())
		c.log.Warn("primary replaced", "from", s.Primary.Site, "to", site, "epoch", s.Primary.Epoch+1,
			"reason", reason, "rto", down)
	case errors.Is(err, agreed.ErrStaleEpoch), errors.Is(err, agreed.ErrStaleTerm):
		c.log.Info("promotion overtaken by another change", "to", site, "expected_epoch", s.Primary.Epoch, "err", err)
	default:
		c.log.Warn("promotion failed, the next look decides again", "to", site, "err", err)
		c.pause(ctx)
	}
}

// outage is how long the primary has been gone when it is replaced.
func outage(v View, why Reason) (down time.Duration, known bool) {
	i := slices.IndexFunc(v.Sites, func(s SiteView) bool { return s.Name == v.Primary })
	if i < 0 {
		return 0, false
	}
	if why == PrimaryNoLease {
		return max(v.Sites[i].NoLeaseFor, v.Sites[i].LeaderSilence), true
	}
	return v.Sites[i].LeaderSilence, true
}

// expire clears a switchover that is past its deadline: its coordinator died
// or was cut off. Only then may the old primary go on.
func (c *Coordinator) expire(ctx context.Context, s *agreed.State) {
	ctx, cancel := context.WithTimeout(ctx, c.timing.Transport)
	defer cancel()
	_, err := c.o.Agreement.Propose(ctx, agreed.CmdSwitchover, agreed.SwitchoverSet{
		Expect: s.Switchover.ID, Reason: string(SwitchoverOverdue),
	})
	switch {
	case err == nil:
		c.log.Warn("abandoned switchover cleared", "id", s.Switchover.ID, "to", s.Switchover.To, "by", s.Switchover.By)
	case errors.Is(err, agreed.ErrNoSwitchover):
	default:
		c.log.Warn("abandoned switchover not cleared yet", "id", s.Switchover.ID, "err", err)
		c.pause(ctx)
	}
}

// pause keeps a failing act from being tried ten times a second.
func (c *Coordinator) pause(ctx context.Context) {
	wait := time.NewTimer(2 * c.timing.Tick)
	defer wait.Stop()
	select {
	case <-ctx.Done():
	case <-wait.C:
	}
}

// follow moves the raft leadership to the primary site for a while after a
// promotion, nil when there is nothing to move.
func (c *Coordinator) follow(w *watch, s *agreed.State, in Input, now time.Duration) func(context.Context) {
	since := now - w.epochAt
	last := s.LastFailover
	if s.Primary.Site == c.o.Site || last == nil || last.Epoch != s.Primary.Epoch ||
		since > followFor || w.moves >= followTries || now < w.moveAt {
		return nil
	}
	if last.Kind != agreed.FailoverUnplanned && since < moveTimeout {
		return nil // who switched over moves it himself
	}
	to, ok := voterOf(in.Members, s.Primary.Site)
	if !ok {
		return nil
	}
	w.moves++
	w.moveAt = now + followBackoff<<w.moves
	try := w.moves
	return func(ctx context.Context) {
		if err := c.moveLeader(ctx, to); err != nil {
			c.log.Warn("raft leadership did not move to the primary site", "to", to, "try", try, "of", followTries, "err", err)
			return
		}
		c.log.Info("raft leadership moved to the primary site", "to", to, "site", s.Primary.Site)
	}
}

// goHome moves the raft leadership back to the primary's site in calm weather,
// nil when it stays.
func (c *Coordinator) goHome(w *watch, s *agreed.State, in Input, l cluster.Leadership, reason Reason) func(context.Context) {
	v := w.homing.view(s, in, l, reason == PrimaryHealthy, c.o.Now())
	to, why := GoHome(v)
	if w.homingSaid != why {
		w.homingSaid = why
		if why != HomingAtHome {
			c.log.Info("raft leadership away from the primary site", "leader_site", v.LeaderSite, "primary", v.Primary,
				"reason", why, "elections", v.Elected, "tried", v.Tried)
		}
	}
	if to == "" {
		return nil
	}
	w.homing.try(l.Term, in.Now)
	return func(ctx context.Context) {
		if err := c.moveLeader(ctx, to); err != nil {
			c.log.Warn("raft leadership did not return to the primary site", "to", to, "try", v.Tried+1, "err", err)
			return
		}
		c.log.Info("raft leadership returned to the primary site", "to", to, "site", s.Primary.Site)
	}
}

// moveTimeout bounds one move of the leadership with its canary.
const moveTimeout = 8 * time.Second

func (c *Coordinator) moveLeader(ctx context.Context, to string) error {
	ctx, cancel := context.WithTimeout(ctx, moveTimeout)
	defer cancel()
	err := c.o.Agreement.TransferLeadership(ctx, to)
	result := "moved"
	if err != nil {
		err = fmt.Errorf("move raft leadership to %s: %w", to, err)
		result = "failed"
	}
	c.metrics.moves.WithLabelValues(result).Inc()
	return err
}

// voterOf picks a ready voter of a site.
func voterOf(members []Member, site string) (string, bool) {
	for _, m := range members {
		if m.Site == site && m.Voter && m.Ready {
			return m.Name, true
		}
	}
	return "", false
}
