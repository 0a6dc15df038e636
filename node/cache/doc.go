// Package cache keeps answers, so that a model server is not asked the same question
// twice. It has two tiers: the node's memory (local.go), and a shared tier, which
// survives a restart. That is either files of this node (embedded.go, segment.go) or
// the site's Redis (redis.go). Entries of the shared tier are sealed (entry.go). A
// key is an HMAC of all that an answer depends on (key.go, canonical.go).
//
// No request depends on the cache. A lookup in the shared tier gets 50 ms. A breaker
// stops lookups while the tier fails (shared.go, breaker.go). Writes go through a
// queue, so no request waits for one (writer.go). node/serving decides which requests
// are answered from here and which answers are kept. Start reading at Cache.Local,
// Cache.Shared and Cache.Keep.
package cache
