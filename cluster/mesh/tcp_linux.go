package mesh

import (
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// peerUserTimeout is how long sent bytes may stay unacknowledged before the
// kernel gives a connection up. Without it a connection to a peer that
// vanished hangs for a quarter of an hour.
const peerUserTimeout = 10 * time.Second

// setUserTimeout is the Control of a net.Dialer.
func setUserTimeout(_, _ string, c syscall.RawConn) error {
	var failed error
	if err := c.Control(func(fd uintptr) {
		failed = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(peerUserTimeout.Milliseconds()))
	}); err != nil {
		return err
	}
	return failed
}

// tunePeerConn gives an accepted connection what a dialled one has. A listener
// of a test may have no such knobs.
func tunePeerConn(conn net.Conn) {
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		return
	}
	// Both only shorten the time in which a dead peer is noticed.
	_ = tcp.SetKeepAliveConfig(peerKeepAlive)
	if c, err := tcp.SyscallConn(); err == nil {
		_ = setUserTimeout("", "", c)
	}
}
