package drill

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/failover"
)

// switchover moves the primary to the site.
func (t *trial) switchover(ctx context.Context, out *Outcome) error {
	out.Moves = 1
	began := t.o.Boottime()
	res, err := t.move(ctx, t.q.Site)
	if err != nil {
		return err
	}
	idle := res.Idle.Seconds()
	t.set(func(r *Report) {
		r.IdleSeconds, r.RecordsAtRisk, r.RPO.Achieved = &idle, res.RecordsAtRisk, res.RPOSeconds
	})
	return t.answering(ctx, out, t.q.Site, began)
}

// move is one planned switchover. Its steps go into the timeline.
func (t *trial) move(ctx context.Context, to string) (failover.SwitchoverResult, error) {
	ctx, cancel := context.WithTimeout(ctx, switchTimeout)
	defer cancel()
	t.event("switchover", "to "+to)
	res, err := t.o.Switcher.Switchover(ctx, failover.SwitchoverRequest{
		To: to, By: "drill " + t.record.ID, Kind: agreed.FailoverDrill, Waive: t.q.Waive,
	})
	for _, step := range res.Steps {
		t.eventAt(step.At.Add(step.Took), "step "+step.Name, fmt.Sprintf("took %s%s", step.Took.Round(time.Millisecond), either(step.Err != "", ": "+step.Err, "")))
	}
	if err != nil {
		return res, fmt.Errorf("switchover to %s: %w", to, err)
	}
	t.event("primary moved", fmt.Sprintf("%s in epoch %d, idle for %s, raft leadership moved: %t", to, res.Epoch, res.Idle.Round(time.Millisecond), res.LeaderMoved))
	return res, nil
}

// answering waits until a node of the site answers that it acts as primary. That ends the
// RTO, which began at since.
func (t *trial) answering(ctx context.Context, out *Outcome, site string, since time.Duration) error {
	var at time.Duration
	err := t.within(ctx, answerTimeout, site+" to answer as the primary", func() (ok bool) {
		at, ok = t.probe.acting(site)
		return ok
	})
	if err != nil {
		return err
	}
	rto := max(0, at-since).Seconds()
	out.RTO = &rto
	t.set(func(r *Report) { r.RTO.Achieved = &rto })
	t.event("primary answers", fmt.Sprintf("%s, after %.2f s without one", site, rto))
	return nil
}

// isolation waits until the site is silent, until another site is primary if this one
// was, and until the site has recovered.
func (t *trial) isolation(ctx context.Context, out *Outcome) error {
	nodes := t.nodesOf(t.q.Site)
	t.processes = map[string]string{}
	for name, p := range t.o.Agreement.Peers() {
		t.processes[name] = p.Info.Instance
	}
	var lastHeard time.Duration
	err := t.within(ctx, silenceTimeout, t.q.Site+" to be cut off", func() bool {
		last, silent := t.lastHeard(nodes)
		lastHeard = last
		return silent
	})
	if err != nil {
		return err
	}
	t.event("cut off", fmt.Sprintf("no node of %s is heard any more", t.q.Site))
	if t.state.Primary.Site == t.q.Site {
		out.Moves = 1
		if err := t.takenOver(ctx, out, lastHeard); err != nil {
			return err
		}
	}
	return t.healed(ctx, out, nodes)
}

// takenOver waits for the new primary.
func (t *trial) takenOver(ctx context.Context, out *Outcome, lost time.Duration) error {
	var p agreed.Primary
	var f *agreed.FailoverRecord
	// After the cut has ended the site is not lost any more.
	limit := min(promoteTimeout, max(0, t.record.Deadline.Sub(t.o.Now()))+5*time.Second)
	err := t.within(ctx, limit, "another site to be promoted", func() bool {
		s := t.o.Agreement.State()
		p, f = s.Primary, s.LastFailover
		return p.Epoch != t.state.Primary.Epoch
	})
	if err != nil {
		return err
	}
	t.event("promoted", fmt.Sprintf("%s in epoch %d: %s", p.Site, p.Epoch, p.Reason))
	if f != nil && f.Epoch == p.Epoch {
		t.set(func(r *Report) { r.RecordsAtRisk, r.RPO.Achieved = f.RecordsAtRisk, f.RPOSeconds })
	}
	if err := t.answering(ctx, out, p.Site, lost); err != nil {
		return err
	}
	// The drill caused this failover, so no operator needs to acknowledge it.
	_, err = t.o.Agreement.Propose(ctx, agreed.CmdFailoverAck, agreed.FailoverAck{Epoch: p.Epoch, By: "drill " + t.record.ID})
	if err != nil {
		return fmt.Errorf("acknowledge the failover: %w", err)
	}
	t.event("acknowledged", "the drill caused this failover")
	return nil
}

