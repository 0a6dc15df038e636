// Package storage keeps on disk what a node must not forget: the Raft log and
// its stable values (RaftStore), the snapshots of the agreed state
// (SnapshotStore), and the lock that gives a data directory to one process
// (Lock). Everything is sealed with the node's key before it is written.
//
// Start at OpenRaftStore in raft_store.go: what it checks before it trusts a
// file, and what happens when a write fails. Reasons and rejected choices are
// in DESIGN.md.
package storage
