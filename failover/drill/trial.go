package drill

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/clock"
	"github.com/dsnode/dsnode/failover"
)

// Every step of a drill has a deadline.
const (
	agreeTimeout   = 5 * time.Second
	baselineTime   = time.Second      // of probing before and after the steps
	silenceTimeout = 15 * time.Second // from the agreement until the site is silent
	promoteTimeout = 90 * time.Second
	answerTimeout  = 30 * time.Second // from the promotion until the new primary answers as such
	healTimeout    = 30 * time.Second // from the end of the cut until the site is heard
	inPlaceTimeout = 30 * time.Second // from when the site is heard until it is in its place
	// A site that is heard this much before the end of the cut was not cut off to the end.
	earlyBy = time.Second
	// abortedTimeout is how long after that a node of the site may take to write into the
	// record that it was told to abort the drill.
	abortedTimeout  = 15 * time.Second
	switchTimeout   = 30 * time.Second
	recordTimeout   = 30 * time.Second // to have the verdict agreed on
	lookEvery       = 50 * time.Millisecond
	settleTime      = time.Second // in its place for this long without a gap
	maxExtraRunning = promoteTimeout + answerTimeout + healTimeout + inPlaceTimeout + 2*switchTimeout + recordTimeout
)

var errAborted = errors.New("aborted")

// trial is one drill under way.
type trial struct {
	r      *Runner
	o      Options
	log    *slog.Logger
	q      Request
	record agreed.DrillRecord
	checks []failover.Check
	probe  *probe
	done   func()        // closes the asker
	state  *agreed.State // before the drill
	// processes are the instances of the peers before an isolation.
	processes map[string]string
	// wasUnhealthy: the cluster was not healthy before, and that was waived.
	wasUnhealthy bool

	mu     sync.Mutex // guards report
	report Report
}

func newTrial(r *Runner, v View, q Request) *trial {
	s := r.o.Agreement.State()
	asker, done := r.o.NewAsker(q.ProbeModel)
	now := r.o.Now().UTC()
	t := &trial{
		r: r, o: r.o, q: q, state: s, checks: Plan(v, q), done: done, wasUnhealthy: len(v.Unhealthy) > 0,
		probe: &probe{
			asker: asker, boottime: r.o.Boottime, now: r.o.Now, paid: q.ProbeModel != "",
			sites: map[string]*Clients{}, roles: map[string]role{},
		},
	}
	length := time.Duration(0)
	if q.Kind == Isolation {
		length = Lead + q.For
	}
	t.record = agreed.DrillRecord{
		ID: newID(), Kind: string(q.Kind), Site: q.Site, By: q.By, StartedAt: now,
		Deadline: now.Add(length), AbandonedAt: now.Add(length + maxExtraRunning),
	}
	t.log = r.log.With("drill", t.record.ID, "kind", q.Kind, "of", q.Site)
	t.report = Report{
		Format: reportFormat, ID: t.record.ID, Kind: q.Kind, Site: q.Site, By: q.By, Runner: r.o.Node,
		Rehearsed: Rehearses(v, q), StartedAt: now, Clients: []Clients{}, Criteria: []Criterion{},
		Primary: Change{From: s.Primary.Site, FromEpoch: s.Primary.Epoch, To: s.Primary.Site, ToEpoch: s.Primary.Epoch},
	}
	t.targetsOf(s)
	return t
}

// targetsOf takes the targets of the drill's site from the configuration. Without one,
// no check of a site holds, and the drill does not begin.
func (t *trial) targetsOf(s *agreed.State) {
	if s.Parsed == nil {
		return
	}
	rto, rpo := s.Parsed.Sites[t.q.Site].RTOTarget.D().Seconds(), s.Parsed.Sites[t.q.Site].RPOTarget.D().Seconds()
	t.report.RTO.Target, t.report.RPO.Target = &rto, &rpo
}

// tryModel asks each target for one completion before the drill, so that a wrong model
// name or a missing key does not look like an outage.
func (t *trial) tryModel(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	check := failover.Check{Name: "probe_model", OK: true, Detail: t.q.ProbeModel + " answers"}
	for _, target := range t.r.targets() {
		if _, err := t.probe.asker.Ask(ctx, target, AskCompletion); err != nil {
			check.OK, check.Detail = false, fmt.Sprintf("%s at %s: %s", t.q.ProbeModel, target.Node, brief(err.Error()))
		}
	}
	t.checks = append(t.checks, check)
}

// agree has the record agreed on. When the leadership moved during the proposal, the
// record may be agreed all the same.
func (t *trial) agree(ctx context.Context) error {
	for _, c := range t.checks {
		p := Precheck{Check: c}
		p.Detail = brief(p.Detail)
		if !c.OK {
			p.WaivedBy = t.q.By
		}
		t.report.Checks = append(t.report.Checks, p)
	}
	var err error
	// Other nodes must know the runner, to end the record if it is gone.
	if t.record.Report, err = t.report.Encode(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, agreeTimeout)
	defer cancel()
	_, err = t.o.Agreement.Propose(ctx, agreed.CmdDrillPut, t.record)
	if err == nil || !errors.Is(err, cluster.ErrLeadershipMoved) {
		return err
	}
	if waitErr := t.until(ctx, func() bool { return t.standing() != nil }); waitErr != nil {
		return err
	}
	return nil
}

// standing is the drill's agreed record, nil when there is none.
func (t *trial) standing() *agreed.DrillRecord {
	s := t.o.Agreement.State()
	if i := slices.IndexFunc(s.Drills, func(d agreed.DrillRecord) bool { return d.ID == t.record.ID }); i >= 0 {
		return &s.Drills[i]
	}
	return nil
}

