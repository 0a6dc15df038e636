package serving

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// boundUnacknowledged gives up on a connection whose peer has acknowledged
// nothing for ten seconds. Keep-alive does not cover that: it is silent while
// data is on its way, and the kernel would try again for a quarter of an hour.
func boundUnacknowledged(_, _ string, c syscall.RawConn) error {
	var failed error
	err := c.Control(func(fd uintptr) {
		failed = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, 10_000) //nolint:gosec // a file descriptor fits
	})
	if err != nil {
		return err
	}
	return failed
}
