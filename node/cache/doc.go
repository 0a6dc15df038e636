// Package cache keeps answers so that a question asked again costs no model
// server: in the node's memory (local.go), and in a shared tier that outlives the
// process, a file of the node's own (embedded.go) or the site's Redis (redis.go).
// What leaves the memory is sealed (entry.go), what it is found by is an HMAC of
// all that the answer depends on (key.go, canonical.go).
//
// It is a help that may vanish at any moment: a shared tier gets 50 ms, then it is
// left alone until it answers again (shared.go), and writing is never waited for
// (writer.go). Which requests may be answered from here and which answers are
// kept is node/serving's to decide. Start reading at Cache.Find and Cache.Keep.
package cache
