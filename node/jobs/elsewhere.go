package jobs

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"time"

	"github.com/dsnode/dsnode/node/serving"
	"github.com/dsnode/dsnode/node/upstream"
	"github.com/dsnode/dsnode/storage/journal"
)

const (
	// findWait bounds the question to all others, and relayWait a change that is
	// made at one of them.
	findWait  = 300 * time.Millisecond
	relayWait = 5 * time.Second
	// maxAsked bounds how many are asked at one time.
	maxAsked = 16
	// maxRelayed is a result with what is around it.
	maxRelayed = MaxResult + 1<<20
)

// elsewhere asks other nodes for jobs that have not arrived here yet.
type elsewhere struct {
	peers func() []upstream.Peer
}

// Relayed is another node's answer.
type Relayed struct {
	Node   string
	Status int
	Header http.Header
	Body   []byte
}

// Elsewhere asks the other nodes for a job, all at once and for 300 ms; who has
// it gives the answer, and for a change (another method than GET) is asked once
// more. path is that of the client API, as in "/v1/jobs/{id}/cancel". The error
// is ErrNotFound when nobody has the job or none of them answers in time.
func (e *elsewhere) Elsewhere(ctx context.Context, who Caller, method, path string, id journal.JobID) (*Relayed, error) {
	if who.Operator {
		return nil, ErrNotFound // operators have every node's own port
	}
	principal, err := json.Marshal(who.Principal)
	if err != nil {
		return nil, fmt.Errorf("encode the principal: %w", err)
	}
	found, peer := e.ask(ctx, string(principal), "/v1/jobs/"+id.String())
	if found == nil {
		return nil, ErrNotFound
	}
	if method == http.MethodGet || method == http.MethodHead {
		return found, nil
	}
	ctx, done := context.WithTimeout(ctx, relayWait)
	defer done()
	return relay(ctx, peer, string(principal), method, path)
}

func (e *elsewhere) ask(ctx context.Context, principal, path string) (*Relayed, *upstream.Peer) {
	ctx, done := context.WithTimeout(ctx, findWait)
	defer done()
	type reply struct {
		answer *Relayed
		peer   *upstream.Peer
	}
	peers := e.peers()
	if len(peers) > maxAsked {
		peers = peers[:maxAsked]
	}
	replies := make(chan reply, len(peers))
	for i := range peers {
		go func() {
			answer, err := relay(ctx, &peers[i], principal, http.MethodGet, path)
			if err != nil || answer.Status != http.StatusOK {
				answer = nil
			}
			replies <- reply{answer, &peers[i]}
		}()
	}
	var first reply
	for range peers { // all are waited for: done ends those that are too late
		if r := <-replies; r.answer != nil && first.answer == nil {
			first = r
			done()
		}
	}
	return first.answer, first.peer
}

func relay(ctx context.Context, p *upstream.Peer, principal, method, path string) (*Relayed, error) {
	u := url.URL{Scheme: "http", Host: p.Node, Path: path}
	req, err := http.NewRequestWithContext(ctx, method, u.String(), bytes.NewReader(nil))
	if err != nil {
		return nil, err
	}
	req.Header.Set(serving.HeaderHops, "1")
	req.Header.Set(serving.HeaderPrincipal, principal)
	resp, err := p.Client.RoundTrip(req)
	if err != nil {
		return nil, fmt.Errorf("ask %s: %w", p.Node, err)
	}
	defer func() { _ = resp.Body.Close() }() // nothing to learn from it
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxRelayed+1))
	if err == nil && len(body) > maxRelayed {
		err = errors.New("the answer is too long")
	}
	if err != nil {
		return nil, fmt.Errorf("ask %s: %w", p.Node, err)
	}
	return &Relayed{Node: p.Node, Status: resp.StatusCode, Header: resp.Header, Body: body}, nil
}
