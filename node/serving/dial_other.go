//go:build !linux

package serving

import "syscall"

// boundUnacknowledged does nothing where the kernel has no such option.
func boundUnacknowledged(_, _ string, _ syscall.RawConn) error { return nil }
