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
	return newGroup("upstream", "Model servers behind the cluster",
		newUpstreamListCommand(env), newUpstreamDrainCommand(env), newUpstreamResumeCommand(env))
}

func newUpstreamDrainCommand(env *environment) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "drain NAME",
		Short: "Send a model server no new request",
		Long: "Send a model server no new request, from any node, until dsnode upstream resume. What runs there finishes:\n" +
			"dsnode upstream list shows how much is left.",
		Args: takes("the upstream's NAME"),
	}
	return onCluster(env, cmd, func(ctx context.Context, s *session, args []string) error {
		if err := s.DrainUpstream(ctx, args[0], ""); err != nil {
			return err
		}
		say(env.stderr, "done", fmt.Sprintf("%s gets no new request; dsnode upstream resume %s takes it back", args[0], args[0]))
		return nil
	})
}

func newUpstreamResumeCommand(env *environment) *cobra.Command {
	cmd := &cobra.Command{Use: "resume NAME", Short: "End a drain", Args: takes("the upstream's NAME")}
	return onCluster(env, cmd, func(ctx context.Context, s *session, args []string) error {
		if err := s.ResumeUpstream(ctx, args[0], ""); err != nil {
			return err
		}
		say(env.stderr, "done", args[0]+" is asked again")
		return nil
	})
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
		room := u.MaxConcurrency
		if len(u.Instances) > 0 {
			room *= len(u.Instances)
		}
		g.add(plain(u.Name), plain(u.Site), plain(u.Kind), upstreamMood(u.State, u.Drained),
			plain(fmt.Sprintf("%s/%d", number(u.InFlight), room)),
			plain(strings.Join(u.Models, ",")), plain(u.URL), plain(u.Reason))
		for _, i := range u.Instances {
			g.add(plain("  "+i.Address), plain(""), plain(""), upstreamMood(i.State, false),
				plain(fmt.Sprintf("%d/%d", i.InFlight, u.MaxConcurrency)), plain(""), plain(""), plain(i.Reason))
		}
	}
	return g
}

func upstreamMood(s admin.UpstreamState, drained bool) cell {
	if drained {
		return cell{string(s) + ", drained", yellow}
	}
	return mood(string(s))
}
