// Package storage stores what Raft needs on disk: its log and stable values
// (RaftStore), snapshots of the agreed state (SnapshotStore), and the lock that
// reserves a data directory for one process (Lock). All content is sealed with
// the node's key.
//
// Start at OpenRaftStore in raft_store.go: what it checks in a file, and what
// happens when a write fails. Reasons and rejected alternatives are in DESIGN.md.
package storage
