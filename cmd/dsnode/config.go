package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/node/admin"
)

func newConfigCommand(env *environment) *cobra.Command {
	return newGroup("config", "Show and change the cluster's configuration",
		newConfigGetCommand(env),
		newConfigValidateCommand(env),
		newConfigDiffCommand(env),
		newConfigApplyCommand(env),
		newConfigHistoryCommand(env),
		newConfigRollbackCommand(env),
	)
}

func newConfigGetCommand(env *environment) *cobra.Command {
	var version uint64
	cmd := &cobra.Command{
		Use: "get", Short: "Show the configuration as it was written", Args: takes(),
		Example: "  dsnode config get > cluster.yaml",
	}
	cmd.Flags().Uint64Var(&version, "version", 0, "`N` of an earlier version (default the current one)")
	return onCluster(env, cmd, func(ctx context.Context, s *session, _ []string) error {
		config, err := configVersion(ctx, s, version)
		if err != nil {
			return err
		}
		return s.show(config, func(w io.Writer) error { return emit(w, "%s", config.Text) })
	})
}

// configVersion returns a version; 0 is the current one.
func configVersion(ctx context.Context, s *session, version uint64) (admin.ConfigVersion, error) {
	config, err := s.Config(ctx)
	if err != nil || version == 0 || version == config.Version {
		return config, err
	}
	history, err := s.ConfigHistory(ctx)
	if err != nil {
		return admin.ConfigVersion{}, err
	}
	i := slices.IndexFunc(history, func(v admin.ConfigVersion) bool { return v.Version == version })
	if i < 0 {
		return admin.ConfigVersion{}, failure("dsnode config history lists the versions that are kept", "there is no version %d", version)
	}
	return history[i], nil
}

func newConfigDiffCommand(env *environment) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "diff FILE",
		Short: "Show what applying a file would change",
		Long:  "Show what applying a file would change.\n\nExit code 0: nothing. 1: something. 2: error.",
		Args:  takes("a FILE (- for stdin)"),
	}
	return onCluster(env, cmd, func(ctx context.Context, s *session, args []string) error {
		text, err := readClusterConfig(env, args[0])
		if err != nil {
			return undecided(err)
		}
		current, err := s.Config(ctx)
		if err != nil {
			return undecided(err)
		}
		diff := config.Diff([]byte(current.Text), text)
		if diff == "" {
			return nil
		}
		if err := emit(env.stdout, "%s", diff); err != nil {
			return undecided(err)
		}
		return quietly(exitFailed)
	})
}

// undecided ends diff with an error. Its exit code 1 means that the files differ.
func undecided(err error) error {
	return &exitError{code: exitUsage, err: err, hint: hintFor(err)}
}

func newConfigApplyCommand(env *environment) *cobra.Command {
	var expect uint64
	cmd := &cobra.Command{
		Use:   "apply FILE",
		Short: "Make a file the configuration of the whole cluster",
		Long: "Make a file the configuration of the whole cluster.\n\n" +
			"With --expect-version N the file is applied only while version N is current. Use the version that you\n" +
			"edited (dsnode config history shows it), so that you don't undo somebody else's change.",
		Example: "  dsnode config apply cluster.yaml --expect-version 7",
		Args:    takes("a FILE (- for stdin)"),
	}
	cmd.Flags().Uint64Var(&expect, "expect-version", 0, "apply only while version `N` is current")
	return onCluster(env, cmd, func(ctx context.Context, s *session, args []string) error {
		text, err := readClusterConfig(env, args[0])
		if err != nil {
			return err
		}
		before, err := s.Config(ctx)
		if err != nil {
			return err
		}
		if !cmd.Flags().Changed("expect-version") {
			expect = before.Version // a change from now on is not overwritten
		}
		if before.Text == string(text) && before.Version == expect {
			say(env.stderr, "done", fmt.Sprintf("nothing to change: version %d is the same", before.Version))
			return showChange(s, before)
		}
		after, err := s.ApplyConfig(ctx, text, &expect, "")
		if err != nil {
			return err
		}
		say(env.stderr, "done", fmt.Sprintf("version %d is the current configuration", after.Version))
		return showChange(s, after)
	})
}

// showChange writes the new version for scripts. For people a message was printed.
func showChange(s *session, v admin.ConfigVersion) error {
	return s.show(v, func(io.Writer) error { return nil })
}

func newConfigHistoryCommand(env *environment) *cobra.Command {
	cmd := &cobra.Command{Use: "history", Short: "List the versions that are kept, newest first", Args: takes()}
	return onCluster(env, cmd, func(ctx context.Context, s *session, _ []string) error {
		config, err := s.Config(ctx)
		if err != nil {
			return err
		}
		versions, err := s.ConfigHistory(ctx)
		if err != nil {
			return err
		}
		// A change between the two questions would show a version twice.
		versions = slices.DeleteFunc(versions, func(v admin.ConfigVersion) bool { return v.Version >= config.Version })
		versions = append(versions, config)
		slices.SortFunc(versions, func(a, b admin.ConfigVersion) int { return cmp.Compare(b.Version, a.Version) })
		return s.showGrid(versions, historyGrid(versions))
	})
}

func historyGrid(versions []admin.ConfigVersion) *grid {
	g := &grid{heads: []string{"VERSION", "TIME", "AUTHOR", "HASH"}}
	for _, v := range versions {
		g.add(plain(strconv.FormatUint(v.Version, 10)), plain(v.Time.UTC().Format(time.RFC3339)),
			plain(v.Author), plain(v.Hash[:min(12, len(v.Hash))]))
	}
	return g
}

func newConfigRollbackCommand(env *environment) *cobra.Command {
	var expect uint64
	cmd := &cobra.Command{
		Use:   "rollback VERSION",
		Short: "Apply an earlier version again, as a new one",
		Args:  takes("the VERSION to go back to"),
	}
	cmd.Flags().Uint64Var(&expect, "expect-version", 0, "roll back only while version `N` is current")
	return onCluster(env, cmd, func(ctx context.Context, s *session, args []string) error {
		to, err := strconv.ParseUint(args[0], 10, 64)
		if err != nil || to == 0 {
			return usage("dsnode config history lists the versions", "%q is not a version number", args[0])
		}
		var only *uint64
		if cmd.Flags().Changed("expect-version") {
			only = &expect
		}
		after, err := s.RollbackConfig(ctx, to, only, "")
		if err != nil {
			return err
		}
		say(env.stderr, "done", fmt.Sprintf("version %d is the current configuration; it is the same as version %d", after.Version, to))
		return showChange(s, after)
	})
}
