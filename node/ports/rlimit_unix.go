//go:build unix

package ports

import (
	"math"
	"syscall"
)

// OpenFiles is how many files this process may have open. Go has raised the limit to the
// hard one before main.
func OpenFiles() int {
	var l syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l); err != nil {
		return unlimited
	}
	return int(min(uint64(l.Cur), unlimited)) //nolint:unconvert // signed on some systems
}

const unlimited = math.MaxInt32
