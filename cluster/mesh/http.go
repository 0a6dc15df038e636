package mesh

import (
	"context"
	"net"
	"net/http"
	"time"
)

const (
	httpIdlePerPeer = 256 // requests forwarded at once that need no new handshake
	httpIdleTimeout = 90 * time.Second
)

// HTTPTransport sends HTTP requests to peers, one transport for all callers:
// the host of the URL is the node's name, "http://shanghai-b-1/v1/…" (the
// scheme is http because TLS is the mesh's). It has no timers but those of the
// request's context, and leaves bodies as they are.
func (m *Mesh) HTTPTransport() *http.Transport { return m.transport }

func (m *Mesh) newHTTPTransport() *http.Transport {
	return &http.Transport{
		DialContext: func(ctx context.Context, _, hostport string) (net.Conn, error) {
			node, _, err := net.SplitHostPort(hostport)
			if err != nil {
				return nil, err
			}
			return m.Dial(ctx, KindHTTP, node)
		},
		DisableCompression:  true,
		MaxIdleConns:        maxPeerConns / 2,
		MaxIdleConnsPerHost: httpIdlePerPeer,
		MaxConnsPerHost:     maxPeerConns / 2,
		IdleConnTimeout:     httpIdleTimeout,
	}
}

type httpPeerKey struct{}

// HTTPConnContext is the ConnContext of an http.Server on Listener(KindHTTP);
// HTTPPeer reads what it leaves.
func HTTPConnContext(ctx context.Context, conn net.Conn) context.Context {
	if c, ok := conn.(*PeerConn); ok {
		return context.WithValue(ctx, httpPeerKey{}, c.peer)
	}
	return ctx
}

// HTTPPeer is who sent a request, on the server's side.
func HTTPPeer(r *http.Request) (Identity, bool) {
	id, ok := r.Context().Value(httpPeerKey{}).(Identity)
	return id, ok
}
