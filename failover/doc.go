// Package failover keeps one site in charge. It watches (detector.go), decides
// (decide.go), then promotes and moves the Raft leader after the primary
// (coordinator.go); an operator's planned move is handoff.go. fence.go proves each
// start, and what must stop when a site is no longer the primary runs under
// WhilePrimary (while_primary.go). Which nodes vote is
// placement.go, and what a restarted node may do quarantine.go. Start at
// Coordinator.Run.
package failover
