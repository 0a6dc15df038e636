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
	// State is the agreed state, immutable. Changed closes at its next change.
	State() *agreed.State
	Changed() <-chan struct{}
	// Lease tells how long this node's lease is good, and the highest epoch heard.
	Lease() (left time.Duration, epoch uint64)
	// Paused is the longest recent time in which this process did not run.
	Paused() time.Duration
	Peers() map[string]cluster.PeerView
	// DiskSpeed is that of this node's own disk; Peers have that of the others.
	DiskSpeed() cluster.DiskSpeed
	Raft() cluster.RaftView
	Leading() (cluster.Leadership, bool)
	Timing() config.Timing
	Propose(ctx context.Context, t agreed.CommandType, data any) (index uint64, err error)
	// TransferLeadership moves raft's leadership. It returns nil when a canary entry
	// was committed by the new leader.
	TransferLeadership(ctx context.Context, to string) error
	// AwaitApplied blocks until a node says that it has applied an entry, which proves
	// that its disk worked after the entry was proposed.
	AwaitApplied(ctx context.Context, node string, index uint64) error
	// AwaitActing blocks until a node says that it acts as primary in an epoch, whose
	// promotion has this index.
	AwaitActing(ctx context.Context, node string, epoch, index uint64) error
}

var _ Agreement = (*cluster.Cluster)(nil)

// Releaser asks a node of the primary site to stop acting as primary.
type Releaser interface {
	// Release returns nil once the node has seen this switchover and has ended all
	// that it ran as primary. The node then starts nothing as primary before the
	// switchover is off the agreed state; see Fence.Release.
	Release(ctx context.Context, node, switchoverID string) error
}

// Options are a Coordinator's. All fields are needed unless they say otherwise.
type Options struct {
	Name, Site string
	Agreement  Agreement
	Releaser   Releaser
	// Health is this node's own health. It must not block.
	Health func() cluster.Health
	// Boottime is the clock that leases are counted on, Now the wall clock.
	Boottime func() time.Duration
	Now      func() time.Time
	// Quarantined tells that this cluster restarted cold; see Quarantine.
	Quarantined func() bool
	// Copies is nil without replication: then nothing is at risk, and no figure is given.
	Copies Copies

	Logger     *slog.Logger
	Registerer prometheus.Registerer
}

const (
	// lookEvery is the interval of the coordinator's looks: half that of pings.
	lookEvery = 125 * time.Millisecond
	// penaltyTime is how long a site that was replaced is the last choice.
	penaltyTime = 60 * time.Second
	// followFor is for how long after a promotion the raft leader is moved to the
	// primary site at once. After a later election elsewhere PlaceLeader decides.
	followFor = 2 * time.Minute
	// followTries bounds the attempts of one leadership to move after a promotion.
	followTries   = 6
	followBackoff = time.Second
)

// dwell is the least time between two automatic promotions: four times the patience
// (10 s). A second loss right after the first leaves the cluster without a primary for
// little longer than the first did, and the primary can't change more than six times a
// minute.
func dwell(t config.Timing) time.Duration { return 4 * t.Patience }

// Coordinator replaces a lost primary and carries out planned switchovers. Every node
// runs one: it observes all the time, and acts while its node leads Raft.
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
	judged Judgement

	// measuring are the goroutines that measure promotions.
	measuring sync.WaitGroup
}

// Judgement says which nodes were gone at a look of the coordinator.
type Judgement struct {
	State *agreed.State   // at that look
	At    time.Duration   // of it, on Options.Boottime
	Gone  map[string]bool // by node
}

// NewCoordinator makes a Coordinator; Run starts it.
func NewCoordinator(o Options) *Coordinator {
	return &Coordinator{o: o, log: o.Logger, timing: o.Agreement.Timing(), metrics: newMetrics(o.Registerer)}
}

// Look gives the newest view of this node, what it would do as the leader, and why.
// It gives false before the first look.
func (c *Coordinator) Look() (View, Action, Reason, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.view, c.action, c.reason, c.looked
}

