//go:build dsnode_next_format

package journal

// A build with this tag acts as the next version: its records have an extension that
// this version does not know. Tests upgrade a cluster to it and downgrade again.
const writeFormat = knownFormat + 1

var writeExt = []byte("\x01next")
