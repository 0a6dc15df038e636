//go:build !linux

package upstream

import "syscall"

// boundUnacknowledged does nothing where the kernel has no such option.
func boundUnacknowledged(_, _ string, _ syscall.RawConn) error { return nil }

// quiet can't look into a connection here: whether it is closed shows when it is
// used.
func quiet(syscall.RawConn) bool { return true }
