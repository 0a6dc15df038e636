package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/dsnode/dsnode/failover/drill"
	"github.com/dsnode/dsnode/node/admin"
)

func newDrillCommand(env *environment) *cobra.Command {
	return newGroup("drill", "Rehearse a failover and get a report",
		newDrillPlanCommand(env),
		newDrillRunCommand(env),
		newDrillListCommand(env),
		newDrillShowCommand(env),
		newDrillReportCommand(env),
		newDrillAbortCommand(env),
	)
}

// drillFlags adds the flags of plan and run.
func drillFlags(cmd *cobra.Command, r *admin.DrillRequest, length *time.Duration) {
	f := cmd.Flags()
	f.StringVar(&r.Kind, "kind", "", "`KIND` of the drill: "+orList(drill.Kinds())+" (required)")
	f.StringVar(&r.Site, "site", "", "`SITE` that becomes the primary (switchover) or is cut off (isolation) (required)")
	f.DurationVar(length, "for", 0, fmt.Sprintf("`TIME` that an isolation lasts, %s to %s (default %s)", drill.MinFor, drill.MaxFor, drill.DefaultFor))
	f.BoolVar(&r.Return, "return", false, "move the primary back afterwards by a switchover")
	f.StringSliceVar(&r.Waive, "waive", nil, "`CHECK,…` that may fail, of those that are waivable")
	f.StringVar(&r.ProbeModel, "probe-model", "", "also ask this `MODEL` for one token per second and node; it may cost money")
}

func normalDrill(r *admin.DrillRequest, length time.Duration) error {
	r.ForSeconds = length.Seconds()
	_, err := drill.Request{Kind: drill.Kind(r.Kind), Site: r.Site, For: length}.Normal()
	if err != nil {
		return &exitError{code: exitUsage, err: err, hint: "see dsnode drill run --help"}
	}
	return nil
}

func newDrillPlanCommand(env *environment) *cobra.Command {
	var r admin.DrillRequest
	var length time.Duration
	cmd := &cobra.Command{
		Use:     "plan --kind KIND --site SITE",
		Short:   "Show what a drill would do, and whether it can begin",
		Long:    "Show what a drill would do and which checks hold. This changes nothing. Exit code 1: the drill can't begin.",
		Example: "  dsnode drill plan --kind isolation --site shanghai-a",
		Args:    takes(),
	}
	drillFlags(cmd, &r, &length)
	return onCluster(env, cmd, func(ctx context.Context, s *session, _ []string) error {
		if err := normalDrill(&r, length); err != nil {
			return err
		}
		p, err := s.PlanDrill(ctx, r, "")
		if err != nil {
			return err
		}
		return showPlan(s, p, p.OK, "It would rehearse "+p.Rehearses+".", checksGrid(p.Checks, r.Waive))
	})
}

func newDrillListCommand(env *environment) *cobra.Command {
	cmd := &cobra.Command{Use: "list", Short: "List the newest 50 drills", Args: takes()}
	return onCluster(env, cmd, func(ctx context.Context, s *session, _ []string) error {
		drills, err := s.Drills(ctx)
		if err != nil {
			return err
		}
		return s.show(drills, func(w io.Writer) error {
			g := &grid{heads: []string{"DRILL", "KIND", "SITE", "STARTED", "VERDICT", "BY"}}
			for _, d := range slices.Backward(drills) {
				g.add(plain(d.ID), plain(d.Kind), plain(d.Site), plain(d.StartedAt.UTC().Format(time.RFC3339)), drillVerdict(d), plain(d.By))
			}
			return g.write(w, env.palette())
		})
	})
}

func okCell(ok bool) cell {
	if ok {
		return cell{"ok", green}
	}
	return cell{"NO", red}
}

func drillVerdict(d admin.Drill) cell {
	if d.Verdict == nil {
		return cell{"running", yellow}
	}
	switch *d.Verdict {
	case string(drill.Pass):
		return cell{*d.Verdict, green}
	case string(drill.Fail):
		return cell{*d.Verdict, red}
	}
	return cell{*d.Verdict, yellow}
}

func newDrillShowCommand(env *environment) *cobra.Command {
	cmd := &cobra.Command{Use: "show ID", Short: "Show a drill and its timeline", Args: takes("the drill's ID")}
	return onCluster(env, cmd, func(ctx context.Context, s *session, args []string) error {
		d, err := s.Drill(ctx, args[0])
		if err != nil {
			return err
		}
		return s.show(d, func(w io.Writer) error { return drillText(w, env.palette(), d) })
	})
}

func drillText(w io.Writer, p palette, d admin.Drill) error {
	v := drillVerdict(d)
	if err := emit(w, "%s: %s of %s, by %s, %s: %s\n", printable(d.ID), printable(d.Kind), printable(d.Site), printable(d.By),
		d.StartedAt.UTC().Format(time.RFC3339), p.paint(v.colour, printable(v.text))); err != nil {
		return err
	}
	r, known, err := reportOf(d)
	if err != nil {
		return err
	}
	if !known {
		return emit(w, "This node has no report of it%s.\n", map[bool]string{true: "; another node runs the drill", false: ""}[d.Verdict == nil])
	}
	g := &grid{heads: []string{"AFTER", "WHAT", "DETAIL"}}
	for _, e := range r.Timeline {
		g.add(plain(fmt.Sprintf("%.1fs", e.After)), plain(e.What), plain(e.Detail))
	}
	for _, c := range r.Criteria {
		g.add(okCell(c.OK), plain(c.Name), plain(c.Detail))
	}
	if r.Why != "" {
		if err := emit(w, "%s\n", printable(r.Why)); err != nil {
			return err
		}
	}
	return g.write(w, p)
}

func reportOf(d admin.Drill) (r drill.Report, known bool, err error) {
	if len(d.Report) == 0 || string(d.Report) == "null" {
		return r, false, nil
	}
	r, err = drill.DecodeReport(d.Report)
	return r, err == nil, err
}

func newDrillReportCommand(env *environment) *cobra.Command {
	cmd := &cobra.Command{Use: "report ID", Short: "Write a drill's report", Args: takes("the drill's ID")}
	return onClusterAs(env, cmd, drill.Formats(), func(ctx context.Context, s *session, args []string) error {
		d, err := s.Drill(ctx, args[0])
		if err != nil {
			return err
		}
		r, known, err := reportOf(d)
		switch {
		case err != nil:
			return err
		case !known && d.Verdict == nil:
			return failure("try again when the drill has ended, or ask the node that runs it with --admin", "the drill %s is still running, and another node has its report", d.ID)
		case !known:
			return failure("run the drill again with dsnode drill run", "the drill %s has no report: the node that ran it was lost", d.ID)
		}
		text, err := r.Render(s.output)
		if err != nil {
			return err
		}
		return emit(env.stdout, "%s", text)
	})
}

func newDrillAbortCommand(env *environment) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "abort ID",
		Short: "End a running drill",
		Long: "End a running drill. The command tells all admin URLs, because a site that is cut off gets no message from\n" +
			"other nodes. Without an admin URL of that site, its timer ends the cut.",
		Args: takes("the drill's ID"),
	}
	return onCluster(env, cmd, func(ctx context.Context, s *session, args []string) error {
		return s.done(s.AbortDrill(ctx, args[0], ""), "%s is aborted", args[0])
	})
}
