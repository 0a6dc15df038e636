package main

import (
	"context"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
)

// peer is a node that can be run.
type peer interface {
	// Run blocks until ctx ends, then drains and leaves.
	Run(ctx context.Context) error
	// Reload takes in what of node.yaml can change without a restart.
	Reload() error
}

// runUntilSignal runs p until SIGTERM or SIGINT, which lets it drain; a second
// one ends the process at once. SIGHUP reloads, and a reload that fails leaves
// everything as it was.
func runUntilSignal(ctx context.Context, log *slog.Logger, p peer) error {
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	// From the first signal on, the next one does what it does to any process.
	defer context.AfterFunc(ctx, stop)()

	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	defer signal.Stop(hup)
	running, ended := context.WithCancel(ctx)
	reloads := make(chan struct{})
	go func() {
		defer close(reloads)
		for {
			select {
			case <-running.Done():
				return
			case <-hup:
				if err := p.Reload(); err != nil {
					log.LogAttrs(ctx, slog.LevelError, "reload refused, all is as it was", slog.Any("error", err))
					continue
				}
				log.LogAttrs(ctx, slog.LevelInfo, "reloaded")
			}
		}
	}()
	err := p.Run(ctx)
	ended()
	<-reloads
	return err
}