// Judgement gives the newest one; it is false before the first look.
func (c *Coordinator) Judgement() (Judgement, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.judged, c.looked
}

// watch is the state of Run's loop.
type watch struct {
	memory Memory
	// epochAt is when this process first saw the current epoch.
	epoch   uint64
	epochAt time.Duration
	// logged is the decision that was last logged as leader.
	logged Reason
	// moves counts the attempts to move the leadership since the epoch or the term
	// changed. The next attempt is not before moveAt.
	term    uint64
	moves   int
	moveAt  time.Duration
	leaders leaderHistory
	// leaderReason is the newest of PlaceLeader that was logged.
	leaderReason LeaderReason
}

// Run looks and acts until ctx ends.
func (c *Coordinator) Run(ctx context.Context) error {
	tick := time.NewTimer(0)
	defer tick.Stop()
	var w watch
	// One action at a time, in a goroutine of its own: a proposal that hangs must not
	// count as a pause of this node.
	var acting sync.WaitGroup
	defer c.measuring.Wait() // after the last action, which may begin one
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
		default: // the action before is still under way
		}
	}
}

// look observes, decides, and returns what is to be done, nil for nothing.
func (c *Coordinator) look(w *watch) func(context.Context) {
	s := c.o.Agreement.State()
	if s.ClusterID == "" || s.Parsed == nil {
		return nil
	}
	now := c.o.Boottime()
	if w.epoch != s.Primary.Epoch {
		at := now
		if w.epoch == 0 {
			// This process has just started: only the wall clock of the proposer tells how
			// long ago the epoch began.
			at = now - max(0, c.o.Now().Sub(s.Primary.Since))
		}
		w.epoch, w.epochAt, w.moves, w.moveAt = s.Primary.Epoch, at, 0, now
	}
	in := c.input(s, now)
	w.leaders.observe(s, in, in.RaftLeader)
	var sites []SiteView
	w.memory, sites = Observe(w.memory, in)
	v := c.newView(s, sites, now, w)
	if _, lost := v.primaryLost(); lost && c.o.Copies != nil {
		for i, site := range v.Sites {
			v.Sites[i].Behind = c.o.Copies.AtRisk(v.Primary, site.Name).Total()
		}
	}
	action, reason := Decide(v)
	judged := Judgement{State: s, At: now, Gone: Gone(w.memory, in)}
	c.mu.Lock()
	c.view, c.action, c.reason, c.looked, c.judged = v, action, reason, true, judged
	c.mu.Unlock()

	l, leads := c.o.Agreement.Leading()
	if !leads {
		w.logged = ""
		return nil
	}
	if w.term != l.Term {
		w.term, w.moves, w.moveAt = l.Term, 0, now
	}
	if w.logged != reason {
		w.logged = reason
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
		w.leaders.try(l.Term, now)
		return act
	}
	return c.returnLeader(w, s, in, l, reason)
}

