package mesh

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dsnode/dsnode/test/async"
)

// A probe is large in both directions, and only a probe is answered by AnswerProbes.
func TestProbeIsLargeBothWays(t *testing.T) {
	h := AnswerProbes(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusTeapot) }))
	for _, tc := range []struct {
		method, path string
		bytes        int
		status, size int
	}{
		{"POST", probePath, probeBytes, http.StatusOK, probeBytes},
		{"POST", probePath, 3 * probeBytes, http.StatusBadRequest, -1},
		{"GET", probePath, 0, http.StatusTeapot, 0},
		{"POST", "/v1/chat/completions", 10, http.StatusTeapot, 0},
	} {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), tc.method, tc.path, strings.NewReader(strings.Repeat("x", tc.bytes))))
		if w.Code != tc.status || tc.size >= 0 && w.Body.Len() != tc.size {
			t.Errorf("%s %s with %d bytes: %d with %d bytes, want %d with %d", tc.method, tc.path, tc.bytes, w.Code, w.Body.Len(), tc.status, tc.size)
		}
	}
	if probeBytes < 2*1500 {
		t.Errorf("a probe of %d bytes does not fill packets", probeBytes)
	}
}

func TestProbeOfAPeer(t *testing.T) {
	async.NoLeaks(t)
	_, peers := meshOfThree(t, nil)
	ctx := async.Context(t)
	var read atomic.Int64 // bytes of bodies
	serve := func(p *testPeer, h http.Handler) {
		server := &http.Server{ReadHeaderTimeout: 10 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			r.Body = io.NopCloser(countingReader{r.Body, &read})
			h.ServeHTTP(w, r)
		})}
		ln := p.Listener(KindHTTP)
		async.Run(t, func(ctx context.Context) error {
			defer context.AfterFunc(ctx, func() { _ = server.Close() })()
			if err := server.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
				return err
			}
			return nil
		})
	}
	serve(peers[1], AnswerProbes(http.NotFoundHandler()))
	if err := peers[0].Probe(ctx, peers[1].id.Node); err != nil || read.Load() != probeBytes {
		t.Errorf("%v, the peer read %d bytes, want %d", err, read.Load(), probeBytes)
	}
	// A peer of an earlier version has no such route, and its answer shows the same.
	serve(peers[2], http.NotFoundHandler())
	if err := peers[0].Probe(ctx, peers[2].id.Node); err != nil {
		t.Errorf("an earlier version: %v", err)
	}
	var refused *RefusedError
	if err := peers[1].Probe(ctx, peers[0].id.Node); !errors.As(err, &refused) || refused.Code != CodeKindClosed || !refused.ByPeer {
		t.Errorf("a peer that serves no HTTP: %v", err)
	}
}

type countingReader struct {
	io.Reader
	n *atomic.Int64
}

func (c countingReader) Read(b []byte) (int, error) {
	n, err := c.Reader.Read(b)
	c.n.Add(int64(n))
	return n, err
}
