package main

import (
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/dsnode/dsnode/node/admin"
)

func newUpstreamCommand(env *environment) *cobra.Command {
	return newGroup("upstream", "Model servers behind the cluster", newUpstreamListCommand(env))
}

func newUpstreamListCommand(env *environment) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the model servers, as the node that answers sees them",
		Args:  takes(),
	}
	return onCluster(env, cmd, func(ctx context.Context, s *session, _ []string) error {
		upstreams, err := s.Upstreams(ctx)
		if err != nil {
			return err
		}
		return show(env.stdout, s.output, upstreams, func(w io.Writer) error {
			return upstreamsGrid(upstreams).write(w, env.palette())
		})
	})
}

func upstreamsGrid(upstreams []admin.UpstreamInfo) *grid {
	g := &grid{heads: []string{"UPSTREAM", "SITE", "KIND", "STATE", "IN FLIGHT", "MODELS", "URL", "WHY"}}
	for _, u := range upstreams {
		g.add(plain(u.Name), plain(u.Site), plain(u.Kind), mood(string(u.State)),
			plain(fmt.Sprintf("%s/%d", number(u.InFlight), u.MaxConcurrency)),
			plain(strings.Join(u.Models, ",")), plain(u.URL), plain(u.Reason))
	}
	return g
}