// promote proposes the entry that changes the primary. The entry has no effect when
// the epoch is no longer the one that was decided on.
func (c *Coordinator) promote(ctx context.Context, s *agreed.State, site string, reason Reason, v View, term uint64) {
	if l, leads := c.o.Agreement.Leading(); !leads || l.Term != term {
		return // the decision is of an earlier leadership, and each new leader has its own wait
	}
	running := ctx
	ctx, cancel := context.WithTimeout(ctx, c.timing.Transport)
	defer cancel()
	down, known := outage(v, reason)
	p := agreed.Promote{
		Site: site, ExpectEpoch: s.Primary.Epoch, Generation: s.Generation.Number,
		Reason: string(reason), Kind: agreed.FailoverUnplanned,
		// If another leader is elected now, the proposal is forwarded to it. It has its
		// own wait, so the entry has no effect in its term.
		Term: term,
	}
	if known {
		seconds := down.Seconds()
		p.RTOSeconds = &seconds
	}
	if c.o.Copies != nil && s.FeatureLevel >= agreed.LossLevel {
		p.RecordsAtRisk, p.RPOSeconds = lossOf(c.o.Copies.AtRisk(s.Primary.Site, site), silenceOf(v, reason), c.timing.Tick)
	}
	since := c.o.Boottime() - down
	index, err := c.o.Agreement.Propose(ctx, agreed.CmdPromote, p)
	switch {
	case err == nil:
		c.log.Warn("primary replaced", "from", s.Primary.Site, "to", site, "epoch", s.Primary.Epoch+1,
			"reason", reason, "lost_for", c.o.Boottime()-since)
		c.measuring.Go(func() { c.measure(running, site, s.Primary.Epoch+1, index, since, known) })
	case errors.Is(err, agreed.ErrStaleEpoch), errors.Is(err, agreed.ErrStaleTerm):
		c.log.Info("promotion overtaken by another change", "to", site, "expected_epoch", s.Primary.Epoch, "err", err)
	default:
		c.log.Warn("promotion failed; the next look decides again", "to", site, "err", err)
		c.pause(ctx)
	}
}

// measure waits until a node of the new primary acts, and records how long no site did since
// a time, if that is known.
func (c *Coordinator) measure(ctx context.Context, site string, epoch, index uint64, since time.Duration, known bool) {
	waiting, cancel := context.WithTimeout(ctx, actTimeout(c.timing))
	defer cancel()
	err := c.awaitActing(waiting, site, epoch, index)
	idle := c.o.Boottime() - since
	if err != nil {
		c.log.Warn("the new primary does not act yet", "site", site, "epoch", epoch, "err", err)
		return
	}
	c.metrics.duration.WithLabelValues(string(agreed.FailoverUnplanned)).Observe(idle.Seconds())
	c.log.Info("the new primary acts", "site", site, "epoch", epoch, "idle", idle)
	if known {
		c.record(ctx, epoch, idle)
	}
}

// record has the measured time agreed on. Without it the record of the failover has the time
// until the promotion.
func (c *Coordinator) record(ctx context.Context, epoch uint64, idle time.Duration) {
	if c.o.Agreement.State().FeatureLevel < agreed.LossLevel {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, recordTimeout)
	defer cancel()
	var err error
	for { // the leadership moves at the same time, and meanwhile proposals fail
		_, err = c.o.Agreement.Propose(ctx, agreed.CmdFailoverMeasured, agreed.FailoverMeasured{Epoch: epoch, RTOSeconds: idle.Seconds()})
		if err == nil || errors.Is(err, agreed.ErrStaleEpoch) || clock.Sleep(ctx, c.timing.Tick) != nil {
			break
		}
	}
	if err != nil {
		c.log.Warn("the record of the failover lacks the time until the new primary acted", "epoch", epoch, "idle", idle, "err", err)
	}
}

// recordTimeout is longer than a move of the leadership.
const recordTimeout = 10 * time.Second

// actTimeout bounds the wait for a new primary to act. Without a confirmed release it waits
// until older leases have ended, twice as long if it has just started.
func actTimeout(t config.Timing) time.Duration { return 2*t.NewLeaderWait + t.Lease }

// awaitActing waits until a node of a site acts as primary.
func (c *Coordinator) awaitActing(ctx context.Context, site string, epoch, index uint64) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // the questions to other nodes end with the first success
	return c.one(site, func(node string) error { return c.o.Agreement.AwaitActing(ctx, node, epoch, index) })
}

// one asks the nodes of a site that answer and follow, and returns nil when one of them
// succeeds.
func (c *Coordinator) one(site string, ask func(node string) error) error {
	nodes := c.answering(site, true)
	results := make(chan error, len(nodes))
	for _, node := range nodes {
		go func() { results <- ask(node) }()
	}
	err := fmt.Errorf("no node of %s answers", site)
	for range nodes {
		if err = <-results; err == nil {
			return nil
		}
	}
	return err
}

