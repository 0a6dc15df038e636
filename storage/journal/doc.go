// Package journal stores what happened to jobs, as records in append-only logs.
//
// A stream is one node's log of one incarnation. A node stores its own streams and
// a copy of every other node's. Only fsynced records can be read. record.go defines
// a record, payload.go its payloads, and sealer.go how payloads are sealed. Log in
// log.go stores the streams: start there. DESIGN.md describes what happens after a
// crash and after damage.
package journal
