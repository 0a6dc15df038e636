package cluster

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync/atomic"

	"github.com/hashicorp/raft"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/cluster/host"
	"github.com/dsnode/dsnode/storage/notify"
)

// fsm applies committed entries to the agreed state and notifies waiters of changes.
// Readers load the state's pointer without a lock.
type fsm struct {
	log   *slog.Logger
	host  *host.Host
	fatal func(error) // called for an entry that this version does not support

	state   atomic.Pointer[agreed.State]
	applied atomic.Uint64 // raft index of the newest applied entry
	ticked  atomic.Int64  // Boottime of the newest applied tick from after logged, 0: none
	// logged is the last index of the log at the start. raft applies entries up to it
	// again, which says nothing about a leader. Set before raft starts.
	logged uint64
	tickAt atomic.Int64 // of any newest applied tick: the leader's wall clock, 0: none
	broken atomic.Bool  // after an entry that this version does not support
	// configured is the raft index of the newest configuration committed since the
	// start, 0 if there is none.
	configured atomic.Uint64

	sized atomic.Pointer[sizedState] // the newest result of size

	changed  notify.Broadcast // sent at each change of the state
	advanced notify.Broadcast // sent when an entry is applied
}

func newFSM(log *slog.Logger, host *host.Host, fatal func(error)) *fsm {
	f := &fsm{log: log, host: host, fatal: fatal}
	f.state.Store(agreed.NewState())
	return f
}

// Apply is raft's callback for each committed entry. It returns nil or the refusal.
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
		if l.Index > f.logged {
			f.ticked.Store(int64(f.host.Boottime()))
		}
		f.tickAt.Store(c.At.UnixNano())
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

// StoreConfiguration is raft's callback for each committed configuration, and the only
// way to get its index.
func (f *fsm) StoreConfiguration(index uint64, _ raft.Configuration) {
	f.configured.Store(index)
	f.advance(index)
}

var _ raft.ConfigurationStore = (*fsm)(nil)

func (f *fsm) stop(index uint64, err error) {
	f.broken.Store(true)
	f.fatal(fmt.Errorf("raft entry %d: %w", index, err))
}

// publish makes next the state that readers see. It parses the configuration, which
// agreed.Apply must not do: a parser may change between versions, so the results of
// Apply could differ between nodes.
func (f *fsm) publish(old, next *agreed.State) {
	next.Parsed = old.Parsed
	if next.Config.Text != old.Config.Text {
		cfg, err := config.Parse("cluster.yaml", []byte(next.Config.Text))
		if err != nil {
			f.log.Error("this version can't parse the agreed configuration; the previous one stays in effect",
				"version", next.Config.Version, "err", err)
		} else {
			next.Parsed = cfg
		}
	}
	f.state.Store(next)
	f.changed.Send()
}

// advance sets the applied index and wakes the waiters for it.
func (f *fsm) advance(index uint64) {
	f.applied.Store(index)
	f.advanced.Send()
}

type sizedState struct {
	state *agreed.State
	bytes int
}

// size is the size of the state as in a snapshot. The result is kept: the state changes
// seldom, and encoding 10,000 keys takes some 10 ms.
func (f *fsm) size() int {
	s := f.state.Load()
	if known := f.sized.Load(); known != nil && known.state == s {
		return known.bytes
	}
	b, err := s.Encode()
	if err != nil {
		f.log.Error("can't encode the agreed state", "err", err) // Persist fails too
	}
	f.sized.Store(&sizedState{s, len(b)})
	return len(b)
}

// Snapshot is raft's callback; the state is immutable, so it costs nothing.
func (f *fsm) Snapshot() (raft.FSMSnapshot, error) {
	return stateSnapshot{state: f.state.Load()}, nil
}

// maxStateBytes bounds a restore; the bounds in agreed/bounds.go keep the state below it.
const maxStateBytes = 64 << 20

// Restore is raft's callback with a snapshot, this node's or the leader's.
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

// Persist writes the state; the sink encrypts it.
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

// Release implements raft.FSMSnapshot.
func (s stateSnapshot) Release() {}
