package cluster

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/dsnode/dsnode/cluster/clock"
)

// diskWatchdog notices a disk that hangs. raft can't: a leader whose StoreLogs
// never returns keeps sending heartbeats from other goroutines for ever and
// can't hand over (hashicorp/raft #503, #666). So a file on raft's disk is
// written and fsynced each second, unless raft's own store was; after stalled the
// transport is shut so that the others elect, after dead the process ends for its
// supervisor.
type diskWatchdog struct {
	dir      string
	every    time.Duration
	stalled  time.Duration
	dead     time.Duration
	onStall  func(stalled bool)
	log      *slog.Logger
	probe    func(path string) error // replaced in tests
	synced   func() uint64           // rises while others sync on this disk; nil: nobody does
	started  atomic.Int64            // Boottime of the write under way, 0: none
	moved    chan struct{}           // started has changed
	watching time.Duration
}

func newDiskWatchdog(dir string, log *slog.Logger, synced func() uint64, onStall func(bool)) *diskWatchdog {
	return &diskWatchdog{
		dir: dir, every: time.Second, stalled: 2 * time.Second, dead: 10 * time.Second,
		watching: 100 * time.Millisecond, moved: make(chan struct{}, 1), onStall: onStall, log: log, probe: writeAndSync,
		synced: synced,
	}
}

// Run blocks until ctx ends or the disk is dead.
func (w *diskWatchdog) Run(ctx context.Context) error {
	failed := make(chan error, 1)
	// Left behind when the disk hangs for ever: nothing can end a stuck fsync.
	go func() { failed <- w.writeLoop(ctx) }()
	tick := time.NewTicker(w.watching)
	defer tick.Stop()
	tick.Stop() // it turns only while a write is under way
	shut := false
	// A write counts as stuck by the watcher's own ticks, not by the clock: a
	// process that was stopped for a minute has no stuck disk.
	var stuck time.Duration
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-failed:
			if ctx.Err() != nil {
				return nil
			}
			return err
		case <-w.moved:
			stuck = 0
			if tick.Stop(); w.started.Load() != 0 {
				tick.Reset(w.watching)
			}
		case <-tick.C:
			stuck += w.watching
		}
		switch {
		case stuck > w.dead:
			return fmt.Errorf("%w for %s: stopping so that the supervisor restarts this node or its machine", ErrDiskStalled, stuck.Round(time.Second))
		case stuck > w.stalled && !shut:
			shut = true
			w.log.Error("disk stalled: raft's transport is shut so that another node leads", "for", stuck.Round(time.Millisecond))
			w.onStall(true)
		case stuck == 0 && shut:
			shut = false
			w.log.Warn("disk answers again: raft's transport is open")
			w.onStall(false)
		}
	}
}

func (w *diskWatchdog) writeLoop(ctx context.Context) error {
	path := filepath.Join(w.dir, "watchdog")
	// Looked twice as often as written, so that a disk that hangs right after
	// another's write was seen is tried as soon as one that nobody writes to.
	tick := time.NewTicker(w.every / 2)
	defer tick.Stop()
	seen, tried := uint64(0), false
	for {
		now := uint64(0)
		if w.synced != nil {
			now = w.synced()
		}
		if tried = now == seen && !tried; tried {
			if err := w.try(path); err != nil {
				return err
			}
		}
		seen = now
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

func (w *diskWatchdog) try(path string) error {
	w.move(int64(clock.Boottime()))
	err := w.probe(path)
	w.move(0)
	switch {
	case errors.Is(err, syscall.ENOSPC):
		// A full disk answers. Whether raft can still write is raft's store's
		// to find out; it has preallocated space that this file has not.
		w.log.Error("disk full: free some space before raft can't write", "dir", w.dir)
	case err != nil:
		return fmt.Errorf("write to raft's disk: %w", err)
	}
	return nil
}

func (w *diskWatchdog) move(started int64) {
	w.started.Store(started)
	select {
	case w.moved <- struct{}{}:
	default: // the watcher has yet to look
	}
}

func writeAndSync(path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }() // Sync already said what there is to say
	if _, err := f.WriteString(time.Now().UTC().Format(time.RFC3339Nano)); err != nil {
		return err
	}
	return f.Sync()
}
