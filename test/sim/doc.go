// Package sim runs whole nodes in virtual time, in one process: node.New with a simulated
// machine (machine.go: clocks and a disk; network.go: all packets) in a bubble of
// testing/synctest. A seed fixes the cluster, the faults and the load (world.go, plan.go);
// clients keep ledgers (clients.go), and the laws of the design are checked from outside
// (laws.go). DESIGN.md says what it can't show. Start reading at run.
package sim
