package main

import (
	"context"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
)

// peer is a node, as runUntilSignal needs it.
type peer interface {
	// Run blocks until ctx ends, then drains and leaves.
	Run(ctx context.Context) error
	// Reload reads again what can change without a restart.
	Reload() error
}

// runUntilSignal runs p until SIGTERM or SIGINT, then lets it drain. A second signal
// ends the process at once. SIGHUP reloads; a reload that fails changes nothing.
func runUntilSignal(ctx context.Context, log *slog.Logger, p peer) error {
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	// After the first signal the default action is restored: the next one ends the process.
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
					log.LogAttrs(ctx, slog.LevelError, "reload failed, nothing was changed", slog.Any("err", err))
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
