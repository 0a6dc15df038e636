package cluster

import (
	"fmt"

	"github.com/hashicorp/raft"
)

// restoredLog is the log store as raft v1.8.0 can bear it. NewRaft first applies
// what the store says is committed, and then looks for its own configuration
// only in what comes after: when the newest configuration is among the former,
// it starts with none ("no known peers") and never stands for election. A
// cluster whose nodes all restart would be lost. So the entries that are
// restored end before the newest configuration, unless a snapshot has it.
type restoredLog struct {
	raft.LogStore
	tracking  raft.CommitTrackingLogStore // the same store
	snapshots raft.SnapshotStore
}

func newRestoredLog(logs raft.LogStore, snapshots raft.SnapshotStore) raft.LogStore {
	tracking, ok := logs.(raft.CommitTrackingLogStore)
	if !ok {
		return logs
	}
	return &restoredLog{LogStore: logs, tracking: tracking, snapshots: snapshots}
}

// StageCommitIndex implements raft.CommitTrackingLogStore.
func (l *restoredLog) StageCommitIndex(index uint64) error { return l.tracking.StageCommitIndex(index) }

// GetCommitIndex implements raft.CommitTrackingLogStore. It reads the log
// backwards, at most from its end to the newest snapshot, once at each start.
func (l *restoredLog) GetCommitIndex() (uint64, error) {
	committed, err := l.tracking.GetCommitIndex()
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
