package mesh

import (
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// peerUserTimeout is how long sent bytes may stay unacknowledged before the
// kernel ends the connection. Without it, a connection to a vanished peer hangs
// for about 15 minutes.
const peerUserTimeout = 10 * time.Second

// setUserTimeout is for net.Dialer.Control.
func setUserTimeout(_, _ string, c syscall.RawConn) error {
	var failed error
	if err := c.Control(func(fd uintptr) {
		failed = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(peerUserTimeout.Milliseconds()))
	}); err != nil {
		return err
	}
	return failed
}

// tunePeerConn sets the same options on an accepted connection that the dialer
// sets on a dialled one. A test's listener may return a connection without them.
func tunePeerConn(conn net.Conn) {
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		return
	}
	// Errors are ignored: both only shorten the time until a dead peer is noticed.
	_ = tcp.SetKeepAliveConfig(peerKeepAlive)
	if c, err := tcp.SyscallConn(); err == nil {
		_ = setUserTimeout("", "", c)
	}
}