// until polls until is gives true.
func (t *trial) until(ctx context.Context, is func() bool) error {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for !is() {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-tick.C:
		}
	}
	return nil
}

// within is until with a time limit. Its error tells what was waited for.
func (t *trial) within(ctx context.Context, limit time.Duration, what string, is func() bool) error {
	wait, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	if err := t.until(wait, is); err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return fmt.Errorf("waited %s for %s", limit.Round(100*time.Millisecond), what)
	}
	return nil
}

// run carries the drill out, judges it and has its report agreed on.
func (t *trial) run(ctx context.Context) {
	defer t.done()
	acting, abort := context.WithCancelCause(ctx)
	defer abort(nil)
	probing, stopProbe := context.WithCancel(ctx)
	defer stopProbe()
	var background sync.WaitGroup
	background.Go(func() { t.probe.run(probing, t.r.targets()) })
	background.Go(func() {
		// An operator may abort the drill on any node, which writes the verdict into the
		// record.
		if t.until(acting, func() bool { d := t.standing(); return d != nil && d.Verdict != "" }) == nil {
			abort(errAborted)
		}
	})
	t.event("started", t.report.Rehearsed+", asked for by "+t.q.By)
	out := Outcome{Kind: t.q.Kind, Site: t.q.Site, RTOTarget: *t.report.RTO.Target}
	err := clock.Sleep(acting, baselineTime)
	if err == nil {
		switch t.q.Kind {
		case Switchover:
			err = t.switchover(acting, &out)
		case Isolation:
			err = t.isolation(acting, &out)
		}
	}
	if err == nil && t.q.Return {
		err = t.goBack(acting, &out)
	}
	if err == nil {
		err = clock.Sleep(acting, baselineTime)
	}
	switch {
	case err == nil:
	case ctx.Err() != nil:
		out.Aborted = errStopped.Error()
	case errors.Is(context.Cause(acting), errAborted):
		out.Aborted = t.abortReason()
	default:
		out.Failed = err.Error()
		t.event("failed", out.Failed)
	}
	abort(nil)
	stopProbe()
	background.Wait()
	if d := t.standing(); out.Aborted == "" && d != nil && d.Verdict == string(Aborted) {
		out.Aborted = t.abortReason() // since the last step
	}
	t.finish(context.WithoutCancel(ctx), out)
}

func (t *trial) abortReason() string {
	reason := "aborted by an operator"
	if d := t.standing(); d != nil {
		if r, err := DecodeReport(d.Report); err == nil && r.Why != "" {
			reason = r.Why
		}
	}
	if t.q.Kind == Isolation {
		reason += fmt.Sprintf("; %s heals by itself by %s at the latest", t.q.Site, t.record.Deadline.Format(time.RFC3339))
	}
	return reason
}

// finish judges the drill and has its report agreed on.
func (t *trial) finish(ctx context.Context, out Outcome) {
	s := t.o.Agreement.State()
	t.mu.Lock()
	t.report.Primary.To, t.report.Primary.ToEpoch = s.Primary.Site, s.Primary.Epoch
	out.Primary = t.report.Primary
	t.mu.Unlock()
	seen := t.soFar()
	out.Requests, out.Errors = seen.Requests, seen.Errors
	verdict, criteria := Judge(out)
	t.event("ended", string(verdict))
	ended := t.o.Now().UTC()
	t.mu.Lock()
	t.report.Verdict, t.report.Criteria, t.report.EndedAt = verdict, criteria, &ended
	for _, c := range criteria {
		if !c.OK && t.report.Why == "" {
			t.report.Why = brief(c.Detail)
		}
	}
	t.mu.Unlock()
	report := t.soFar()
	t.log.Info("drill ended", "verdict", verdict, "reason", report.Why, "requests", report.Requests, "errors", report.Errors)
	if err := t.write(ctx, report); err != nil {
		t.log.Warn("the drill's report was not agreed on", "err", err)
	}
}

// write has the report agreed on. It retries until its time limit.
func (t *trial) write(ctx context.Context, report Report) error {
	text, err := report.Encode()
	if err != nil {
		return err
	}
	d := t.record
	d.Verdict, d.EndedAt, d.Report = string(report.Verdict), *report.EndedAt, text
	limit := recordTimeout
	if report.Why == errStopped.Error() {
		limit = 2 * time.Second // the node is about to stop
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		if _, err = t.o.Agreement.Propose(ctx, agreed.CmdDrillPut, d); err == nil {
			return nil
		}
		if clock.Sleep(ctx, time.Second) != nil {
			return err
		}
	}
}

// event adds an event to the timeline and to the log.
func (t *trial) event(what, detail string) { t.eventAt(t.o.Now(), what, detail) }

func (t *trial) eventAt(at time.Time, what, detail string) {
	t.log.Info("drill", "event", what, "detail", detail)
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.report.Timeline) >= maxEvents {
		return
	}
	t.report.Timeline = append(t.report.Timeline, Event{
		At: at.UTC(), After: at.Sub(t.report.StartedAt).Seconds(), What: what, Detail: brief(detail),
	})
}

// soFar is the report, with what the probe has seen so far.
func (t *trial) soFar() Report {
	except := ""
	if t.q.Kind == Isolation {
		except = t.q.Site
	}
	clients, requests, errs := t.probe.seen(except)
	t.mu.Lock()
	defer t.mu.Unlock()
	r := t.report
	r.Timeline = slices.Clone(r.Timeline)
	r.Clients, r.Requests, r.Errors = clients, requests, errs
	return r
}

func (t *trial) set(change func(*Report)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	change(&t.report)
}
