package drill

import (
	"context"
	"fmt"
	"time"

	"github.com/dsnode/dsnode/cluster/agreed"
)

// A drill is ended by its runner, with a report. Three ends happen elsewhere, and are
// written into the record by the loop in this file: an operator aborts the drill at a
// node that is cut off, the runner restarts, or the runner is gone.

const (
	// goneAfter is how long the Raft leader must not have heard a drill's runner. It is
	// longer than a restart: a runner that restarts ends its drill itself.
	goneAfter = 10 * time.Second
	// endEvery is how often a node looks while a drill runs, or while it has to end one.
	endEvery = time.Second
)

// runnerView is what a node knows about the runner of a drill.
type runnerView struct {
	Runner string // empty: unknown, an earlier version runs the drill
	Self   string // this node
	Busy   bool   // this node runs a drill, or begins one
	Leads  bool   // this node is the Raft leader
	// Silent is for how long this node has not heard the runner, while it led.
	Silent time.Duration
	Now    time.Time
}

// abandoned says why a drill has no runner any more; empty when it may have one. It is
// pure.
func abandoned(d agreed.DrillRecord, v runnerView) string {
	switch {
	case d.Verdict != "" || v.Runner == "":
		return ""
	case v.Runner == v.Self:
		return either(v.Busy, "", fmt.Sprintf("%s, the node that ran the drill, was restarted or could not write its report", v.Self))
	case v.Leads && v.Silent >= goneAfter && !v.Now.Before(d.Deadline):
		return fmt.Sprintf("%s, the node that ran the drill, has not been heard for %s", v.Runner, v.Silent.Round(time.Second))
	}
	return ""
}

// AbortLater ends a drill's record as soon as this node can: it is of the site that was
// cut off, and can't change the agreed state yet.
func (r *Runner) AbortLater(id, by string) {
	r.mu.Lock()
	r.unwritten = unwrittenAbort{drill: id, by: by}
	r.mu.Unlock()
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// unwrittenAbort is an abort that is not in the drill's record yet.
type unwrittenAbort struct{ drill, by string }

// endAbandoned ends the records of drills that their runners don't end, until ctx ends.
func (r *Runner) endAbandoned(ctx context.Context) {
	var silence runnerSilence
	for {
		changed := r.o.Agreement.Changed()
		var again <-chan time.Time
		if r.lookForAbandoned(ctx, &silence) {
			again = time.After(endEvery)
		}
		select {
		case <-ctx.Done():
			return
		case <-changed:
		case <-r.wake:
		case <-again:
		}
	}
}

// runnerSilence is since when a node has not been heard by the leader that this node is.
type runnerSilence struct {
	node  string // empty: it is heard, or this node does not lead
	since time.Duration
}

// lookForAbandoned ends what is to be ended. It reports whether to look again soon.
func (r *Runner) lookForAbandoned(ctx context.Context, silence *runnerSilence) (again bool) {
	// In this order: a drill of this node is busy before its record is agreed on.
	drills := r.o.Agreement.State().Drills
	r.mu.Lock()
	unwritten, busy := r.unwritten, r.busy
	r.mu.Unlock()
	for _, d := range drills {
		if d.Verdict != "" {
			continue
		}
		again = true
		why := "aborted by " + unwritten.by
		if d.ID != unwritten.drill {
			why = abandoned(d, r.runnerOf(d, busy, silence))
		}
		if why == "" {
			continue
		}
		ctx, cancel := context.WithTimeout(ctx, agreeTimeout)
		err := r.end(ctx, d.ID, why)
		cancel()
		r.log.Info("ended the record of a drill", "drill", d.ID, "reason", why, "err", err)
	}
	if !again {
		r.written(unwritten)
	}
	return again
}

// written forgets an abort unless there is a newer one.
func (r *Runner) written(a unwrittenAbort) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.unwritten == a {
		r.unwritten = unwrittenAbort{}
	}
}

func (r *Runner) runnerOf(d agreed.DrillRecord, busy bool, silence *runnerSilence) runnerView {
	v := runnerView{Self: r.o.Node, Busy: busy, Leads: r.o.Agreement.Raft().Leads, Now: r.o.Now()}
	if report, err := DecodeReport(d.Report); err == nil {
		v.Runner = report.Runner
	}
	now := r.o.Boottime()
	switch {
	case !v.Leads || r.o.Agreement.Peers()[v.Runner].HeardWithin(r.o.Agreement.Timing().Patience):
		*silence = runnerSilence{}
	case silence.node != v.Runner:
		*silence = runnerSilence{node: v.Runner, since: now}
	default:
		v.Silent = now - silence.since
	}
	return v
}

// end writes an abort into a drill's record. The copy of the agreed state of a node that
// has just started, or was cut off, may be older than the verdict of the runner, which
// must not be replaced: after its own entry the copy is up to date.
func (r *Runner) end(ctx context.Context, id, why string) error {
	if _, err := r.o.Agreement.Propose(ctx, agreed.CmdTick, nil); err != nil {
		return err
	}
	for _, d := range r.o.Agreement.State().Drills {
		if d.ID != id || d.Verdict != "" {
			continue
		}
		d.Verdict, d.EndedAt = string(Aborted), r.o.Now().UTC()
		report, err := DecodeReport(d.Report)
		if err != nil { // an earlier version began it
			report = Report{Format: reportFormat, ID: d.ID, Kind: Kind(d.Kind), Site: d.Site, By: d.By, StartedAt: d.StartedAt}
		}
		// Without a runner a report says that nothing was measured.
		report.Runner, report.EndedAt, report.Verdict, report.Why = "", &d.EndedAt, Aborted, why
		if d.Report, err = report.Encode(); err != nil {
			return err
		}
		_, err = r.o.Agreement.Propose(ctx, agreed.CmdDrillPut, d)
		return err
	}
	return nil
}
