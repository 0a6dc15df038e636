// Package failover keeps one site in charge. It observes (detector.go), decides
// (decide.go), then promotes and moves the Raft leader after the primary
// (coordinator.go). An operator's planned switchover is handoff.go. fence.go proves
// each start as primary or as the owner of a job stream; work that must stop when the
// site is no longer the primary runs under WhilePrimary (while_primary.go). Which nodes
// vote is placement.go, and what a restarted majority may do quarantine.go. Start at
// Coordinator.Run.
package failover
