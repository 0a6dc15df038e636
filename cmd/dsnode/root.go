package main

import (
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"
)

// run is the program: it carries out args and gives the exit code.
func run(args []string, env *environment) int {
	root := newRootCommand(env)
	root.SetArgs(args)
	root.SetIn(env.stdin)
	root.SetOut(env.stdout)
	root.SetErr(env.stderr)

	started := false
	noteStart(root, &started)
	cmd, err := root.ExecuteC()
	var exit *exitError
	if err != nil && !started && !errors.As(err, &exit) {
		// Whatever fails before a command starts was written wrongly.
		err = usage(fmt.Sprintf("see %s --help", cmd.CommandPath()), "%w", err)
	}
	return report(env.stderr, err)
}

// noteStart makes every command of the tree set started when it begins.
func noteStart(cmd *cobra.Command, started *bool) {
	if begin := cmd.RunE; begin != nil {
		cmd.RunE = func(cmd *cobra.Command, args []string) error {
			*started = true
			return begin(cmd, args)
		}
	}
	for _, sub := range cmd.Commands() {
		noteStart(sub, started)
	}
}

// newRootCommand is the whole command line, one line a command.
func newRootCommand(env *environment) *cobra.Command {
	root := newGroup("dsnode", "A gateway to your model servers that survives the loss of a data centre",
		newDevCommand(env),
		newRunCommand(env),
		newBootstrapCommand(env),
		newStatusCommand(env),
		newNodeCommand(env),
		newUpstreamCommand(env),
		newConfigCommand(env),
		newFailoverCommand(env),
		newDrillCommand(env),
		newRecoverCommand(env),
		newJobCommand(env),
		newCacheCommand(env),
		newAPIKeyCommand(env),
		newKeyringCommand(env),
		newTLSCommand(env),
		newModelsimCommand(env),
		newVersionCommand(env),
		newCompletionCommand(env),
	)
	root.Long = root.Short + ".\n\nOne static binary runs in every site. dsnode dev shows three of them on this machine."
	root.SilenceErrors = true
	root.SilenceUsage = true
	root.CompletionOptions.DisableDefaultCmd = true
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usage(fmt.Sprintf("see %s --help", cmd.CommandPath()), "%w", err)
	})
	return root
}

// newGroup is a command that only has others below it.
func newGroup(use, short string, subs ...*cobra.Command) *cobra.Command {
	group := &cobra.Command{
		Use: use, Short: short, Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			see := fmt.Sprintf("see %s --help", cmd.CommandPath())
			if len(args) == 0 {
				return usage(see, "%s needs a command: %s", cmd.CommandPath(), strings.Join(names(cmd), ", "))
			}
			if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
				see = fmt.Sprintf("did you mean %s %s?", cmd.CommandPath(), near[0])
			}
			return usage(see, "%s has no command %q", cmd.CommandPath(), args[0])
		},
	}
	group.SuggestionsMinimumDistance = 2
	group.AddCommand(subs...)
	return group
}

func names(cmd *cobra.Command) []string {
	var all []string
	for _, sub := range cmd.Commands() {
		if sub.IsAvailableCommand() {
			all = append(all, sub.Name())
		}
	}
	return all
}

// takes is the check for a command with exactly these arguments.
func takes(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		see := fmt.Sprintf("see %s --help", cmd.CommandPath())
		switch {
		case len(args) < len(names):
			return usage(see, "%s needs %s", cmd.CommandPath(), strings.Join(names[len(args):], " and "))
		case len(args) > len(names) && len(names) == 0:
			return usage(see, "%s takes no arguments, but got %q", cmd.CommandPath(), args[0])
		case len(args) > len(names):
			return usage(see, "%s takes %s alone, but got %q too", cmd.CommandPath(), strings.Join(names, " and "), args[len(names)])
		}
		return nil
	}
}

// emit writes data to stdout. A stdout that has gone is the command's failure.
func emit(w io.Writer, format string, args ...any) error {
	if _, err := fmt.Fprintf(w, format, args...); err != nil {
		return fmt.Errorf("write the answer: %w", err)
	}
	return nil
}
