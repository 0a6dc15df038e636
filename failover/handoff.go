package failover

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/clock"
)

// How a planned switchover fails. A drill fails with ErrPrecheck too.
var (
	// ErrPrecheck: a check does not hold, and nothing was begun.
	ErrPrecheck = errors.New("can't begin")
	// ErrRolledBack: it failed before the promotion and nothing has changed.
	ErrRolledBack = errors.New("the switchover failed and was rolled back, nothing has changed")
	// ErrOvertaken: the primary was lost and replaced in the meantime.
	ErrOvertaken = errors.New("the switchover was overtaken by another change of the primary")
	// ErrUnknownOutcome: neither the promotion nor the rollback was confirmed. The
	// agreed state will show which happened. An open switchover is cleared at its
	// deadline.
	ErrUnknownOutcome = errors.New("the outcome of the switchover is not known yet: see dsnode status")
	// ErrNotActing: the primary has moved, and its new site does not act.
	ErrNotActing = errors.New("the primary has moved, but no node of its new site acts as primary yet")
)

// maxCause bounds the reason of a rollback in bytes: the agreed state refuses a longer one,
// and a rollback must not be refused.
const maxCause = 1 << 10

// Each step of a switchover has a deadline. While the first two run, the old primary acts.
// The sum of those from the announcement to the promotion bounds how long no site acts as
// primary when the last step fails.
const (
	catchUpTimeout  = 5 * time.Second
	announceTimeout = 3 * time.Second
	releaseTimeout  = 5 * time.Second
	// copyTimeout bounds the wait for what was written until the old primary stopped. It is
	// short because catchUp has found that this takes less than copyQuickly.
	copyTimeout     = time.Second
	copyQuickly     = 500 * time.Millisecond
	copyLook        = 10 * time.Millisecond
	rollbackTimeout = 5 * time.Second
)

// Check is one named condition of a switchover or a drill.
type Check struct {
	Name   string `json:"name"`
	OK     bool   `json:"ok"`
	Detail string `json:"detail"`
	// Waivable: the caller may go on without it.
	Waivable bool `json:"waivable"`
}

// Passes reports whether the check holds, or is waived by its name.
func (c Check) Passes(waive []string) bool {
	return c.OK || c.Waivable && slices.Contains(waive, c.Name)
}

// SwitchoverRequest asks for another primary.
type SwitchoverRequest struct {
	To   string
	By   string              // the operator, or the drill
	Kind agreed.FailoverKind // planned, or drill
	// AcceptLoss goes on although records may be lost, and waits for none. The result tells
	// how many.
	AcceptLoss bool
	// Waive names checks that need not hold.
	Waive []string
}

// Step is one executed step of a switchover.
type Step struct {
	Name string        `json:"name"`
	At   time.Time     `json:"at"`
	Took time.Duration `json:"took"`
	Err  string        `json:"error,omitempty"`
}

// SwitchoverResult tells what happened, also when the switchover failed.
type SwitchoverResult struct {
	ID, From, To string
	Epoch        uint64 // of the new primary, 0 when nothing was promoted
	Checks       []Check
	Steps        []Step
	// Idle is the time in which no site acted as primary: at most from the announcement,
	// until a node of the new primary's site has said that it acts. It is zero when nothing
	// was promoted.
	Idle time.Duration
	// RecordsAtRisk and RPOSeconds are what may have been lost: zero, unless a loss was
	// accepted. They are nil when that is unknown, or when there are no records.
	RecordsAtRisk *int64
	RPOSeconds    *float64
	// LeaderMoved: the raft leader is in the new primary site. If it is not, the
	// coordinator keeps trying.
	LeaderMoved bool
}

