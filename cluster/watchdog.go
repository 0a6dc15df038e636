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

	"github.com/dsnode/dsnode/cluster/host"
	"github.com/dsnode/dsnode/storage/notify"
)

// diskWatchdog detects a disk that hangs. Raft can't: a leader whose StoreLogs does not
// return keeps sending heartbeats from other goroutines, and can't transfer leadership
// (hashicorp/raft #503, #666). So the watchdog writes and fsyncs a file on raft's disk each
// second, unless raft's store has synced meanwhile. After stallAfter it blocks raft's
// transport, so that the other nodes elect a leader; after exitAfter it ends the process,
// so that a supervisor restarts it.
type diskWatchdog struct {
	dir        string
	host       *host.Host
	writeEvery time.Duration
	stallAfter time.Duration
	exitAfter  time.Duration
	onStall    func(stalled bool)
	log        *slog.Logger
	write      func(path string) error // replaced in tests
	intact     func() error            // says that dir was deleted or replaced; nil: not asked
	gone       bool                    // intact said so; only writeLoop uses it
	syncs      func() uint64           // how often raft's store has synced; nil: unknown
	started    atomic.Int64            // Boottime of the write in progress, 0: none
	changed    chan struct{}           // notifies Run of a change of started
	checkEvery time.Duration
}

func newDiskWatchdog(dir string, host *host.Host, log *slog.Logger, syncs func() uint64, onStall func(bool)) *diskWatchdog {
	return &diskWatchdog{
		dir: dir, writeEvery: time.Second, stallAfter: 2 * time.Second, exitAfter: 10 * time.Second,
		checkEvery: 100 * time.Millisecond, changed: make(chan struct{}, 1), onStall: onStall, log: log, write: writeAndSync,
		syncs: syncs, host: host,
	}
}

// Run blocks until ctx ends, a write fails, or a write takes longer than exitAfter.
func (w *diskWatchdog) Run(ctx context.Context) error {
	failed := make(chan error, 1)
	// This goroutine may outlive Run: nothing can end a hanging fsync.
	go func() { failed <- w.writeLoop(ctx) }()
	tick := time.NewTicker(w.checkEvery)
	defer tick.Stop()
	tick.Stop() // it runs only while a write is in progress
	blocked := false
	// stuck is counted in ticks of this loop, not by the clock: after a process was
	// stopped for a minute, its disk is not stuck.
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
		case <-w.changed:
			stuck = 0
			if tick.Stop(); w.started.Load() != 0 {
				tick.Reset(w.checkEvery)
			}
		case <-tick.C:
			stuck += w.checkEvery
		}
		switch {
		case stuck > w.exitAfter:
			return fmt.Errorf("%w for %s: stopping so that the supervisor restarts this node or its machine", ErrDiskStalled, stuck.Round(time.Second))
		case stuck > w.stallAfter && !blocked:
			blocked = true
			w.log.Error("disk stalled: raft's transport is blocked so that another node becomes leader", "duration", stuck.Round(time.Millisecond))
			w.onStall(true)
		case stuck == 0 && blocked:
			blocked = false
			w.log.Warn("disk responds again: raft's transport is unblocked")
			w.onStall(false)
		}
	}
}

func (w *diskWatchdog) writeLoop(ctx context.Context) error {
	path := filepath.Join(w.dir, "watchdog")
	// The loop checks twice per writeEvery, so that a disk that hangs just after a sync
	// of raft's store is written to as soon as one without such syncs.
	tick := time.NewTicker(w.writeEvery / 2)
	defer tick.Stop()
	last, wrote := uint64(0), false
	for {
		now := uint64(0)
		if w.syncs != nil {
			now = w.syncs()
		}
		gone := w.isGone()
		if wrote = now == last && !wrote; wrote && !gone {
			if err := w.probe(path); err != nil {
				return err
			}
		}
		last = now
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// isGone reports whether the directory was deleted or replaced. Then there is nothing to
// write to: the open files still work, so requests are served and raft goes on.
func (w *diskWatchdog) isGone() bool {
	if w.intact == nil {
		return false
	}
	err := w.intact()
	switch {
	case err != nil && !w.gone:
		w.log.Error("the data directory is gone: this node takes no jobs until it is restarted with its directory", "dir", w.dir, "err", err)
	case err == nil && w.gone:
		w.log.Warn("the data directory is back", "dir", w.dir)
	}
	w.gone = err != nil
	return w.gone
}

func (w *diskWatchdog) probe(path string) error {
	w.setStarted(int64(w.host.Boottime()))
	var err error
	if before := w.host.BeforeWrite(host.WriteProbe); before != nil {
		err = before()
	}
	if err == nil {
		err = w.write(path)
	}
	w.setStarted(0)
	switch {
	case errors.Is(err, syscall.ENOSPC):
		// A full disk does not hang. Raft's store may still be able to write: it has
		// preallocated space, unlike this file.
		w.log.Error("disk full: free some space before raft can't write", "dir", w.dir)
	case err != nil && w.isGone(): // since the last look
	case err != nil:
		return fmt.Errorf("write to raft's disk: %w", err)
	}
	return nil
}

func (w *diskWatchdog) setStarted(started int64) {
	w.started.Store(started)
	notify.Wake(w.changed)
}

func writeAndSync(path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }() // Sync has reported any error
	if _, err := f.WriteString(time.Now().UTC().Format(time.RFC3339Nano)); err != nil {
		return err
	}
	return f.Sync()
}
