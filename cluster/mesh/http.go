package mesh

import (
	"context"
	"net"
	"net/http"
	"time"

	"github.com/dsnode/dsnode/cluster/cause"
)

const (
	httpIdlePerPeer = 256 // idle connections a peer: so many concurrent requests need no handshake
	httpIdleTimeout = 90 * time.Second
)

// HTTPTransport returns the transport for HTTP requests to peers, shared by all
// callers. The host of a URL is the node's name, as in "http://shanghai-b-1/v1/…";
// the scheme is http because the mesh does TLS. Only the request's context limits
// the time, and bodies are not decompressed.
func (m *Mesh) HTTPTransport() *http.Transport { return m.transport }

func (m *Mesh) newHTTPTransport() *http.Transport {
	return &http.Transport{
		DialContext: func(ctx context.Context, _, hostport string) (net.Conn, error) {
			node, _, err := net.SplitHostPort(hostport)
			if err != nil {
				return nil, err
			}
			conn, err := m.Dial(ctx, KindHTTP, node)
			return conn, cause.Own(err) // certificates and refusals of nodes hold no request
		},
		DisableCompression:  true,
		MaxIdleConns:        m.opts.MaxConns / 2,
		MaxIdleConnsPerHost: httpIdlePerPeer,
		MaxConnsPerHost:     m.opts.MaxConns / 2,
		IdleConnTimeout:     httpIdleTimeout,
	}
}

type httpPeerKey struct{}

// HTTPConnContext is for http.Server.ConnContext on Listener(KindHTTP). It stores
// the connection for HTTPPeer.
func HTTPConnContext(ctx context.Context, conn net.Conn) context.Context {
	if c, ok := conn.(*PeerConn); ok {
		return context.WithValue(ctx, httpPeerKey{}, c)
	}
	return ctx
}

// HTTPPeer returns the peer that sent a request, in a handler behind
// HTTPConnContext.
func HTTPPeer(r *http.Request) (Identity, bool) {
	c, ok := r.Context().Value(httpPeerKey{}).(*PeerConn)
	if !ok {
		return Identity{}, false
	}
	return c.peer, true
}

// HTTPMembership is what the peer that sent a request said of itself when it connected.
func HTTPMembership(r *http.Request) (Membership, bool) {
	c, ok := r.Context().Value(httpPeerKey{}).(*PeerConn)
	if !ok {
		return Membership{}, false
	}
	return c.theirs, true
}
