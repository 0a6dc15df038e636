package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/dsnode/dsnode/node/admin"
)

func newNodeCommand(env *environment) *cobra.Command {
	return newGroup("node", "Nodes of the cluster",
		newNodeListCommand(env),
		newNodeDrainCommand(env),
		newNodeResumeCommand(env),
		newNodeRemoveCommand(env),
	)
}

func newNodeListCommand(env *environment) *cobra.Command {
	cmd := &cobra.Command{Use: "list", Short: "List the nodes", Args: takes()}
	return onCluster(env, cmd, func(ctx context.Context, s *session, _ []string) error {
		status, err := s.Status(ctx)
		if err != nil {
			return err
		}
		nodes := status.Nodes
		if nodes == nil {
			nodes = []admin.NodeStatus{}
		}
		return show(env.stdout, s.output, nodes, func(w io.Writer) error {
			return nodesGrid(nodes, status.ObservedAt).write(w, env.palette())
		})
	})
}

// nodesGrid has the addresses that the status leaves out.
func nodesGrid(nodes []admin.NodeStatus, now time.Time) *grid {
	g := &grid{heads: []string{"NODE", "SITE", "STATE", "RAFT", "VERSION", "API", "ADMIN", "UP"}}
	for _, n := range nodes {
		g.add(plain(n.Name), plain(n.Site), nodeState(n), plain(raftPart(n)),
			plain(n.Version), plain(n.API), plain(n.Admin), plain(upFor(n, now)))
	}
	return g
}

func newNodeDrainCommand(env *environment) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "drain NODE",
		Short: "Let a node serve what it has and send new clients elsewhere",
		Long: "Take a node's readiness away, so that load balancers send new clients elsewhere. It goes on\n" +
			"serving who still comes. Only the node itself can do this: one of the admin URLs must be its own.",
		Args: takes("the NODE's name"),
	}
	return onCluster(env, cmd, func(ctx context.Context, s *session, args []string) error {
		if err := s.DrainNode(ctx, args[0]); err != nil {
			return whichNode(ctx, s, args[0], err)
		}
		say(env.stderr, "done", fmt.Sprintf("%s is draining; dsnode node resume %s takes it back", args[0], args[0]))
		return nil
	})
}

func newNodeResumeCommand(env *environment) *cobra.Command {
	cmd := &cobra.Command{Use: "resume NODE", Short: "End a drain", Args: takes("the NODE's name")}
	return onCluster(env, cmd, func(ctx context.Context, s *session, args []string) error {
		if err := s.ResumeNode(ctx, args[0]); err != nil {
			return whichNode(ctx, s, args[0], err)
		}
		say(env.stderr, "done", args[0]+" takes clients again")
		return nil
	})
}

func newNodeRemoveCommand(env *environment) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "remove NODE",
		Short: "Take a node that is gone for good out of the cluster",
		Long: "Take a node that is gone for good out of the cluster. A living node is not removed: stop it\n" +
			"first. A removed one needs an empty data directory to join again.",
		Args: takes("the NODE's name"),
	}
	return onCluster(env, cmd, func(ctx context.Context, s *session, args []string) error {
		if err := s.RemoveNode(ctx, args[0]); err != nil {
			return err
		}
		say(env.stderr, "done", args[0]+" is no longer a member")
		return nil
	})
}

// whichNode adds where the node itself can be asked, when somebody knows.
func whichNode(ctx context.Context, s *session, name string, err error) error {
	if !errors.Is(err, admin.ErrWrongNode) {
		return err
	}
	status, statusErr := s.Status(ctx)
	if statusErr != nil {
		return err // the first refusal says more
	}
	for _, n := range status.Nodes {
		if n.Name == name {
			return failure(fmt.Sprintf("add its own address to --admin; it says it is at %s", n.Admin),
				"none of the admin URLs is that of %s: %w", name, err)
		}
	}
	return failure("dsnode node list shows the names", "there is no node %q", name)
}
