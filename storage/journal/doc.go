// Package journal holds what happened to jobs: records, and the logs of them.
//
// A stream is one node's append-only log of one incarnation; a node keeps its
// own streams and a copy of every other node's. Only fsynced records are ever
// shown. What a record is stands in record.go, what its payload means in
// payload.go: start there.
package journal
