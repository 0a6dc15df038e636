package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/dsnode/dsnode/node/admin"
)

func newStatusCommand(env *environment) *cobra.Command {
	var watch bool
	var interval time.Duration
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show the state of the cluster",
		Long: "Show the state of the cluster, as the node that answers sees it.\n\n" +
			"HEARD is how long ago that node last heard from a site or a node, LAG is how old a site's copy of the\n" +
			"other sites' jobs may be. - is an unknown value.\n\n" +
			"Exit code 0: healthy. 3: degraded or without quorum. 1: no node can be reached.",
		Args: takes(),
	}
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "show it repeatedly until Ctrl-C")
	cmd.Flags().DurationVar(&interval, "interval", 2*time.Second, "`TIME` between two updates of --watch")
	return onCluster(env, cmd, func(ctx context.Context, s *session, _ []string) error {
		if interval < 100*time.Millisecond {
			return usage("for example --interval 2s", "--interval must be at least 100ms, not %s", interval)
		}
		if watch {
			return watchStatus(ctx, s, interval)
		}
		status, err := s.Status(ctx)
		if err != nil {
			return err
		}
		if err := showStatus(s, status); err != nil {
			return err
		}
		if !status.Healthy {
			return quietly(exitUnhealthy)
		}
		return nil
	})
}

func showStatus(s *session, status admin.Status) error {
	return s.show(status, func(w io.Writer) error {
		return statusTable{Status: status, now: status.ObservedAt}.write(w, s.env.palette())
	})
}

// watchStatus shows the status until Ctrl-C. A terminal is redrawn. Elsewhere each
// status is appended to the output, in JSON as one line.
func watchStatus(ctx context.Context, s *session, interval time.Duration) error {
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		if err := watchOnce(ctx, s); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

func watchOnce(ctx context.Context, s *session) error {
	status, err := s.Status(ctx)
	if ctx.Err() != nil {
		return nil // Ctrl-C, whatever the request returned
	}
	if s.env.stdoutIsTerminal() && s.output == outputTable {
		// Move to the top left and erase what is below. Erasing all first would flicker.
		if err := emit(s.env.stdout, "\x1b[H\x1b[J"); err != nil {
			return err
		}
	}
	switch {
	case errors.Is(err, admin.ErrUnreachable), errors.Is(err, admin.ErrTimeout), errors.Is(err, admin.ErrBusy):
		report(s.env.stderr, err) // the node may come back, so go on
		return nil
	case err != nil:
		return err
	case s.output == outputJSON:
		line, err := json.Marshal(status)
		if err != nil {
			return fmt.Errorf("encode the status: %w", err)
		}
		return emit(s.env.stdout, "%s\n", line)
	case s.output == outputYAML:
		if err := emit(s.env.stdout, "---\n"); err != nil {
			return err
		}
	}
	if err := showStatus(s, status); err != nil {
		return err
	}
	if s.output == outputTable && !s.env.stdoutIsTerminal() {
		return emit(s.env.stdout, "\n")
	}
	return nil
}