// healed waits until the site's timers have ended the cut and the site is in its place:
// heard, with leases, caught up, not the primary, and the cluster healthy.
func (t *trial) healed(ctx context.Context, out *Outcome, nodes []string) error {
	rest := max(0, t.record.Deadline.Sub(t.o.Now())) + healTimeout
	early := ""
	err := t.within(ctx, rest, t.q.Site+" to be heard again", func() bool {
		early = t.heardEarly(nodes)
		return early != "" || t.allHeard(nodes)
	})
	if err != nil {
		return err
	}
	if early != "" {
		return t.endedEarly(ctx, early)
	}
	back := t.o.Boottime()
	t.event("heard again", "the cut has ended")
	for _, name := range t.restarted(nodes) {
		t.event("restarted", name+" was restarted during the cut, and stayed cut off")
	}
	caughtUp := t.o.Agreement.Raft().CommitIndex
	var since time.Duration // in its place without a gap
	place := false
	why := ""
	err = t.within(ctx, inPlaceTimeout, "", func() bool {
		now := t.o.Boottime()
		was := place
		if place, why = t.inPlace(nodes, caughtUp); !place {
			return false
		}
		if !was {
			since = now
		}
		return now-since >= settleTime
	})
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case err != nil:
		t.event("not in its place", why)
		return nil // out.InPlace is false
	}
	out.InPlace = true
	took := (since - back).Seconds()
	t.set(func(r *Report) { r.InPlaceSeconds = &took })
	t.event("in its place", fmt.Sprintf("%.2f s after it was heard again", took))
	return nil
}

// heardEarly names a node of the site that is heard although the cut has not ended; empty:
// none.
func (t *trial) heardEarly(nodes []string) string {
	if !t.o.Now().Before(t.record.Deadline.Add(-earlyBy)) {
		return ""
	}
	peers := t.o.Agreement.Peers()
	for _, name := range nodes {
		if peers[name].HeardWithin(t.o.Agreement.Timing().Lease) {
			return name
		}
	}
	return ""
}

// endedEarly handles a cut that ended before its time. Either a node of the site was told
// to abort the drill, which it writes into the record now that it can; then ctx ends. Or
// the cut failed.
func (t *trial) endedEarly(ctx context.Context, node string) error {
	early := t.record.Deadline.Sub(t.o.Now()).Round(100 * time.Millisecond)
	how := either(len(t.restarted([]string{node})) > 0, node+" was restarted", node+" is heard again")
	t.event("heard early", fmt.Sprintf("%s, %s before the end of the cut", how, early))
	err := t.within(ctx, abortedTimeout, "", func() bool { return false })
	if ctx.Err() != nil {
		return err
	}
	return fmt.Errorf("the cut ended %s early: %s", early, how)
}

// restarted lists the nodes whose processes are not those from before the drill.
func (t *trial) restarted(nodes []string) []string {
	peers := t.o.Agreement.Peers()
	return slices.DeleteFunc(slices.Clone(nodes), func(name string) bool {
		return peers[name].Info.Instance == t.processes[name]
	})
}

// goBack returns the primary to the site that had it before the drill.
func (t *trial) goBack(ctx context.Context, out *Outcome) error {
	home := t.state.Primary.Site
	returned := t.o.Agreement.State().Primary.Site == home
	out.Returned = &returned
	if returned {
		return nil
	}
	out.Moves++
	_, err := t.move(ctx, home)
	returned = err == nil
	return err
}

// nodesOf are the nodes of a site that are heard now.
func (t *trial) nodesOf(site string) []string {
	peers := t.o.Agreement.Peers()
	var names []string
	for name, n := range t.state.Nodes {
		if n.Site == site && peers[name].HeardWithin(t.o.Agreement.Timing().Patience) {
			names = append(names, name)
		}
	}
	return names
}

// lastHeard is when one of the nodes was last heard (Boottime), and whether all of them
// have been silent for a lease's length, which is longer than a ping or two.
func (t *trial) lastHeard(nodes []string) (last time.Duration, silent bool) {
	now, peers := t.o.Boottime(), t.o.Agreement.Peers()
	for _, name := range nodes {
		if p := peers[name]; p.Heard {
			last = max(last, now-p.Ago)
		}
	}
	return last, now-last >= t.o.Agreement.Timing().Lease
}

func (t *trial) allHeard(nodes []string) bool {
	peers := t.o.Agreement.Peers()
	silent := func(name string) bool { return !peers[name].HeardWithin(t.o.Agreement.Timing().Lease) }
	return !slices.ContainsFunc(nodes, silent)
}

func (t *trial) inPlace(nodes []string, index uint64) (ok bool, why string) {
	peers := t.o.Agreement.Peers()
	for _, name := range nodes {
		p := peers[name]
		switch {
		case !p.HeardWithin(t.o.Agreement.Timing().Patience):
			return false, name + " is not heard"
		case p.LeaseLeft+p.Ago <= 0:
			return false, name + " has no lease"
		case p.AppliedIndex < index:
			return false, fmt.Sprintf("%s has applied entry %d of %d", name, p.AppliedIndex, index)
		}
	}
	if t.state.Primary.Site == t.q.Site && t.o.Agreement.State().Primary.Site == t.q.Site {
		return false, t.q.Site + " is the primary again by itself"
	}
	if _, acts := t.probe.acting(t.q.Site); acts && t.o.Agreement.State().Primary.Site != t.q.Site {
		return false, t.q.Site + " still answers as the primary"
	}
	if unwell := t.o.Unhealthy(); len(unwell) > 0 && !t.wasUnhealthy {
		return false, unwell[0]
	}
	return true, ""
}
