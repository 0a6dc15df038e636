package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/dsnode/dsnode/node/admin"
)

func newFailoverCommand(env *environment) *cobra.Command {
	var r admin.FailoverRequest
	var plan, yes bool
	cmd := &cobra.Command{
		Use:   "failover --to SITE",
		Short: "Move the primary to another site",
		Long: "Move the primary to another site by a planned switchover, without loss. The old primary stops acting as\n" +
			"primary, the new one takes over as soon as it has every job record that the old one had, and then the\n" +
			"Raft leader moves to it. A failure before the takeover changes nothing.",
		Example: "  dsnode failover --to shanghai-b\n  dsnode failover --to shanghai-b --plan",
		Args:    takes(),
	}
	f := cmd.Flags()
	f.StringVar(&r.To, "to", "", "`SITE` that becomes the primary (required)")
	f.BoolVar(&r.AcceptLoss, "accept-loss", false, "go on although records may be lost; names them first")
	f.StringSliceVar(&r.Waive, "waive", nil, "`CHECK,…` that may fail, of those that are waivable")
	f.BoolVar(&plan, "plan", false, "only show which checks hold; exit code 1: the switchover can't begin")
	f.BoolVarP(&yes, "yes", "y", false, "don't ask for a confirmation")
	onCluster(env, cmd, func(ctx context.Context, s *session, _ []string) error {
		if r.To == "" {
			return usage("see dsnode failover --help", "failover needs --to SITE")
		}
		if plan {
			return planFailover(ctx, s, r)
		}
		if r.AcceptLoss {
			if err := nameLoss(ctx, s, r); err != nil {
				return err
			}
		}
		if err := confirm(env, yes, fmt.Sprintf("Move the primary to %s now?", r.To)); err != nil {
			return err
		}
		res, err := s.Failover(ctx, r, "")
		if err != nil {
			return err
		}
		return s.show(res, func(w io.Writer) error { return failoverText(w, env.palette(), res) })
	})
	patient(cmd, time.Minute)
	cmd.AddCommand(newFailoverAckCommand(env), newFailoverHoldCommand(env), newFailoverResumeCommand(env))
	return cmd
}

// nameLoss says, before anything is done, what an accepted loss would lose.
func nameLoss(ctx context.Context, s *session, r admin.FailoverRequest) error {
	p, err := s.PlanFailover(ctx, r, "")
	if err != nil {
		return err
	}
	for _, c := range p.Checks {
		if c.Name == "lossless" {
			say(s.env.stderr, c.Name, c.Detail)
		}
	}
	return nil
}

func planFailover(ctx context.Context, s *session, r admin.FailoverRequest) error {
	p, err := s.PlanFailover(ctx, r, "")
	if err != nil {
		return err
	}
	return showPlan(s, p, p.OK, fmt.Sprintf("The primary would move from %s to %s.", text(p.From), p.To), checksGrid(p.Checks, r.Waive))
}

// showPlan shows what a switchover or a drill would do, and its checks. The exit code is
// 1 if it can't begin.
func showPlan(s *session, plan any, ok bool, what string, checks *grid) error {
	err := s.show(plan, func(w io.Writer) error {
		if err := emit(w, "%s\n\n", printable(what)); err != nil {
			return err
		}
		return checks.write(w, s.env.palette())
	})
	if err == nil && !ok {
		return quietly(exitFailed)
	}
	return err
}

func checksGrid(checks []admin.Check, waive []string) *grid {
	g := &grid{heads: []string{"CHECK", "", "DETAIL"}}
	waived := map[string]bool{}
	for _, name := range waive {
		waived[name] = true
	}
	for _, c := range checks {
		state := cell{"ok", green}
		switch {
		case c.OK:
		case c.Waivable && waived[c.Name]:
			state = cell{"waived", yellow}
		case c.Waivable:
			state = cell{"no, waivable", red}
		default:
			state = cell{"no", red}
		}
		g.add(plain(c.Name), state, plain(c.Detail))
	}
	return g
}

func failoverText(w io.Writer, p palette, r admin.FailoverResult) error {
	if err := emit(w, "The primary moved from %s to %s: epoch %d, no site acted as primary for %s.\n%s\n",
		printable(r.From), printable(r.To), r.Epoch, milliseconds(r.IdleSeconds), lossText(r)); err != nil {
		return err
	}
	g := &grid{heads: []string{"STEP", "TOOK", ""}}
	for _, step := range r.Steps {
		g.add(plain(step.Name), plain(milliseconds(step.TookSeconds)), cell{step.Error, red})
	}
	if err := g.write(w, p); err != nil || r.LeaderMoved {
		return err
	}
	return emit(w, "\nThe Raft leader has not moved yet; the cluster keeps trying.\n")
}

// lossText is a line about what may have been lost, empty if that is nothing.
func lossText(r admin.FailoverResult) string {
	switch {
	case r.RecordsAtRisk == nil && r.RPOSeconds == nil:
		return ""
	case r.RecordsAtRisk == nil || r.RPOSeconds == nil:
		return "It is not known what may be lost.\n"
	case *r.RecordsAtRisk == 0:
		return "Nothing was lost.\n"
	}
	return fmt.Sprintf("%d job records, of the last %.1f s, are at %s alone and may be lost.\n", *r.RecordsAtRisk, *r.RPOSeconds, printable(r.From))
}

func milliseconds(s float64) string {
	return time.Duration(s * float64(time.Second)).Round(time.Millisecond).String()
}

func newFailoverAckCommand(env *environment) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "ack",
		Short: "Acknowledge the last automatic failover",
		Long:  "Acknowledge the last automatic failover. This also ends the minimum pause before the next automatic one.",
		Args:  takes(),
	}
	return onCluster(env, cmd, func(ctx context.Context, s *session, _ []string) error {
		return s.done(s.AckFailover(ctx, ""), "the failover is acknowledged")
	})
}

func newFailoverHoldCommand(env *environment) *cobra.Command {
	var reason string
	cmd := &cobra.Command{
		Use:   "hold",
		Short: "Pause automatic failovers, for maintenance",
		Long:  "Pause automatic failovers, for maintenance. Meanwhile a lost primary is not replaced automatically.",
		Args:  takes(),
	}
	cmd.Flags().StringVar(&reason, "reason", "", "`TEXT` that the status shows")
	return onCluster(env, cmd, func(ctx context.Context, s *session, _ []string) error {
		return s.done(s.HoldFailover(ctx, reason, ""), "automatic failovers are paused; dsnode failover resume ends the pause")
	})
}

func newFailoverResumeCommand(env *environment) *cobra.Command {
	cmd := &cobra.Command{Use: "resume", Short: "End the pause of automatic failovers", Args: takes()}
	return onCluster(env, cmd, func(ctx context.Context, s *session, _ []string) error {
		return s.done(s.ResumeFailover(ctx, ""), "automatic failovers are on")
	})
}

// confirm asks for a confirmation if stdin is a terminal. A script is not asked.
func confirm(env *environment, yes bool, question string) error {
	in, ok := env.stdin.(*os.File)
	if yes || !ok || !term.IsTerminal(int(in.Fd())) { //nolint:gosec // a file descriptor fits
		return nil
	}
	if _, err := fmt.Fprintf(env.stderr, "%s [y/N] ", question); err != nil {
		return fmt.Errorf("ask for a confirmation: %w", err)
	}
	line, err := bufio.NewReader(in).ReadString('\n')
	if answer := strings.ToLower(strings.TrimSpace(line)); err == nil && (answer == "y" || answer == "yes") {
		return nil
	}
	return failure("answer y, or give --yes", "not confirmed; nothing was changed")
}