// Precheck gives the conditions of a switchover and whether they hold. It changes
// nothing.
func (c *Coordinator) Precheck(r SwitchoverRequest) []Check {
	s := c.o.Agreement.State()
	if s.ClusterID == "" || s.Parsed == nil {
		return []Check{{Name: "member", Detail: "this node belongs to no cluster yet"}}
	}
	in := c.input(s, c.o.Boottime())
	_, sites := Observe(Memory{}, in)
	var checks []Check
	add := func(name string, ok bool, waivable bool, format string, args ...any) {
		checks = append(checks, Check{Name: name, OK: ok, Waivable: waivable, Detail: fmt.Sprintf(format, args...)})
	}
	left, _ := c.o.Agreement.Lease()
	add("quorum", left > 0, false, "this node's lease is good for %s", max(0, left).Round(time.Millisecond))
	add("not_quarantined", !c.o.Quarantined(), false, "quarantined: %v", c.o.Quarantined())
	i := slices.IndexFunc(sites, func(v SiteView) bool { return v.Name == r.To })
	add("target_known", i >= 0, false, "site %q", r.To)
	if i < 0 {
		return checks
	}
	target := sites[i]
	add("target_not_primary", s.Primary.Site != r.To, false, "the primary is %s in epoch %d", s.Primary.Site, s.Primary.Epoch)
	add("target_ready", target.Ready > 0, false, "%d nodes of %s are heard, hold a lease and are in service", target.Ready, r.To)
	add("target_disks", target.SlowFor == 0, true, "the disks of all nodes of %s that answer have been slow for %s", r.To, target.SlowFor.Round(time.Second))
	able := slices.ContainsFunc(in.Members, func(m Member) bool { return m.Site == r.To && m.Ready && m.Follows })
	behind := notFollowing(in.Members, ofSite(r.To))
	add("target_follows", len(behind) == 0, able, "nodes of %s that don't follow the agreed state, most likely because their disk hangs: %v", r.To, behind)
	add("target_upstreams", target.UpstreamsHealthy > 0, true, "%d healthy upstreams in %s", target.UpstreamsHealthy, r.To)
	open := s.Switchover != nil && c.o.Now().Before(s.Switchover.Deadline)
	add("no_switchover", !open, false, "a switchover is in progress: %v", open)
	drill := r.Kind != agreed.FailoverDrill && slices.ContainsFunc(s.Drills, func(d agreed.DrillRecord) bool {
		return d.Running(c.o.Now())
	})
	add("no_drill", !drill, false, "a drill is running: %v", drill)
	silentVoters := c.silent(in, func(m Member) bool { return m.Voter })
	add("voters_reachable", len(silentVoters) == 0, true, "voters that don't answer: %v", silentVoters)
	behindVoters := notFollowing(in.Members, func(m Member) bool { return m.Voter && m.Site != r.To })
	add("voters_follow", len(behindVoters) == 0, true, "voters elsewhere that don't follow the agreed state: %v", behindVoters)
	silent := c.silent(in, ofSite(s.Primary.Site))
	add("primary_heard", len(silent) == 0, true, "nodes of %s that don't answer: %v", s.Primary.Site, silent)
	lacking := c.lackJobs()
	add("jobs_complete", len(lacking) == 0, true, "nodes that lack jobs, which other nodes must not leave before they have them: %v", lacking)
	if c.o.Copies != nil {
		ok, detail := lossless(s.Primary.Site, r.To, c.o.Copies.AtRisk(s.Primary.Site, r.To))
		if !ok && r.AcceptLoss {
			detail = "the loss is accepted: " + detail
		}
		add("lossless", ok || r.AcceptLoss, false, "%s", detail)
	}
	return checks
}

// notFollowing names the members of a kind that answer and do not apply entries, with how
// long that has been so.
func notFollowing(members []Member, kind func(Member) bool) []string {
	var names []string
	for _, m := range members {
		if kind(m) && !m.Follows && m.Stuck > 0 {
			names = append(names, fmt.Sprintf("%s for %s", m.Name, seconds(m.Stuck)))
		}
	}
	return names
}

