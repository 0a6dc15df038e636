package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/dsnode/dsnode/node/admin"
)

const (
	// devHealthyWithin is how long dev waits before it says what is not well
	// and goes on: a real model server may be slow to come.
	devHealthyWithin = 20 * time.Second
	// devAnswerWithin is for the first node's admin port to open.
	devAnswerWithin = 10 * time.Second
	devPoll         = 100 * time.Millisecond
	// devStopWithin is for the nodes to drain and leave after SIGTERM; more
	// than shutdown.grace in their node.yaml.
	devStopWithin = 10 * time.Second
)

// devFlags are what the user said.
type devFlags struct {
	nodesPerSite int
	dataDir      string
	basePort     int
	config       string
	upstreams    []string
}

func newDevCommand(env *environment) *cobra.Command {
	var f devFlags
	cmd := &cobra.Command{
		Use:   "dev",
		Short: "Run three sites on this machine, to try things out",
		Long: `Run three sites on this machine: each node is a process of its own that you can
kill -9, with generated certificates and keys, and a simulated model server in
each site unless --upstream names real ones. Ctrl-C ends it all.

The same --data-dir again starts the same cluster.`,
		Example: `  dsnode dev
  dsnode dev --nodes-per-site 2 --data-dir ./cluster
  dsnode dev --upstream http://127.0.0.1:11434/v1,kind=ollama
  dsnode dev --upstream shanghai-a=http://gpu1:8000/v1,kind=vllm --upstream beijing=http://gpu2:8000/v1,kind=vllm
  dsnode dev --upstream https://api.deepseek.com/v1,kind=deepseek,key-env=DEEPSEEK_API_KEY`,
		Args: takes(),
		RunE: func(cmd *cobra.Command, _ []string) error { return runDev(cmd.Context(), env, f) },
	}
	cmd.Flags().IntVar(&f.nodesPerSite, "nodes-per-site", 1, "nodes in each site, 1 to 9")
	cmd.Flags().StringVar(&f.dataDir, "data-dir", "", "where the cluster lives (default a temporary folder, gone at the end)")
	cmd.Flags().IntVar(&f.basePort, "base-port", 8100, "first port; node n of site s has its api at P+100s+10(n-1)+1")
	cmd.Flags().StringVar(&f.config, "config", "", "cluster.yaml to start with instead of the generated one")
	cmd.Flags().StringArrayVar(&f.upstreams, "upstream", nil, "a real model server, [SITE=]URL[,kind=KIND][,key-env=NAME]; repeatable")
	return cmd
}

// runDev is the whole life of a dev cluster, in order.
func runDev(ctx context.Context, env *environment, f devFlags) (err error) {
	if ctx == nil {
		ctx = context.Background()
	}
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()

	exe, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find this program's own file: %w", err)
	}
	plan, err := makeDevPlan(ctx, env, f)
	if err != nil {
		return err
	}
	if err := plan.checkPorts(); err != nil {
		return err
	}
	if plan.temporary {
		if plan.dir, err = os.MkdirTemp("", "dsnode-dev-"); err != nil {
			return fmt.Errorf("make a temporary folder: %w", err)
		}
		// After a failure the logs in it are what one wants to read.
		defer func() {
			if err == nil {
				err = os.RemoveAll(plan.dir)
			}
		}()
	}
	if err := plan.writeFiles(); err != nil {
		return err
	}

	begun := time.Now()
	children := newDevChildren(exe, plan)
	defer func() {
		stop() // from now on a second Ctrl-C ends this process, and with it all children
		err = errors.Join(err, children.stopAll(devStopWithin))
	}()
	if err := children.startAll(); err != nil {
		return err
	}
	if err := env.writeRunningDev(runningDev{Admin: plan.adminURLs(), PID: os.Getpid(), DataDir: plan.dir}); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, env.removeRunningDev(os.Getpid())) }()

	client, err := admin.NewClient(plan.adminURLs(), admin.ClientOptions{Author: "dsnode dev", Timeout: 5 * time.Second})
	if err != nil {
		return fmt.Errorf("make an admin client: %w", err)
	}
	defer client.Close()
	if err := foundDev(ctx, plan, children); err != nil {
		return devEnded(ctx, err)
	}
	status, err := awaitDev(ctx, client, children)
	if err != nil {
		return devEnded(ctx, err)
	}
	plan.greet(env.stdout, exe, children, status, time.Since(begun))
	return watchDev(ctx, env, plan, exe, children)
}

// devEnded turns an end by Ctrl-C into none.
func devEnded(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// foundDev bootstraps the cluster through the first node, once in the life of
// its directory.
func foundDev(ctx context.Context, plan *devPlan, children *devChildren) error {
	if plan.founded() {
		return nil
	}
	first, err := admin.NewClient(plan.adminURLs()[:1], admin.ClientOptions{Author: "dsnode dev", Timeout: 10 * time.Second})
	if err != nil {
		return fmt.Errorf("make an admin client: %w", err)
	}
	defer first.Close()
	text, err := os.ReadFile(filepath.Join(plan.dir, "cluster.yaml"))
	if err != nil {
		return fmt.Errorf("read the cluster's configuration: %w", err)
	}
	deadline := time.Now().Add(devAnswerWithin)
	for {
		err := first.Bootstrap(ctx, text, "dsnode dev")
		if err == nil {
			return plan.setFounded()
		}
		if !errors.Is(err, admin.ErrUnreachable) || time.Now().After(deadline) {
			return children.explain(fmt.Errorf("bootstrap the cluster: %w", err))
		}
		if err := children.pause(ctx, devPoll); err != nil {
			return err
		}
	}
}

// awaitDev waits until the cluster is healthy. When that takes too long it
// gives the last status, which says why; only a cluster that can't be asked is
// an error.
func awaitDev(ctx context.Context, client *admin.Client, children *devChildren) (admin.Status, error) {
	deadline := time.Now().Add(devHealthyWithin)
	for {
		status, err := client.Status(ctx)
		if err == nil && (status.Healthy || time.Now().After(deadline)) {
			return status, nil
		}
		if err != nil && time.Now().After(deadline) {
			return status, children.explain(fmt.Errorf("ask the cluster how it is: %w", err))
		}
		if err := children.pause(ctx, devPoll); err != nil {
			return status, err
		}
	}
}

// watchDev says which children end, and how to bring them back, until Ctrl-C.
// It restarts nothing: whoever kills a node here wants to see what happens then.
func watchDev(ctx context.Context, env *environment, plan *devPlan, exe string, children *devChildren) error {
	for {
		select {
		case <-ctx.Done():
			_, err := fmt.Fprintln(env.stderr, "\nEnding all nodes and model servers …")
			return err
		case c := <-children.ended:
			_, err := fmt.Fprintf(env.stderr, "\n%s (pid %d) has ended: %s. Bring it back with\n  %s\n",
				c.title, c.pid, c.how, strings.Join(c.command(exe), " "))
			if err != nil {
				return err
			}
		}
	}
}
