//go:build dsnode_next_format

package journal

// A build with this tag stands for the next version: its records say more than
// this version knows. The lab upgrades a cluster to it and goes back.
const writeFormat = knownFormat + 1

var writeExt = []byte("\x01next")
