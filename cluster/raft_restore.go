package cluster

import (
	"fmt"

	"github.com/hashicorp/raft"
)

// restoredLog works around a bug of raft v1.8.0. NewRaft first applies the entries that
// the store reports as committed, and then searches only the later entries for raft's
// configuration. If the newest configuration is among the committed entries, raft starts
// without one ("no known peers") and never starts an election, so a cluster whose nodes
// all restart would not come back. Therefore restoredLog reports as committed only the
// entries before the newest configuration, unless a snapshot has that configuration.
type restoredLog struct {
	raft.CommitTrackingLogStore
	snapshots raft.SnapshotStore
}

func newRestoredLog(logs raft.LogStore, snapshots raft.SnapshotStore) raft.LogStore {
	tracking, ok := logs.(raft.CommitTrackingLogStore)
	if !ok {
		return logs
	}
	return &restoredLog{CommitTrackingLogStore: tracking, snapshots: snapshots}
}

// GetCommitIndex implements raft.CommitTrackingLogStore. It reads the log
// backwards, at most from its end to the newest snapshot, once at each start.
func (l *restoredLog) GetCommitIndex() (uint64, error) {
	committed, err := l.CommitTrackingLogStore.GetCommitIndex()
	if err != nil || committed == 0 {
		return 0, err
	}
	kept, err := l.snapshots.List()
	if err != nil {
		return 0, fmt.Errorf("list raft's snapshots: %w", err)
	}
	first, err := l.FirstIndex()
	if err != nil {
		return 0, fmt.Errorf("read raft's log: %w", err)
	}
	if len(kept) > 0 { // newest first
		first = max(first, kept[0].Index+1)
	}
	for index := committed; index >= first && index > 0; index-- {
		var entry raft.Log
		if err := l.GetLog(index, &entry); err != nil {
			return 0, fmt.Errorf("read raft's log at %d: %w", index, err)
		}
		if entry.Type == raft.LogConfiguration {
			return index - 1, nil
		}
	}
	return committed, nil
}
