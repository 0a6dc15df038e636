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
	return newGroup("node", "List, drain and remove nodes",
		newNodeListCommand(env),
		newNodeDrainCommand(env),
		newNodeResumeCommand(env),
		newNodeRemoveCommand(env),
		newNodeAdmitCommand(env),
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
	var r admin.RemovalRequest
	var plan, yes bool
	cmd := &cobra.Command{
		Use:   "remove NODE",
		Short: "Remove a node that will not come back",
		Long: "Remove a node that will not come back from the cluster; other nodes take over its jobs. First the command\n" +
			"says what only this node has. If that is anything, or unknown, it needs --accept-loss. A node that is\n" +
			"alive is removed only with --force; it learns of it from any member, and ends itself.\n\n" +
			"A removed node refuses to start. It joins again with an empty data directory, or, after dsnode node\n" +
			"admit, with the data that it has.",
		Example: "  dsnode node remove shanghai-b-2 --plan\n  dsnode node remove shanghai-b-2 --accept-loss",
		Args:    takes("the NODE's name"),
	}
	f := cmd.Flags()
	f.BoolVar(&r.AcceptLoss, "accept-loss", false, "go on although only this node has, or may have, some records")
	f.BoolVar(&r.Force, "force", false, "remove it also while it is alive")
	f.BoolVar(&plan, "plan", false, "only show what would be lost; exit code 1: it is something, or unknown")
	f.BoolVarP(&yes, "yes", "y", false, "don't ask for a confirmation")
	return onCluster(env, cmd, func(ctx context.Context, s *session, args []string) error {
		r.Node = args[0]
		p, err := s.PlanRemoval(ctx, r.Node)
		switch {
		case errors.Is(err, admin.ErrNoRoute): // an older node, which removes without a plan
		case err != nil:
			return err
		case plan:
			return showRemoval(s, p)
		default:
			say(s.env.stderr, "plan", removalText(p))
			warnOfMissingJobs(ctx, s, r.Node)
			if err := confirm(env, yes, fmt.Sprintf("Remove %s now?", printable(r.Node))); err != nil {
				return err
			}
		}
		return s.done(s.RemoveNode(ctx, r, ""), "%s is no longer a member; dsnode node admit %s lets it come back with its data", r.Node, r.Node)
	})
}

func showRemoval(s *session, p admin.RemovalPlan) error {
	err := s.show(p, func(w io.Writer) error { return emit(w, "%s\n", printable(removalText(p))) })
	if err == nil && p.Loses != "" {
		return quietly(exitFailed)
	}
	return err
}

// removalText says what is lost with a node. What it did since it was last heard is never
// known.
func removalText(p admin.RemovalPlan) string {
	heard := "was never heard by the node that answers"
	if p.LastHeardSeconds != nil {
		heard = fmt.Sprintf("was last heard %s ago", secondsText(p.LastHeardSeconds))
	}
	text := fmt.Sprintf("%s of site %s is %s and %s.", p.Node, p.Site, p.State, heard)
	if p.Loses != "" {
		return text + " With it is lost: " + p.Loses + "."
	}
	return text + " Until then other nodes had all its records; what it accepted alone since then is not known."
}

func newNodeAdmitCommand(env *environment) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "admit NODE",
		Short: "Let a node join that waits for it, or a removed one again with its data",
		Long: "With access.join: approve a new node waits for this word; dsnode status names it.\n\n" +
			"Let a removed node join again with its data directory, for example because it has jobs that no other node\n" +
			"has. Start the node afterwards: it joins as a member, other nodes get its records, and its unfinished jobs\n" +
			"run. It should come back within jobs.retention, because jobs that the others have forgotten by then may run\n" +
			"again, and before dsnode keyring rotate drops the keys of its records.",
		Args: takes("the NODE's name"),
	}
	return onCluster(env, cmd, func(ctx context.Context, s *session, args []string) error {
		return s.done(s.AdmitNode(ctx, args[0], ""), "%s may join again with its data: start it now", args[0])
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
