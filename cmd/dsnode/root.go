package main

import (
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"
)

// run executes the command that args name and returns the exit code.
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
		// An error before the command started is an error in the arguments.
		err = usage(fmt.Sprintf("see %s --help", cmd.CommandPath()), "%w", err)
	}
	return report(env.stderr, err)
}

// noteStart makes each command of the tree set started when it begins to run.
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

// newRootCommand builds the command tree, one line for each command.
func newRootCommand(env *environment) *cobra.Command {
	root := newGroup("dsnode", "A gateway for model servers that survives the loss of a data centre",
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
	root.Long = root.Short + ".\n\nThe same binary runs in every site. To try it out, dsnode dev runs three sites on this machine."
	root.SilenceErrors = true
	root.SilenceUsage = true
	root.CompletionOptions.DisableDefaultCmd = true
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usage(fmt.Sprintf("see %s --help", cmd.CommandPath()), "%w", err)
	})
	return root
}

// newGroup makes a command that only has subcommands.
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

// takes checks that a command gets exactly the named arguments.
func takes(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		see := fmt.Sprintf("see %s --help", cmd.CommandPath())
		switch {
		case len(args) < len(names):
			return usage(see, "%s needs %s", cmd.CommandPath(), strings.Join(names[len(args):], " and "))
		case len(args) > len(names) && len(names) == 0:
			return usage(see, "%s takes no arguments, but got %q", cmd.CommandPath(), args[0])
		case len(args) > len(names):
			return usage(see, "%s takes only %s, but got %q too", cmd.CommandPath(), strings.Join(names, " and "), args[len(names)])
		}
		return nil
	}
}

// emit writes data to stdout. When stdout is closed the command fails.
func emit(w io.Writer, format string, args ...any) error {
	if _, err := fmt.Fprintf(w, format, args...); err != nil {
		return fmt.Errorf("write the answer: %w", err)
	}
	return nil
}
