package main

import (
	"context"

	"github.com/spf13/cobra"
)

func newBootstrapCommand(env *environment) *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:   "bootstrap --config cluster.yaml",
		Short: "Start a new cluster, once, through its first node",
		Long: "Start a new cluster with this configuration. Run it once, against the first node; the other\n" +
			"nodes join by themselves through their seeds. Repeating it with the same file changes nothing.",
		Example: "  dsnode bootstrap --config cluster.yaml --admin http://127.0.0.1:8081",
		Args:    takes(),
	}
	cmd.Flags().StringVar(&file, "config", "", "the cluster's configuration `FILE`, a cluster.yaml (required)")
	return onCluster(env, cmd, func(ctx context.Context, s *session, _ []string) error {
		if file == "" {
			return usage("deploy/cluster.yaml is an example", "bootstrap needs --config cluster.yaml")
		}
		text, err := readClusterConfig(env, file)
		if err != nil {
			return err
		}
		return s.done(s.Bootstrap(ctx, text, ""), "the cluster is bootstrapped; dsnode status shows it, dsnode apikey create makes the first client key")
	})
}
