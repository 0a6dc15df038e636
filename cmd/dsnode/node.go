package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/dsnode/dsnode/node/admin"
)

func newNodeCommand(env *environment) *cobra.Command {
	return newGroup("node", "List, drain and remove nodes",
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
		return s.showGrid(nodes, nodesGrid(nodes, status.ObservedAt))
	})
}

// nodesGrid shows the nodes' addresses, which the status leaves out.
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
		Short: "Make load balancers send no more clients to a node",
		Long: "Make a node answer 503 at /healthz/ready, so that load balancers send new clients to other nodes. The\n" +
			"node still serves the requests that it gets. Only the node itself can do this: one of the admin URLs\n" +
			"must be its own.",
		Args: takes("the NODE's name"),
	}
	return onCluster(env, cmd, func(ctx context.Context, s *session, args []string) error {
		err := s.DrainNode(ctx, args[0])
		return s.done(whichNode(ctx, s, args[0], err), "%s is draining; dsnode node resume %s ends the drain", args[0], args[0])
	})
}

func newNodeResumeCommand(env *environment) *cobra.Command {
	cmd := &cobra.Command{Use: "resume NODE", Short: "End the drain of a node", Args: takes("the NODE's name")}
	return onCluster(env, cmd, func(ctx context.Context, s *session, args []string) error {
		err := s.ResumeNode(ctx, args[0])
		return s.done(whichNode(ctx, s, args[0], err), "%s is ready for clients again", args[0])
	})
}

func newNodeRemoveCommand(env *environment) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "remove NODE",
		Short: "Remove a node that will not come back",
		Long: "Remove a node that will not come back from the cluster; other nodes take over its jobs. A node that is\n" +
			"alive is not removed: stop it first. A removed node needs an empty data directory to join again.",
		Args: takes("the NODE's name"),
	}
	return onCluster(env, cmd, func(ctx context.Context, s *session, args []string) error {
		warnOfMissingJobs(ctx, s, args[0])
		return s.done(s.RemoveNode(ctx, args[0]), "%s is no longer a member", args[0])
	})
}

// warnOfMissingJobs says which nodes may not have received the jobs of a node that is about
// to be removed.
func warnOfMissingJobs(ctx context.Context, s *session, removed string) {
	status, err := s.Status(ctx)
	if err != nil {
		return // the removal fails too, or says more
	}
	for _, n := range status.Nodes {
		if n.Name != removed && n.JobsMissing != "" {
			say(s.env.stderr, "warning", fmt.Sprintf("jobs that only %s and %s had may be lost: node %s: %s", removed, n.Name, n.Name, n.JobsMissing))
		}
	}
}

// whichNode adds the node's own admin address to ErrWrongNode, when it is known.
func whichNode(ctx context.Context, s *session, name string, err error) error {
	if !errors.Is(err, admin.ErrWrongNode) {
		return err
	}
	status, statusErr := s.Status(ctx)
	if statusErr != nil {
		return err // it says more than statusErr
	}
	for _, n := range status.Nodes {
		if n.Name == name {
			return failure(fmt.Sprintf("add the node's admin address to --admin; it reports %s", n.Admin),
				"none of the admin URLs is the address of %s: %w", name, err)
		}
	}
	return failure("dsnode node list shows the names", "there is no node %q", name)
}
