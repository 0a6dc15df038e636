package main

import (
	"context"

	"github.com/spf13/cobra"
)

func newRecoverCommand(env *environment) *cobra.Command {
	return newGroup("recover", "Recover a cluster that needs an operator", newRecoverReleaseCommand(env))
}

func newRecoverReleaseCommand(env *environment) *cobra.Command {
	var yes bool
	cmd := &cobra.Command{
		Use:   "release",
		Short: "End the quarantine of a cluster that restarted with a site missing",
		Long: "End the quarantine of a cluster that restarted with a site missing. When a majority of the voters was down at\n" +
			"the same time, the cluster makes no change until it has asked every site whether the cluster was recovered\n" +
			"elsewhere meanwhile. With this command you confirm that it was not. If it was, two clusters are alive and\n" +
			"both act.",
		Args: takes(),
	}
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "don't ask for a confirmation")
	return onCluster(env, cmd, func(ctx context.Context, s *session, _ []string) error {
		if err := confirm(env, yes, "Do you confirm that this cluster was not recovered elsewhere?"); err != nil {
			return err
		}
		return s.done(s.ReleaseQuarantine(ctx), "the quarantine has ended; dsnode status shows the cluster")
	})
}
