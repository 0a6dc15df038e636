// Package journal holds what happened to jobs: records, and the logs of them.
//
// A stream is one node's append-only log of one incarnation; a node keeps its
// own streams and a copy of every other node's. Only fsynced records are ever
// shown. What a record is stands in record.go, what its payload means in
// payload.go and how it is sealed in sealer.go; Log in log.go keeps the streams.
// Start there, and with DESIGN.md for what a crash and damage do.
package journal
