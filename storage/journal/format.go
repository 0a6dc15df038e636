//go:build !dsnode_next_format

package journal

// What this version writes: the format that it knows, which adds nothing.
const writeFormat = knownFormat

var writeExt []byte
