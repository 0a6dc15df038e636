package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/dsnode/dsnode/failover/drill"
	"github.com/dsnode/dsnode/node/admin"
)

// drillSummary is the output of drill run -o json.
type drillSummary struct {
	ID            string   `json:"id"`
	Kind          string   `json:"kind"`
	Verdict       string   `json:"verdict"`
	RTOSeconds    *float64 `json:"rto_seconds"`
	RPOSeconds    *float64 `json:"rpo_seconds"`
	RecordsAtRisk *int64   `json:"records_at_risk"`
	JobsLost      *int64   `json:"jobs_lost"`
	Errors        *int     `json:"errors"`
	Requests      *int     `json:"requests"`
}

func newDrillRunCommand(env *environment) *cobra.Command {
	var r admin.DrillRequest
	var length time.Duration
	var yes bool
	cmd := &cobra.Command{
		Use:   "run --kind KIND --site SITE",
		Short: "Run a drill and follow it to its verdict",
		Long: "Run a drill and follow it to its verdict.\n\n" +
			"  switchover  moves the primary to SITE without loss\n" +
			"  isolation   cuts SITE off from the other sites. If SITE is the primary, a real failover happens. A timer at\n" +
			"              SITE always ends the cut after --for. SITE still serves its own clients\n\n" +
			"The drill runs in a node. Ctrl-C ends only this command; dsnode drill abort ID ends the drill.\n" +
			"Exit code 0: the drill passed. 1: it did not.",
		Example: "  dsnode drill run --kind isolation --site shanghai-a --for 30s\n  dsnode drill run --kind switchover --site beijing --return",
		Args:    takes(),
	}
	drillFlags(cmd, &r, &length)
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "don't ask for a confirmation")
	return onCluster(env, cmd, func(ctx context.Context, s *session, _ []string) error {
		if err := normalDrill(&r, length); err != nil {
			return err
		}
		if !yes {
			p, err := s.PlanDrill(ctx, r, "")
			if err != nil {
				return err
			}
			if err := confirm(env, yes, fmt.Sprintf("This rehearses %s. Begin?", printable(p.Rehearses))); err != nil {
				return err
			}
		}
		d, err := s.StartDrill(ctx, r, "")
		if err != nil {
			return err
		}
		say(env.stderr, "drill", fmt.Sprintf("%s begins; Ctrl-C does not end it, dsnode drill abort %s does", d.ID, d.ID))
		return followDrill(ctx, s, d)
	})
}

// followEvery is the pause between two requests for a running drill.
const followEvery = 500 * time.Millisecond

// followDrill prints the drill's events until there is a verdict.
func followDrill(ctx context.Context, s *session, d admin.Drill) error {
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	tick := time.NewTicker(followEvery)
	defer tick.Stop()
	id, shown := d.ID, 0
	var lost time.Time // since when no node answers; zero: one does
	for {
		next, err := s.Drill(ctx, id)
		now := time.Now()
		switch {
		case ctx.Err() != nil:
			return failure("dsnode drill show "+id+" shows it, dsnode drill abort "+id+" ends it", "the drill %s is still running", id)
		case err == nil:
			lost, d = time.Time{}, next
		case lost.IsZero():
			lost = now
		case now.Sub(lost) > drill.MaxFor || !errors.Is(err, admin.ErrUnreachable) && now.Sub(lost) > time.Minute:
			return err
		}
		r, known, err := reportOf(d)
		if err != nil {
			return err
		}
		if known && shown < len(r.Timeline) {
			for _, e := range r.Timeline[shown:] {
				say(s.env.stderr, "drill", fmt.Sprintf("%5.1fs %s%s", e.After, e.What, colon(e.Detail)))
			}
			shown = len(r.Timeline)
		}
		if d.Verdict != nil {
			return concludeDrill(s, d, r, known)
		}
		select {
		case <-ctx.Done():
		case <-tick.C:
		}
	}
}

func colon(detail string) string {
	if detail == "" {
		return ""
	}
	return ": " + detail
}

func concludeDrill(s *session, d admin.Drill, r drill.Report, known bool) error {
	sum := drillSummary{ID: d.ID, Kind: d.Kind, Verdict: *d.Verdict}
	if known {
		sum.RTOSeconds, sum.RPOSeconds, sum.RecordsAtRisk, sum.JobsLost = r.RTO.Achieved, r.RPO.Achieved, r.RecordsAtRisk, r.JobsLost
		if r.Runner != "" { // else the node that ended the record did not run the drill
			sum.Errors, sum.Requests = &r.Errors, &r.Requests
		}
	}
	err := s.show(sum, func(w io.Writer) error {
		v := drillVerdict(d)
		if err := emit(w, "%s: %s\n", printable(d.ID), s.env.palette().paint(v.colour, printable(v.text))); err != nil {
			return err
		}
		g := &grid{heads: []string{"CRITERION", "", "DETAIL"}}
		for _, c := range r.Criteria {
			g.add(plain(c.Name), okCell(c.OK), plain(c.Detail))
		}
		if len(g.rows) > 0 {
			if err := g.write(w, s.env.palette()); err != nil {
				return err
			}
		}
		return emit(w, "\ndsnode drill report %s -o markdown|json|html writes the report.\n", printable(d.ID))
	})
	if err == nil && *d.Verdict != string(drill.Pass) {
		return quietly(exitFailed)
	}
	return err
}