// silent names the members of a kind that this node has not heard within the patience.
func (c *Coordinator) silent(in Input, kind func(Member) bool) []string {
	var silent []string
	for _, m := range in.Members {
		seen, ever := in.Leader.Seen[m.Name]
		answers := m.Name == c.o.Name || ever && seen.Ago < c.timing.Patience
		if kind(m) && !answers {
			silent = append(silent, m.Name)
		}
	}
	return silent
}

// lackJobs names the living nodes that say that they may lack jobs of others.
func (c *Coordinator) lackJobs() []string {
	var lacking []string
	if c.o.Health().JobsMissing != "" {
		lacking = append(lacking, c.o.Name)
	}
	for name, p := range c.o.Agreement.Peers() {
		if p.JobsMissing != "" && p.HeardWithin(c.timing.Patience) {
			lacking = append(lacking, name)
		}
	}
	slices.Sort(lacking)
	return lacking
}

func ofSite(site string) func(Member) bool {
	return func(m Member) bool { return m.Site == site }
}

// Switchover moves the primary to another site without loss, or changes nothing. It
// may be called on any node.
//
// The steps: follow (every node that takes part applies an entry, so its disk works),
// catch_up (the new site's copy of the job journals keeps up), announce (an agreed entry;
// the old primary starts nothing from then on), release (its nodes confirm that nothing
// runs any more), copy (the new site has what they had then), promote (one agreed entry),
// act (a node of the new site acts), leadership (moved to the new site and proved by a
// canary entry). If one of the first two fails, nothing was begun. A failure before the
// promotion is proposed closes the announcement. After the promotion only another
// switchover leads back.
func (c *Coordinator) Switchover(ctx context.Context, r SwitchoverRequest) (SwitchoverResult, error) {
	s := c.o.Agreement.State()
	res := SwitchoverResult{ID: "sw-" + strings.ToLower(rand.Text()[:12]), From: s.Primary.Site, To: r.To}
	res.Checks = c.Precheck(r)
	for _, check := range res.Checks {
		if !check.Passes(r.Waive) {
			return res, fmt.Errorf("the switchover %w: %s: %s", ErrPrecheck, check.Name, check.Detail)
		}
	}
	h := &handoff{c: c, r: r, res: &res, state: s}
	err := h.run(ctx)
	log := c.log.With("id", res.ID, "from", res.From, "to", res.To, "kind", r.Kind, "by", r.By)
	if err != nil {
		log.Warn("switchover failed", "err", err)
		return res, err
	}
	c.metrics.duration.WithLabelValues(string(r.Kind)).Observe(res.Idle.Seconds())
	log.Info("switchover done", "epoch", res.Epoch, "idle", res.Idle, "leader_moved", res.LeaderMoved)
	return res, nil
}

// handoff is one switchover under way.
type handoff struct {
	c     *Coordinator
	r     SwitchoverRequest
	res   *SwitchoverResult
	state *agreed.State // when the switchover was asked for
	began time.Duration // Boottime of the announcement
	// index is that of the newest entry that this switchover has proposed.
	index uint64
	// announced: the announcement is agreed, and this node has seen it.
	announced bool
}

