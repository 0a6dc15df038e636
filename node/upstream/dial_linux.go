package upstream

import (
	"errors"
	"syscall"

	"golang.org/x/sys/unix"
)

// boundUnacknowledged ends a connection whose peer has acknowledged nothing for ten
// seconds. Keep-alive doesn't cover that: it sends no probes while data is
// unacknowledged, and the kernel would send the data again for a quarter of an hour.
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

// quiet reports that an idle connection is open and that nothing has come on it:
// what a server sends unasked must not become the next request's answer.
func quiet(c syscall.RawConn) bool {
	if c == nil {
		return true
	}
	open := false
	err := c.Read(func(fd uintptr) bool {
		var b [1]byte
		_, _, e := unix.Recvfrom(int(fd), b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT) //nolint:gosec // a file descriptor fits
		open = errors.Is(e, unix.EAGAIN)
		return true
	})
	return err == nil && open
}
