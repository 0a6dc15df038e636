//go:build linux

package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"sync"
	"time"
)

// runReverseProxy shows what a Go program can do that only forwards, with the usual
// tuning: many idle connections, a pool of buffers, a flush after every write. It
// truncates some streams of a burst (golang/go#40747).
func runReverseProxy(ctx context.Context, args []string) error {
	if len(args) != 1 {
		return fmt.Errorf("%w: %s takes the upstream's URL", errUsage, childReverseProxy)
	}
	to, err := url.Parse(args[0])
	if err != nil {
		return fmt.Errorf("%w: %w", errUsage, err)
	}
	return serveInherited(ctx, &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(to) },
		Transport: &http.Transport{
			DialContext:         (&net.Dialer{Timeout: 5 * time.Second, KeepAlive: 30 * time.Second}).DialContext,
			MaxIdleConnsPerHost: 4096,
			IdleConnTimeout:     90 * time.Second,
			DisableCompression:  true,
			WriteBufferSize:     16 << 10,
			ReadBufferSize:      16 << 10,
		},
		FlushInterval: -1,
		BufferPool:    &buffers{sync.Pool{New: func() any { return make([]byte, 16<<10) }}},
	})
}

type buffers struct{ pool sync.Pool }

func (b *buffers) Get() []byte  { return b.pool.Get().([]byte) }
func (b *buffers) Put(x []byte) { b.pool.Put(x) } //nolint:staticcheck // the interface takes slices
