package cluster

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"

	"github.com/hashicorp/raft"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/clock"
	"github.com/dsnode/dsnode/cluster/config"
)

// fsm holds the agreed state and tells who waits that it changed. Readers take
// the pointer and never a lock.
type fsm struct {
	log   *slog.Logger
	fatal func(error) // an entry this version can't understand

	state   atomic.Pointer[agreed.State]
	applied atomic.Uint64 // raft index of the newest applied entry
	ticked  atomic.Int64  // Boottime of the newest applied tick, 0: none since start
	broken  atomic.Bool
	// configured is the raft index of the newest committed configuration, 0
	// before one was committed since the start.
	configured atomic.Uint64

	mu      sync.Mutex // guards changed, moved
	changed chan struct{}
	moved   chan struct{}
}

func newFSM(log *slog.Logger, fatal func(error)) *fsm {
	f := &fsm{log: log, fatal: fatal, changed: make(chan struct{}), moved: make(chan struct{})}
	f.state.Store(agreed.NewState())
	return f
}

// Apply is raft's callback for each committed entry; its answer is nil or the
// refusal.
func (f *fsm) Apply(l *raft.Log) any {
	defer f.advance(l.Index)
	if f.broken.Load() {
		return agreed.ErrUnknownCommand
	}
	c, err := agreed.DecodeCommand(l.Data)
	if err != nil {
		f.stop(l.Index, err)
		return err
	}
	if c.Type == agreed.CmdTick {
		f.ticked.Store(int64(clock.Boottime()))
		return nil
	}
	c.Term, c.Index = l.Term, l.Index
	old := f.state.Load()
	next, err := agreed.Apply(old, c)
	if errors.Is(err, agreed.ErrUnknownCommand) {
		f.stop(l.Index, err)
		return err
	}
	if next != old {
		f.publish(old, next)
	}
	if err != nil {
		return err
	}
	return nil
}

// StoreConfiguration is raft's callback for each committed configuration: the
// only way to its index.
func (f *fsm) StoreConfiguration(index uint64, _ raft.Configuration) {
	f.configured.Store(index)
	f.advance(index)
}

var _ raft.ConfigurationStore = (*fsm)(nil)

func (f *fsm) stop(index uint64, err error) {
	f.broken.Store(true)
	f.fatal(fmt.Errorf("raft entry %d: %w", index, err))
}

// publish makes next the state that readers see. The parsed configuration is
// derived here, outside Apply: a parser may change between versions, the agreed
// text may not.
func (f *fsm) publish(old, next *agreed.State) {
	next.Parsed = old.Parsed
	if next.Config.Text != old.Config.Text {
		cfg, err := config.Parse("cluster.yaml", []byte(next.Config.Text))
		if err != nil {
			f.log.Error("the agreed configuration can't be read by this version; the one before stays in force",
				"version", next.Config.Version, "err", err)
		} else {
			next.Parsed = cfg
		}
	}
	f.state.Store(next)
	f.mu.Lock()
	close(f.changed)
	f.changed = make(chan struct{})
	f.mu.Unlock()
}

// advance wakes those who wait for an index.
func (f *fsm) advance(index uint64) {
	f.applied.Store(index)
	f.mu.Lock()
	close(f.moved)
	f.moved = make(chan struct{})
	f.mu.Unlock()
}

// watch gives a channel that closes at the next change of the state.
func (f *fsm) watch() <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.changed
}

// movement gives a channel that closes when the next entry is applied.
func (f *fsm) movement() <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.moved
}

// Snapshot is raft's callback; the state is immutable, so it costs nothing.
func (f *fsm) Snapshot() (raft.FSMSnapshot, error) {
	return stateSnapshot{state: f.state.Load()}, nil
}

// maxStateBytes bounds a restore: far above what the bounds in apply.go allow.
const maxStateBytes = 64 << 20

// Restore is raft's callback with a snapshot, our own or the leader's.
func (f *fsm) Restore(r io.ReadCloser) error {
	defer func() { _ = r.Close() }() // read only; nothing to lose
	b, err := io.ReadAll(io.LimitReader(r, maxStateBytes+1))
	if err != nil {
		return fmt.Errorf("read snapshot: %w", err)
	}
	if len(b) > maxStateBytes {
		return fmt.Errorf("read snapshot: %w: over %d bytes", agreed.ErrStateFull, maxStateBytes)
	}
	s, err := agreed.DecodeState(b)
	if err != nil {
		if errors.Is(err, agreed.ErrUnknownCommand) {
			f.stop(0, err)
		}
		return err
	}
	f.publish(&agreed.State{Parsed: f.state.Load().Parsed}, s)
	return nil
}

type stateSnapshot struct{ state *agreed.State }

// Persist writes the state; the sink seals it.
func (s stateSnapshot) Persist(sink raft.SnapshotSink) error {
	b, err := s.state.Encode()
	if err == nil {
		_, err = sink.Write(b)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("write snapshot: %w", err), sink.Cancel())
	}
	return sink.Close()
}

// Release has nothing to release.
func (s stateSnapshot) Release() {}
