package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime/debug"

	"github.com/spf13/cobra"

	"github.com/dsnode/dsnode/node"
)

func newRunCommand(env *environment) *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:   "run --config node.yaml",
		Short: "Run one node in the foreground",
		Long: "Run one node in the foreground. It writes its log to stderr, as JSON.\n\n" +
			"On SIGTERM or Ctrl-C the node stops being ready, finishes the running requests and leaves the\n" +
			"cluster; a second signal ends it at once. On SIGHUP it reloads its certificates.\n\n" +
			"Before an upgrade that may have to be undone, write feature_level: 1 into the node.yaml of all nodes;\n" +
			"dsnode status names the nodes that hold the cluster's feature level.",
		Args: takes(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if file == "" {
				return usage("deploy/node.yaml is an example", "run needs --config node.yaml")
			}
			return runNode(cmd.Context(), env, file)
		},
	}
	cmd.Flags().StringVar(&file, "config", "", "the node's configuration `FILE`, a node.yaml (required)")
	return cmd
}

func runNode(ctx context.Context, env *environment, file string) error {
	config, err := node.LoadConfig(file)
	if err != nil {
		return badFile(file, err)
	}
	var level slog.Level
	if err := level.UnmarshalText([]byte(config.Log.Level)); err != nil {
		return failure("write debug, info, warn or error", "%s: log.level: %w", file, err)
	}
	if limit, known := node.MemoryLimit(os.DirFS("/")); known && env.getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(limit)
	}
	log := slog.New(slog.NewJSONHandler(env.stderr, &slog.HandlerOptions{Level: level}))
	n, err := node.New(config, node.Options{Logger: log, Version: env.version})
	if err != nil {
		return fmt.Errorf("start node %s: %w", config.Name, err)
	}
	err = runUntilSignal(ctx, log, n)
	if errors.Is(err, node.ErrRemoved) {
		return failure(fmt.Sprintf("to use its data again, run dsnode node admit %s at a member, then start it; to start anew, empty its data directory first", config.Name),
			"run node %s: %w", config.Name, err)
	}
	if err != nil {
		return fmt.Errorf("run node %s: %w", config.Name, err)
	}
	return nil
}