// answering are the nodes of a site that answer, and, if follows is set, apply entries.
func (c *Coordinator) answering(site string, follows bool) []string {
	in := c.input(c.o.Agreement.State(), c.o.Boottime())
	silent := c.silent(in, ofSite(site))
	var names []string
	for _, m := range in.Members {
		if m.Site == site && !slices.Contains(silent, m.Name) && (m.Follows || !follows) {
			names = append(names, m.Name)
		}
	}
	return names
}

// outage is how long the primary has been lost when it is replaced.
func outage(v View, why Reason) (down time.Duration, known bool) {
	i := slices.IndexFunc(v.Sites, func(s SiteView) bool { return s.Name == v.Primary })
	if i < 0 {
		return 0, false
	}
	if why == PrimarySlow {
		return 0, false // it acts until the promotion
	}
	if why == PrimaryIdle {
		return v.Sites[i].IdleFor, true
	}
	if why == PrimaryNoLease {
		return max(v.Sites[i].NoLeaseFor, v.Sites[i].LeaderSilence), true
	}
	return v.Sites[i].LeaderSilence, true
}

// silenceOf is how long the primary that is replaced has been silent: zero when it is
// replaced although it is heard.
func silenceOf(v View, why Reason) time.Duration {
	i := slices.IndexFunc(v.Sites, func(s SiteView) bool { return s.Name == v.Primary })
	if why != PrimaryLost || i < 0 {
		return 0
	}
	return v.Sites[i].LeaderSilence
}

// expire clears a switchover that is past its deadline: its coordinator died or was
// cut off. Until then the old primary may not act.
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

// pause keeps a failing action from being retried at every look.
func (c *Coordinator) pause(ctx context.Context) {
	_ = clock.Sleep(ctx, 2*c.timing.Tick) // the caller ends anyway
}

// follow moves the raft leadership to the primary site during followFor after a
// promotion. It gives nil when there is nothing to move.
func (c *Coordinator) follow(w *watch, s *agreed.State, in Input, now time.Duration) func(context.Context) {
	since := now - w.epochAt
	last := s.LastFailover
	if s.Primary.Site == c.o.Site || last == nil || last.Epoch != s.Primary.Epoch ||
		since > followFor || w.moves >= followTries || now < w.moveAt {
		return nil
	}
	if last.Kind != agreed.FailoverUnplanned && since < moveTimeout {
		return nil // the node that carried the switchover out moves it
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

// returnLeader moves the raft leadership back to the primary's site as PlaceLeader
// says. It gives nil when the leadership stays.
func (c *Coordinator) returnLeader(w *watch, s *agreed.State, in Input, l cluster.Leadership, reason Reason) func(context.Context) {
	v := w.leaders.view(s, in, l, reason == PrimaryHealthy, c.o.Now())
	to, why := PlaceLeader(v)
	if w.leaderReason != why {
		w.leaderReason = why
		if why != LeaderInPlace {
			c.log.Info("raft leader is outside the primary site", "leader_site", v.LeaderSite, "primary", v.Primary,
				"reason", why, "elections", v.Elected, "tried", v.Tried)
		}
	}
	if to == "" {
		return nil
	}
	w.leaders.try(l.Term, in.Now)
	return func(ctx context.Context) {
		if err := c.moveLeader(ctx, to); err != nil {
			c.log.Warn("raft leadership did not return to the primary site", "to", to, "try", v.Tried+1, "err", err)
			return
		}
		c.log.Info("raft leadership returned to the primary site", "to", to, "site", s.Primary.Site)
	}
}

// moveTimeout bounds one move of the leadership, the canary entry included.
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

// voterOf picks a voter of a site that can lead raft now. One with a slow disk would hand
// the leadership over at once.
func voterOf(members []Member, site string) (string, bool) {
	for _, m := range members {
		if m.Site == site && m.Voter && m.Ready && m.Follows && m.SlowFor == 0 {
			return m.Name, true
		}
	}
	return "", false
}
