package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"
)

func newCompletionCommand(env *environment) *cobra.Command {
	shells := []string{"bash", "zsh", "fish", "powershell"}
	return &cobra.Command{
		Use:       "completion " + strings.Join(shells, "|"),
		Short:     "Write a shell completion script to stdout",
		Example:   "  source <(dsnode completion bash)\n  dsnode completion zsh > \"${fpath[1]}/_dsnode\"\n  dsnode completion fish > ~/.config/fish/completions/dsnode.fish",
		Args:      takes("a SHELL (" + strings.Join(shells, ", ") + ")"),
		ValidArgs: shells,
		RunE: func(cmd *cobra.Command, args []string) error {
			root := cmd.Root()
			var err error
			switch args[0] {
			case "bash":
				err = root.GenBashCompletionV2(env.stdout, true)
			case "zsh":
				err = root.GenZshCompletion(env.stdout)
			case "fish":
				err = root.GenFishCompletion(env.stdout, true)
			case "powershell":
				err = root.GenPowerShellCompletionWithDesc(env.stdout)
			default:
				return usage("write one of "+strings.Join(shells, ", "), "there is no completion for %q", args[0])
			}
			if err != nil {
				return fmt.Errorf("write the script: %w", err)
			}
			return nil
		},
	}
}
