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
	"sync"
	"time"

	"github.com/dsnode/dsnode/node/serving"
	"github.com/dsnode/dsnode/node/upstream"
	"github.com/dsnode/dsnode/storage/jobtable"
	"github.com/dsnode/dsnode/storage/journal"
)

const (
	// findWait bounds the search at all peers, relayWait a change at one of them.
	findWait  = 300 * time.Millisecond
	relayWait = 5 * time.Second
	// maxAsked bounds the peers that are asked for one job.
	maxAsked = 16
	// maxRelayed bounds a peer's answer: the largest result and the job's other fields.
	maxRelayed = MaxResult + 1<<20
	// maxEnds bounds the jobs whose end was relayed and is not known here yet.
	maxEnds = 4096
	// askForEnds is how long after a job's end a client's request makes this node ask its
	// peers whether they show the end. Usually each node learns within half a second how
	// durable the end is. Without a bound, clients that poll jobs whose durability can't be
	// reached would cost a request to each peer every time.
	askForEnds = 5 * time.Second
)

// Relayed is the answer of another node.
type Relayed struct {
	Node   string
	Status int
	Header http.Header
	Body   []byte
}

// Elsewhere asks the other nodes for a job, all at once, for at most 300 ms. It returns the
// answer of a node that has the job; for a change (another method than GET) that node gets
// a second request. path is the path of the client API, such as "/v1/jobs/{id}/cancel". The error
// is ErrNotReady, or ErrNotFound when no node that answers in time has the job: while
// this node may lack jobs, or has relayed the job's end, that is ErrPartial.
func (j *Jobs) Elsewhere(ctx context.Context, who Caller, method, path string, id journal.JobID) (*Relayed, error) {
	if !j.ready.Load() {
		return nil, ErrNotReady
	}
	there, err := j.askPeers(ctx, who, method, path, id)
	switch {
	case err == nil && method == http.MethodGet && there.ended():
		j.relayed.add(id)
	case errors.Is(err, ErrNotFound) && (j.lacking() || j.relayed.has(id)):
		err = ErrPartial
	}
	return there, err
}

// ended reports whether the answer is a job that has ended.
func (r *Relayed) ended() bool {
	var v struct{ Status journal.Status }
	return json.Unmarshal(r.Body, &v) == nil && v.Status.Final()
}

// relayedEnds remembers the jobs whose end this node has relayed from a peer. A node
// that catches up gets the records of a job one after the other. Until it has the end
// too, its own row is older than what clients have seen here, and is not shown.
type relayedEnds struct {
	mu    sync.Mutex // guards ids, order
	ids   map[journal.JobID]bool
	order []journal.JobID // oldest first; may have jobs that are no longer in ids
}

func (e *relayedEnds) add(id journal.JobID) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.ids[id] {
		return
	}
	if len(e.order) == maxEnds {
		delete(e.ids, e.order[0])
		e.order = append(e.order[:0], e.order[1:]...)
	}
	e.ids[id] = true
	e.order = append(e.order, id)
}

func (e *relayedEnds) has(id journal.JobID) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.ids[id]
}

func (j *Jobs) askPeers(ctx context.Context, who Caller, method, path string, id journal.JobID) (*Relayed, error) {
	if who.Operator {
		return nil, ErrNotFound // operators can ask each node themselves
	}
	principal, err := json.Marshal(who.Principal)
	if err != nil {
		return nil, fmt.Errorf("encode the principal: %w", err)
	}
	found, peer := j.askForJob(ctx, string(principal), "/v1/jobs/"+id.String(), j.relayed.has(id))
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

// endedElsewhere reports whether another node has the end of a job that has not ended here,
// and then remembers that: Elsewhere asks a node that has it. It does so for clients alone.
func (j *Jobs) endedElsewhere(ctx context.Context, who Caller, id journal.JobID) bool {
	if who.Operator || who.Peer {
		return false
	}
	principal, err := json.Marshal(who.Principal)
	if err != nil {
		return false
	}
	found, _ := j.askForJob(ctx, string(principal), "/v1/jobs/"+id.String(), true)
	if found == nil || !found.ended() {
		return false
	}
	j.relayed.add(id)
	return true
}

// endedLately reports whether a row has the end of a job, from within askForEnds.
func (j *Jobs) endedLately(row jobtable.Row) bool {
	current, ok := row.Current()
	return ok && current.Kind == journal.Finished && j.o.Host.Now().Sub(current.Clock.Time()) < askForEnds
}

// askForJob returns the first answer of a peer that has the job or, with end, the first one
// that has its end, if there is any.
func (j *Jobs) askForJob(ctx context.Context, principal, path string, end bool) (*Relayed, *upstream.Peer) {
	ctx, done := context.WithTimeout(ctx, findWait)
	defer done()
	type reply struct {
		answer *Relayed
		peer   *upstream.Peer
	}
	peers := j.o.Peers()
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
	var best reply
	for range peers { // done ends the requests that are still running
		r := <-replies
		switch {
		case r.answer == nil:
		case !end || r.answer.ended():
			if best.answer == nil || end && !best.answer.ended() {
				best = r
			}
			done()
		case best.answer == nil:
			best = r
		}
	}
	return best.answer, best.peer
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
	defer func() { _ = resp.Body.Close() }() // only read from
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxRelayed+1))
	if err == nil && len(body) > maxRelayed {
		err = errors.New("the answer is too long")
	}
	if err != nil {
		return nil, fmt.Errorf("ask %s: %w", p.Node, err)
	}
	return &Relayed{Node: p.Node, Status: resp.StatusCode, Header: resp.Header, Body: body}, nil
}
