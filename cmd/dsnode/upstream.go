package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/dsnode/dsnode/node/admin"
)

func newUpstreamCommand(env *environment) *cobra.Command {
	return newGroup("upstream", "List and drain the model servers",
		newUpstreamListCommand(env), newUpstreamDrainCommand(env), newUpstreamResumeCommand(env))
}

func newUpstreamDrainCommand(env *environment) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "drain NAME",
		Short: "Send a model server no new requests",
		Long: "Send a model server no new requests, from any node, until dsnode upstream resume. Running requests finish;\n" +
			"dsnode upstream list shows how many are left.",
		Args: takes("the upstream's NAME"),
	}
	return onCluster(env, cmd, func(ctx context.Context, s *session, args []string) error {
		return s.done(s.DrainUpstream(ctx, args[0], ""), "%s gets no new requests; dsnode upstream resume %s ends the drain", args[0], args[0])
	})
}

func newUpstreamResumeCommand(env *environment) *cobra.Command {
	cmd := &cobra.Command{Use: "resume NAME", Short: "End the drain of a model server", Args: takes("the upstream's NAME")}
	return onCluster(env, cmd, func(ctx context.Context, s *session, args []string) error {
		return s.done(s.ResumeUpstream(ctx, args[0], ""), "%s gets requests again", args[0])
	})
}

func newUpstreamListCommand(env *environment) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the model servers and their state",
		Long: "List the model servers with their state, as the node that answers sees them. IN FLIGHT counts the requests\n" +
			"of that node; - is an unknown value.",
		Args: takes(),
	}
	return onCluster(env, cmd, func(ctx context.Context, s *session, _ []string) error {
		upstreams, err := s.Upstreams(ctx)
		if err != nil {
			return err
		}
		return s.showGrid(upstreams, upstreamsGrid(upstreams))
	})
}

func upstreamsGrid(upstreams []admin.UpstreamInfo) *grid {
	g := &grid{heads: []string{"UPSTREAM", "SITE", "KIND", "STATE", "IN FLIGHT", "MODELS", "URL", "WHY"}}
	for _, u := range upstreams {
		most := u.MaxConcurrency
		if len(u.Instances) > 0 {
			most *= len(u.Instances)
		}
		g.add(plain(u.Name), plain(u.Site), plain(u.Kind), upstreamCell(u.State, u.Drained),
			plain(fmt.Sprintf("%s/%d", number(u.InFlight), most)),
			plain(strings.Join(u.Models, ",")), plain(u.URL), plain(u.Reason))
		for _, i := range u.Instances {
			g.add(plain("  "+i.Address), plain(""), plain(""), upstreamCell(i.State, false),
				plain(fmt.Sprintf("%d/%d", i.InFlight, u.MaxConcurrency)), plain(""), plain(""), plain(i.Reason))
		}
	}
	return g
}

func upstreamCell(s admin.UpstreamState, drained bool) cell {
	if drained {
		return cell{string(s) + ", drained", yellow}
	}
	return stateCell(string(s))
}
