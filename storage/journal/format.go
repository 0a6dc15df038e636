//go:build !dsnode_next_format

package journal

// This version writes the format that it knows, without an extension.
const writeFormat = knownFormat

var writeExt []byte