func (h *handoff) run(ctx context.Context) error {
	err := h.step(ctx, "follow", h.c.timing.Patience, h.follow)
	if err == nil && h.c.o.Copies != nil && !h.r.AcceptLoss {
		err = h.step(ctx, "catch_up", catchUpTimeout, h.catchUp)
	}
	if err != nil {
		return fmt.Errorf("the switchover %w: %w", ErrPrecheck, err)
	}
	h.began = h.c.o.Boottime()
	err = h.step(ctx, "announce", announceTimeout, h.announce)
	if err == nil {
		h.announced = true
		err = h.step(ctx, "release", releaseTimeout, func(ctx context.Context) error {
			g, ctx := errgroup.WithContext(ctx)
			g.Go(func() error { return h.targetSees(ctx) })
			g.Go(func() error {
				_, err := h.release(ctx)
				return err
			})
			return g.Wait()
		})
	}
	if err == nil && h.c.o.Copies != nil {
		err = h.step(ctx, "copy", copyTimeout, h.copy)
	}
	if err == nil {
		err = h.step(ctx, "promote", h.c.timing.Lease, h.promote)
	}
	if err != nil {
		// The failed step may have been committed all the same.
		if err = h.rollback(ctx, err); err != nil {
			return err
		}
	}
	h.res.Epoch = h.state.Primary.Epoch + 1
	err = h.step(ctx, "act", actTimeout(h.c.timing), func(ctx context.Context) error {
		return h.c.awaitActing(ctx, h.res.To, h.res.Epoch, h.index)
	})
	h.res.Idle = h.c.o.Boottime() - h.began
	if err != nil {
		return fmt.Errorf("%w: %s in epoch %d (%w)", ErrNotActing, h.res.To, h.res.Epoch, err)
	}
	h.lead(ctx)
	h.c.record(ctx, h.res.Epoch, h.res.Idle)
	return nil
}

// follow proves that the disks of the nodes that take part work, while the old primary
// still acts: they apply an entry that is proposed now, this node first.
func (h *handoff) follow(ctx context.Context) error {
	index, err := h.c.o.Agreement.Propose(ctx, agreed.CmdTick, nil)
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	for _, node := range append(h.c.answering(h.res.From, false), h.c.answering(h.res.To, true)...) {
		g.Go(func() error { return h.c.o.Agreement.AwaitApplied(ctx, node, index) })
	}
	return g.Wait()
}

// targetSees proves that the new primary's nodes still follow: they see the announcement,
// so they will see the promotion. The time is short, because no site acts as primary
// meanwhile.
func (h *handoff) targetSees(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, h.c.timing.Lease/2)
	defer cancel()
	return h.c.one(h.res.To, func(node string) error { return h.c.o.Agreement.AwaitApplied(ctx, node, h.index) })
}

// catchUp waits, while the old primary still acts, until the new site's copy of the old
// one's job journals keeps up: it has everything within copyQuickly.
func (h *handoff) catchUp(ctx context.Context) error {
	for {
		began := h.c.o.Boottime()
		if err := h.copied(ctx); err != nil {
			return err
		}
		took := h.c.o.Boottime() - began
		if took < copyQuickly {
			return nil
		}
		if ctx.Err() != nil {
			return fmt.Errorf("lossless: new records take %s to reach %s: %w", seconds(took), h.res.To, ctx.Err())
		}
	}
}

// copy waits until the new site has everything that the old one's nodes have on their disks
// now, after they have stopped starting jobs. If a loss is accepted it does not wait, and
// notes what is lacking.
func (h *handoff) copy(ctx context.Context) error {
	if !h.r.AcceptLoss {
		h.res.RecordsAtRisk, h.res.RPOSeconds = new(int64(0)), new(0.0)
		return h.copied(ctx)
	}
	risk := h.c.o.Copies.AtRisk(h.res.From, h.res.To)
	h.res.RecordsAtRisk, h.res.RPOSeconds = lossOf(risk, 0, h.c.timing.Tick)
	lacking, err := h.lacking(ctx)
	if err != nil || !risk.Known {
		return nil //nolint:nilerr // the figures are those that were last heard
	}
	now := AtRisk{Known: true, Records: lacking}.Total()
	if len(h.silent()) == 0 {
		h.res.RecordsAtRisk = now
		if *now == 0 {
			h.res.RPOSeconds = new(0.0)
		}
	} else {
		*h.res.RecordsAtRisk = max(*h.res.RecordsAtRisk, *now)
	}
	return nil
}

// silent are the nodes of the old primary's site that don't answer.
func (h *handoff) silent() []string {
	return h.c.silent(h.c.input(h.c.o.Agreement.State(), h.c.o.Boottime()), ofSite(h.res.From))
}

