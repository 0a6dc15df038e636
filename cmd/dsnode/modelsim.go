package main

import (
	"fmt"
	"log/slog"
	"net"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/dsnode/dsnode/node/modelsim"
)

// newModelsimCommand runs the model server that `dsnode dev` starts for each site. It
// is hidden, because it is for development and not part of a cluster.
func newModelsimCommand(env *environment) *cobra.Command {
	var listen string
	var o modelsim.Options
	cmd := &cobra.Command{
		Use:    "modelsim",
		Short:  "Run a simulated model server that can fail on command",
		Hidden: true,
		Args:   takes(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", listen)
			if err != nil {
				return usage("choose another address with --listen", "%w", err)
			}
			say(env.stderr, "modelsim", fmt.Sprintf("serving on http://%s/v1", listener.Addr()))
			o.Logger = slog.New(slog.NewJSONHandler(env.stderr, nil))
			return modelsim.New(o).Run(ctx, listener)
		},
	}
	f := cmd.Flags()
	f.StringVar(&listen, "listen", "127.0.0.1:8000", "`ADDRESS` to serve on; port 0 takes a free port")
	f.StringArrayVar(&o.Models, "model", nil, "a `MODEL` that exists; repeatable (default every name exists)")
	f.DurationVar(&o.FirstToken, "latency", 50*time.Millisecond, "`TIME` from the request to the first token")
	f.Float64Var(&o.Rate, "rate", 50, "`TOKENS` per second after the first; 0: all at once")
	f.IntVar(&o.Tokens, "tokens", 32, "`TOKENS` of an answer without max_tokens")
	return cmd
}
