// Package keyring seals what dsnode writes to disk and opens it again.
//
// One key comes from outside: the operator's key (operator.go), from a file or an
// environment variable. It never seals data itself; subkeys are derived from it
// with HKDF. It wraps the node's own key (nodekey.go), which seals the Raft log, the
// stable values and the snapshots of this node only. sealer.go defines the format
// of sealed bytes: start there.
//
// Data that leaves the node, or must outlive it, is sealed with data keys
// (datakey.go). The cluster agrees on them, wrapped with the operator's key. A Ring
// (ring.go) holds the opened ones: Ring.Scope returns sealers (scoped.go), and
// Ring.MAC the function for ids and digests (mac.go).
package keyring
