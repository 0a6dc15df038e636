//go:build linux

// Bench compares dsnode with other proxies in front of a model server: nginx, and a
// tuned Go reverse proxy that only forwards. All of them run on this machine in front of
// the same upstream and are measured in turn, so that only figures of the same round
// are compared.
//
//	go run ./test/bench                     # five rounds, about five minutes
//	go run ./test/bench -pairs 1 -what cpu  # one figure, quickly
//	go run ./test/bench soak -for 10m       # clients that disconnect, then a search for leaks
//	go run ./test/bench jobs                # durable jobs, compared with a RabbitMQ quorum queue
//	go run ./test/bench idle                # what three nodes with a million finished jobs use without requests
//	go run ./test/bench cache               # cache hits, compared with nginx's proxy_cache keyed by body
//	go run ./test/bench cache churn         # hits while new answers of ten times the cache's size are stored
//
// Start reading at compare (compare.go) and at soak (soak.go).
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	switch {
	case errors.Is(err, flag.ErrHelp):
	case errors.Is(err, errUsage):
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(2)
	case err != nil:
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

var errUsage = errors.New("wrong usage")

// run executes the command line. A figure that misses its target is no error; a failed
// measurement or a leak is.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	if len(args) > 0 {
		switch args[0] {
		case childUpstream:
			return runUpstream(ctx)
		case childReverseProxy:
			return runReverseProxy(ctx, args[1:])
		case "soak":
			return runSoak(ctx, args[1:], stdout, stderr)
		case "cache":
			if len(args) > 1 && args[1] == "churn" {
				return runChurn(ctx, args[2:], stdout, stderr)
			}
			return runCache(ctx, args[1:], stdout, stderr)
		case "jobs":
			return runJobs(ctx, args[1:], stdout, stderr)
		case "idle":
			return runIdle(ctx, args[1:], stdout, stderr)
		}
	}
	return runCompare(ctx, args, stdout, stderr)
}

// parse reads flags. Errors wrap errUsage.
func parse(flags *flag.FlagSet, args []string) error {
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return err
		}
		return fmt.Errorf("%w: %w", errUsage, err)
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("%w: %q is not a flag", errUsage, flags.Arg(0))
	}
	return nil
}
