package config

import (
	"bytes"

	"github.com/rogpeppe/go-internal/diff"
)

// Diff returns the change from a to b as a unified diff, "" when both are the same. It
// takes n log n time for any input, but isn't always the shortest diff.
func Diff(a, b []byte) string {
	_, text, _ := bytes.Cut(diff.Diff("current", a, "new", b), []byte("\n")) // without its "diff current new"
	return string(text)
}
