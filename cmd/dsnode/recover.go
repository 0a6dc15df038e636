package main

import (
	"context"

	"github.com/spf13/cobra"
)

func newRecoverCommand(env *environment) *cobra.Command {
	return newGroup("recover", "Help a cluster that can't help itself", newRecoverReleaseCommand(env))
}

func newRecoverReleaseCommand(env *environment) *cobra.Command {
	var yes bool
	cmd := &cobra.Command{
		Use:   "release",
		Short: "Let a cluster that restarted cold go on without a missing site",
		Long: "Let a cluster that restarted cold go on without a missing site. A majority that was down as a whole\n" +
			"holds still until it has asked every site whether the cluster was recovered elsewhere meanwhile.\n" +
			"This is your word that it was not: with two clusters alive, both would act.",
		Args: takes(),
	}
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "don't ask")
	return onCluster(env, cmd, func(ctx context.Context, s *session, _ []string) error {
		if err := confirm(env, yes, "Was this cluster recovered nowhere else?"); err != nil {
			return err
		}
		if err := s.ReleaseQuarantine(ctx); err != nil {
			return err
		}
		say(env.stderr, "done", "the cluster goes on; dsnode status shows it")
		return nil
	})
}