// lacking asks now what the new site lacks of the old one's journals.
func (h *handoff) lacking(ctx context.Context) (map[string]int64, error) {
	ends, err := h.c.o.Copies.Ends(ctx, h.res.From, h.c.answering(h.res.From, false))
	if err != nil {
		return nil, err
	}
	return h.c.o.Copies.Lacking(ctx, h.res.To, ends)
}

// copied waits until the new site has everything that the old one has now.
func (h *handoff) copied(ctx context.Context) error {
	began := h.c.o.Boottime()
	if silent := h.silent(); len(silent) > 0 {
		return fmt.Errorf("lossless: it is not known what %v have written: they don't answer", silent)
	}
	ends, err := h.c.o.Copies.Ends(ctx, h.res.From, h.c.answering(h.res.From, false))
	if err != nil {
		return fmt.Errorf("lossless: it is not known what %s has of its jobs: %w", h.res.From, err)
	}
	var lacking map[string]int64
	for {
		got, err := h.c.o.Copies.Lacking(ctx, h.res.To, ends)
		if err == nil {
			if lacking = got; len(lacking) == 0 {
				return nil
			}
		}
		if clock.Sleep(ctx, copyLook) == nil {
			continue
		}
		waited := seconds(h.c.o.Boottime() - began)
		if lacking == nil {
			return fmt.Errorf("lossless: it is not known what %s has of the jobs of %s (asked for %s): %w", h.res.To, h.res.From, waited, err)
		}
		return fmt.Errorf("lossless: %s still lacks %s, which %s had on its disk %s ago: %w", h.res.To, recordsOf(lacking), h.res.From, waited, ctx.Err())
	}
}

func (h *handoff) step(ctx context.Context, name string, limit time.Duration, do func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	step := Step{Name: name, At: h.c.o.Now()}
	began := h.c.o.Boottime()
	err := do(ctx)
	step.Took = h.c.o.Boottime() - began
	if err != nil {
		err = fmt.Errorf("%s: %w", name, err)
		step.Err = err.Error()
	}
	h.res.Steps = append(h.res.Steps, step)
	return err
}

func (h *handoff) announce(ctx context.Context) error {
	now := h.c.o.Now()
	index, err := h.c.o.Agreement.Propose(ctx, agreed.CmdSwitchover, agreed.SwitchoverSet{
		Next: &agreed.Switchover{
			ID: h.res.ID, From: h.res.From, To: h.res.To, Kind: h.r.Kind, By: h.r.By, At: now,
			Deadline: now.Add(announceTimeout + releaseTimeout + copyTimeout + h.c.timing.Lease),
		},
	})
	h.index = index
	return err
}

// release asks the nodes of the old primary's site to stop acting as primary, except
// those that don't answer: the prechecks have allowed for them. all reports whether
// there were none of these.
func (h *handoff) release(ctx context.Context) (all bool, err error) {
	s := h.c.o.Agreement.State()
	silent := h.c.silent(h.c.input(s, h.c.o.Boottime()), ofSite(h.res.From))
	g, ctx := errgroup.WithContext(ctx)
	for _, n := range s.Nodes {
		if n.Site != h.res.From || slices.Contains(silent, n.Name) {
			continue
		}
		g.Go(func() error {
			if err := h.c.o.Releaser.Release(ctx, n.Name, h.res.ID); err != nil {
				return fmt.Errorf("%s: %w", n.Name, err)
			}
			return nil
		})
	}
	return len(silent) == 0, g.Wait()
}

