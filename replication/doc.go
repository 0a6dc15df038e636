// Package replication carries journals between nodes and knows who holds what.
//
// Who pulls what from whom is a pure decision (plan.go), and so is what makes a
// record durable (durability.go); marks.go says what is known of the other
// nodes' disks. Around them: link.go pulls from one node, source.go answers one
// that pulls. Start at Replication.Run.
package replication
