// Package keyring seals what dsnode writes to disk and opens it again.
//
// One key is given from outside: the operator's key (operator.go), in a file
// or an environment variable. It never touches data; subkeys are derived from
// it with HKDF. It wraps the node's own key (nodekey.go), which seals the
// Raft log, the stable values and the snapshots of this node and of no other.
// What sealing means, byte by byte, stands in sealer.go: start there.
//
// What leaves the node, or must outlive it, is sealed with data keys (datakey.go)
// that the cluster agrees on and the operator's key wraps. The opened ones are a
// Ring (ring.go): Ring.Scope gives sealers (scoped.go), Ring.MAC the function for
// ids and digests (mac.go).
package keyring
