//go:build !linux

package mesh

import (
	"net"
	"syscall"
)

// setUserTimeout does nothing: only Linux has the option.
func setUserTimeout(_, _ string, _ syscall.RawConn) error { return nil }

// tunePeerConn has the kernel detect a vanished peer on an idle connection.
func tunePeerConn(conn net.Conn) {
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetKeepAliveConfig(peerKeepAlive) // only shortens the time until a dead peer is noticed
	}
}
