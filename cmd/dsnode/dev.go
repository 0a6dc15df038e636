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
	// devHealthyWithin is how long dev waits for a healthy cluster. Then it prints what is
	// not healthy and goes on: a real model server may start slowly.
	devHealthyWithin = 20 * time.Second
	// devAnswerWithin is how long the first node's admin port may take to answer.
	devAnswerWithin = 10 * time.Second
	devPoll         = 100 * time.Millisecond
	// devStopWithin is how long nodes may take to drain and leave after SIGTERM. It is
	// longer than shutdown.grace in their node.yaml.
	devStopWithin = 10 * time.Second
)

// devFlags are the flags of dev.
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
		Short: "Run a cluster of three sites on this machine",
		Long: `Run a cluster of three sites on this machine. Each node is its own process, so
you can kill -9 it. Certificates and keys are generated. Each site has a
simulated model server, unless --upstream names real ones. Ctrl-C ends all
processes.

The same --data-dir starts the same cluster again.`,
		Example: `  dsnode dev
  dsnode dev --nodes-per-site 2 --data-dir ./cluster
  dsnode dev --upstream http://127.0.0.1:11434/v1,kind=ollama
  dsnode dev --upstream shanghai-a=http://gpu1:8000/v1,kind=vllm --upstream beijing=http://gpu2:8000/v1,kind=vllm
  dsnode dev --upstream https://api.deepseek.com/v1,kind=deepseek,key-env=DEEPSEEK_API_KEY`,
		Args: takes(),
		RunE: func(cmd *cobra.Command, _ []string) error { return runDev(cmd.Context(), env, f) },
	}
	cmd.Flags().IntVar(&f.nodesPerSite, "nodes-per-site", 1, "`N` nodes in each site, 1 to 9")
	cmd.Flags().StringVar(&f.dataDir, "data-dir", "", "`DIR` for the cluster's files (default a temporary folder, removed at the end)")
	cmd.Flags().IntVar(&f.basePort, "base-port", 8100, "first port `P`; node n of site s=0,1,2 has its api port at P+100s+10(n-1)+1")
	cmd.Flags().StringVar(&f.config, "config", "", "cluster.yaml `FILE` to start with instead of the generated one")
	cmd.Flags().StringArrayVar(&f.upstreams, "upstream", nil, "a real model server, `[SITE=]URL[,kind=KIND][,key-env=NAME]`; repeatable")
	return cmd
}

// runDev starts a dev cluster, prints what runs where, and ends it on Ctrl-C.
func runDev(ctx context.Context, env *environment, f devFlags) (err error) {
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
		// After a failure it stays, because the logs are in it.
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
		stop() // a second Ctrl-C ends this process at once, and with it all children
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
	plan.summarize(env.stdout, exe, children, status, time.Since(begun))
	return watchDev(ctx, env, exe, children)
}

// devEnded drops the error of a start that Ctrl-C ended.
func devEnded(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// foundDev bootstraps the cluster through its first node, once for each data
// directory.
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

// awaitDev waits until the cluster is healthy. When that takes too long it returns
// the last status, whose reasons say why. It is an error when no node answers.
func awaitDev(ctx context.Context, client *admin.Client, children *devChildren) (admin.Status, error) {
	deadline := time.Now().Add(devHealthyWithin)
	for {
		status, err := client.Status(ctx)
		if err == nil && (status.Healthy || time.Now().After(deadline)) {
			return status, nil
		}
		if err != nil && time.Now().After(deadline) {
			return status, children.explain(fmt.Errorf("read the status of the cluster: %w", err))
		}
		if err := children.pause(ctx, devPoll); err != nil {
			return status, err
		}
	}
}

// watchDev reports each child that ends, with the command that starts it again,
// until Ctrl-C. It restarts nothing by itself: a user who kills a node wants to see
// the consequences.
func watchDev(ctx context.Context, env *environment, exe string, children *devChildren) error {
	for {
		select {
		case <-ctx.Done():
			_, err := fmt.Fprintln(env.stderr, "\nStopping all nodes and model servers …")
			return err
		case c := <-children.ended:
			_, err := fmt.Fprintf(env.stderr, "\n%s (pid %d) has ended: %s. Start it again with\n  %s\n",
				c.title, c.pid, c.how, strings.Join(c.command(exe), " "))
			if err != nil {
				return err
			}
		}
	}
}
