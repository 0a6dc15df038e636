//go:build !unix

package ports

import "math"

// OpenFiles is how many files this process may have open: this system has no such limit.
func OpenFiles() int { return math.MaxInt32 }