// promote asks for the release once more, which is quick now, and then changes the
// primary, all within a lease's length. A node that restarted after its first answer
// has forgotten it, and may not act for longer than that (see Fence.notePrimary).
func (h *handoff) promote(ctx context.Context) error {
	all, err := h.release(ctx)
	if err != nil {
		return err
	}
	idle := (h.c.o.Boottime() - h.began).Seconds()
	p := agreed.Promote{
		Site: h.res.To, ExpectEpoch: h.state.Primary.Epoch, Generation: h.state.Generation.Number,
		Reason: "switchover by " + h.r.By, Kind: h.r.Kind, SwitchoverID: h.res.ID, RTOSeconds: &idle,
		// If one of them could not be asked, the new primary waits until all leases from
		// before have ended.
		Released: all,
	}
	if h.state.FeatureLevel >= agreed.LossLevel {
		p.RecordsAtRisk, p.RPOSeconds = h.res.RecordsAtRisk, h.res.RPOSeconds
	}
	index, err := h.c.o.Agreement.Propose(ctx, agreed.CmdPromote, p)
	if err == nil {
		h.index = index
	}
	return err
}

// rollback closes the announcement, so that the old primary goes on. It gives nil when
// it finds that the promotion was made: the rollback's entry is ordered after the
// promotion's, so its result tells which of the two happened.
func (h *handoff) rollback(ctx context.Context, cause error) error {
	made := false
	err := h.step(context.WithoutCancel(ctx), "rollback", rollbackTimeout, func(ctx context.Context) error {
		_, err := h.c.o.Agreement.Propose(ctx, agreed.CmdSwitchover, agreed.SwitchoverSet{
			Expect: h.res.ID, Reason: strings.ToValidUTF8(cause.Error()[:min(len(cause.Error()), maxCause)], ""),
		})
		if !errors.Is(err, agreed.ErrNoSwitchover) {
			return err
		}
		if !h.announced {
			return nil // there was no announcement, and so no promotion
		}
		made, err = h.closedByPromotion(ctx)
		return err
	})
	switch {
	case errors.Is(err, ErrOvertaken):
		return fmt.Errorf("%w (%w)", err, cause)
	case err != nil:
		return fmt.Errorf("%w: %w (and %w)", ErrUnknownOutcome, cause, err)
	case made:
		return nil
	}
	return fmt.Errorf("%w: %w", ErrRolledBack, cause)
}

// closedByPromotion waits until this node's state shows what closed the switchover that
// it has seen open: this promotion, or another change.
func (h *handoff) closedByPromotion(ctx context.Context) (bool, error) {
	for {
		changed := h.c.o.Agreement.Changed()
		s := h.c.o.Agreement.State()
		if s.Switchover == nil || s.Switchover.ID != h.res.ID {
			if s.Primary.Epoch == h.state.Primary.Epoch {
				return false, nil
			}
			// A planned promotion from this epoch needs this switchover's id.
			f := s.LastFailover
			if f != nil && f.Epoch == h.state.Primary.Epoch+1 && f.Kind == h.r.Kind {
				h.index = h.c.o.Agreement.Raft().CommitIndex // the promotion's or a later one
				return true, nil
			}
			return false, fmt.Errorf("%w: the primary is %s in epoch %d", ErrOvertaken, s.Primary.Site, s.Primary.Epoch)
		}
		select {
		case <-ctx.Done():
			return false, fmt.Errorf("wait for the outcome: %w", ctx.Err())
		case <-changed:
		}
	}
}

// lead moves the raft leadership to the new primary's site. The switchover has
// succeeded even if that fails: the coordinator keeps trying.
func (h *handoff) lead(ctx context.Context) {
	_ = h.step(ctx, "leadership", moveTimeout, func(ctx context.Context) error { // the error is in Steps
		in := h.c.input(h.c.o.Agreement.State(), h.c.o.Boottime())
		leader := h.c.o.Agreement.Raft().Leader
		at := slices.IndexFunc(in.Members, func(m Member) bool { return m.Name == leader })
		if at >= 0 && in.Members[at].Site == h.res.To {
			h.res.LeaderMoved = true
			return nil
		}
		to, ok := voterOf(in.Members, h.res.To)
		if !ok {
			return fmt.Errorf("no node of %s can lead", h.res.To)
		}
		err := h.c.moveLeader(ctx, to)
		h.res.LeaderMoved = err == nil
		return err
	})
}
