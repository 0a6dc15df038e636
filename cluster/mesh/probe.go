package mesh

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
)

// probeBytes is the size of a probe in each direction. It is larger than a packet of
// any usual link, so at least one packet is as large as the path allows: where a path
// drops large packets, small pings are answered and a probe is not.
const probeBytes = 4 << 10

// maxProbeAnswer bounds what is read of an answer: a node without this route sends an
// error.
const maxProbeAnswer = 64 << 10

const probePath = "/dsnode/probe"

// Probe sends a large request to a node over an HTTP connection, and reads a large
// answer. Whatever the node's version answers, the request went through.
func (m *Mesh) Probe(ctx context.Context, node string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+node+probePath, bytes.NewReader(make([]byte, probeBytes)))
	if err != nil {
		return fmt.Errorf("probe %s: %w", node, err)
	}
	resp, err := m.transport.RoundTrip(req)
	if err != nil {
		return fmt.Errorf("probe %s: %w", node, err)
	}
	_, err = io.Copy(io.Discard, io.LimitReader(resp.Body, maxProbeAnswer))
	_ = resp.Body.Close() // read to its end, or failed
	if err != nil {
		return fmt.Errorf("probe %s: %w", node, err)
	}
	return nil
}

// AnswerProbes answers the probes of peers, and gives their other requests to next.
func AnswerProbes(next http.Handler) http.Handler {
	answer := make([]byte, probeBytes)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodPost || r.URL.Path != probePath {
			next.ServeHTTP(w, r)
			return
		}
		if _, err := io.Copy(io.Discard, http.MaxBytesReader(w, r.Body, 2*probeBytes)); err != nil {
			http.Error(w, "the probe was not read", http.StatusBadRequest)
			return
		}
		_, _ = w.Write(answer) // an error means that the peer has gone
	})
}
