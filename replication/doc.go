// Package replication copies journals between nodes and tracks which node holds
// which records.
//
// Two decisions are pure functions: which node pulls what from which other node
// (plan.go), and what makes a record durable (durability.go). watermarks.go holds what
// is known of the nodes' disks. pull.go is the client side of a pull, send.go the
// server side. Start at Replication.Run.
package replication
