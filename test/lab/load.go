//go:build linux

package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Load says which requests clients send while a test causes faults. The load is
// open-loop: requests start by the clock, whether or not earlier ones were answered,
// because a closed loop would hide queueing. No request is retried.
type Load struct {
	// Rate is the number of plain requests per second and site.
	Rate float64
	// Streams is the number of streams per site at any time. Each takes about three
	// seconds.
	Streams int
	// Balanced clients use a load balancer that asks every node for /healthz/ready ten
	// times a second and prefers ready nodes of the client's site. Other clients use
	// the nodes of their site in turn.
	Balanced bool
	// Sites whose clients send requests; all when empty.
	Sites []*Site
}

// Result is the outcome of one request, as its client saw it.
type Result struct {
	At     time.Time // sent
	Took   time.Duration
	Site   string // of the client
	Node   string // asked
	Stream bool
	// ServedBy is the site of the model server that answered, if any.
	ServedBy string
	Attempts string // X-Dsnode-Attempts
	Err      error  // nil: a complete and correct answer
}

// Running is a load that has been started.
type Running struct {
	lab      *Lab
	load     Load
	stop     context.CancelFunc // ends new requests
	abort    context.CancelFunc // ends running requests
	arrivals sync.WaitGroup
	requests sync.WaitGroup
	started  atomic.Int64 // plain requests without a result yet
	turn     atomic.Uint64
	want     map[string]string // correct answer by model
	ready    atomic.Pointer[map[string]bool]

	mu      sync.Mutex // guards results
	results []Result
}

const (
	// maxOutstanding bounds the open loop. A request beyond it counts as failed.
	maxOutstanding = 20000
	loadQuestion   = "What is carried between the sites?"
	drainWithin    = 30 * time.Second
)

var errOutstanding = errors.New("too many requests are outstanding")

// StartLoad begins at once. Stop returns the results.
func (l *Lab) StartLoad(load Load) *Running {
	l.t.Helper()
	if len(load.Sites) == 0 {
		load.Sites = l.Sites
	}
	r := &Running{lab: l, load: load, want: map[string]string{}}
	for _, model := range []string{FastModel, SlowModel} {
		text, err := l.Ask(context.Background(), load.Sites[0].Nodes[0], model, loadQuestion)
		if err != nil {
			l.t.Fatalf("ask once before the load: %v", err)
		}
		r.want[model] = text
	}
	arrive, stop := context.WithCancel(context.Background())
	ask, abort := context.WithCancel(context.Background())
	r.stop, r.abort = stop, abort
	// The clients of a test that fails early must not run on in the next test.
	l.t.Cleanup(func() {
		stop()
		abort()
		r.arrivals.Wait()
		r.requests.Wait()
	})
	if load.Balanced {
		r.probe(arrive)
		r.arrivals.Go(func() {
			for sleep(arrive, observeEvery) {
				r.probe(arrive)
			}
		})
	}
	for _, s := range load.Sites {
		if load.Rate > 0 {
			r.arrivals.Go(func() { r.arrive(arrive, ask, s) })
		}
		for i := range load.Streams {
			r.requests.Go(func() {
				// Starts are spread over the length of a stream.
				for sleep(arrive, time.Duration(i)*3*time.Second/time.Duration(load.Streams)); arrive.Err() == nil; {
					r.one(ask, s, true)
				}
			})
		}
	}
	return r
}

// Stop waits for running requests and returns all results in the order of sending.
func (r *Running) Stop() []Result {
	r.stop()
	r.arrivals.Wait()
	over := time.AfterFunc(drainWithin, r.abort)
	r.requests.Wait()
	over.Stop()
	r.abort()
	results := r.snapshot()
	slices.SortFunc(results, func(a, b Result) int { return a.At.Compare(b.At) })
	return results
}

// Count returns how many requests have ended so far.
func (r *Running) Count() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.results)
}

// snapshot returns the results so far.
func (r *Running) snapshot() []Result {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.results)
}

// Failed returns the results with an error, of these sites or, without any, of all.
func Failed(results []Result, sites ...string) []Result {
	var failed []Result
	for _, r := range results {
		if r.Err != nil && (len(sites) == 0 || slices.Contains(sites, r.Site)) {
			failed = append(failed, r)
		}
	}
	return failed
}

// Summary describes results in a few lines: counts, latencies, the first errors.
func Summary(results []Result) string {
	var plain, streams, failed int
	var took []time.Duration
	served := map[string]int{}
	for _, r := range results {
		if r.Stream {
			streams++
		} else {
			plain++
			took = append(took, r.Took)
		}
		if r.Err != nil {
			failed++
			continue
		}
		served[r.Site+" by "+r.ServedBy]++
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%d requests, %d streams, %d failed", plain, streams, failed)
	if slices.Sort(took); len(took) > 0 {
		fmt.Fprintf(&b, "; plain p50 %v, p99 %v, max %v",
			took[len(took)/2].Round(time.Microsecond), took[len(took)*99/100].Round(time.Microsecond), took[len(took)-1].Round(time.Microsecond))
	}
	for _, k := range slices.Sorted(maps.Keys(served)) {
		fmt.Fprintf(&b, "\n  %s: %d", k, served[k])
	}
	for _, r := range Failed(results)[:min(10, failed)] {
		fmt.Fprintf(&b, "\n  failed at %s, %s asked %s (stream %v, after %v): %v",
			r.At.Format("15:04:05.000"), r.Site, r.Node, r.Stream, r.Took.Round(time.Millisecond), r.Err)
	}
	return b.String()
}

// arrive starts requests by the clock.
func (r *Running) arrive(ctx, ask context.Context, s *Site) {
	begun := time.Now()
	for n := 0; ; n++ {
		due := begun.Add(time.Duration(float64(n) / r.load.Rate * float64(time.Second)))
		if wait := time.Until(due); wait > 0 && !sleep(ctx, wait) || ctx.Err() != nil {
			return
		}
		if r.started.Add(1) > maxOutstanding {
			r.started.Add(-1)
			r.add(Result{At: time.Now(), Site: s.Name, Err: errOutstanding})
			continue
		}
		r.requests.Go(func() {
			defer r.started.Add(-1)
			r.one(ask, s, false)
		})
	}
}

func (r *Running) one(ctx context.Context, s *Site, stream bool) {
	n := r.choose(s)
	result := Result{At: time.Now(), Site: s.Name, Node: n.Name, Stream: stream}
	model := FastModel
	if stream {
		model = SlowModel
	}
	head, text, err := complete(ctx, s.http, n.API(), model, loadQuestion, stream)
	if err == nil && text != r.want[model] {
		err = fmt.Errorf("the answer has a gap or a repeat: %q", text)
	}
	result.Took, result.Err = time.Since(result.At), err
	result.ServedBy, result.Attempts = head.Get("X-Dsnode-Site"), head.Get("X-Dsnode-Attempts")
	if ctx.Err() != nil {
		result.Err = fmt.Errorf("not answered within %s of the end of the load", drainWithin)
	}
	r.add(result)
	if err != nil && stream {
		sleep(ctx, 100*time.Millisecond) // a client that fails at once must not spin
	}
}

func (r *Running) add(result Result) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.results = append(r.results, result)
}

// choose picks the node for a client's request.
func (r *Running) choose(s *Site) *Node {
	nodes := s.Nodes
	if ready := r.ready.Load(); r.load.Balanced && ready != nil {
		well := func(all []*Node) []*Node {
			return slices.DeleteFunc(slices.Clone(all), func(n *Node) bool { return !(*ready)[n.Name] })
		}
		if some := well(s.Nodes); len(some) > 0 {
			nodes = some
		} else if some := well(r.lab.Nodes()); len(some) > 0 {
			nodes = some
		}
	}
	return nodes[r.turn.Add(1)%uint64(len(nodes))]
}

// probe asks every node for its readiness, as a load balancer does.
func (r *Running) probe(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	nodes := r.lab.Nodes()
	oks := make([]bool, len(nodes))
	var wg sync.WaitGroup
	for i, n := range nodes {
		wg.Go(func() {
			_, err := n.get(ctx, n.API()+"/healthz/ready")
			oks[i] = err == nil
		})
	}
	wg.Wait()
	ready := map[string]bool{}
	for i, n := range nodes {
		ready[n.Name] = oks[i]
	}
	r.ready.Store(&ready)
}

// Ask sends one plain request from within the node's site and returns the answer.
func (l *Lab) Ask(ctx context.Context, n *Node, model, question string) (string, error) {
	_, text, err := complete(ctx, n.Site.http, n.API(), model, question, false)
	return text, err
}

// AskStream is Ask with a stream.
func (l *Lab) AskStream(ctx context.Context, n *Node, model, question string) (string, error) {
	_, text, err := complete(ctx, n.Site.http, n.API(), model, question, true)
	return text, err
}

// complete asks for a chat completion and returns its text. A stream that does not
// end with a finish reason and [DONE] is an error.
func complete(ctx context.Context, client *http.Client, base, model, question string, stream bool) (http.Header, string, error) {
	body, err := json.Marshal(map[string]any{
		"model": model, "stream": stream,
		"messages": []map[string]string{{"role": "user", "content": question}},
	})
	if err != nil {
		return nil, "", err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, base+"/v1/chat/completions", bytes.NewReader(body))
	if err != nil {
		return nil, "", err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := client.Do(req)
	if err != nil {
		return nil, "", err
	}
	defer func() { _ = resp.Body.Close() }() // read to its end, or broken
	if resp.StatusCode != http.StatusOK {
		text, err := io.ReadAll(io.LimitReader(resp.Body, 4096))
		return resp.Header, "", errors.Join(fmt.Errorf("answered %s: %s", resp.Status, bytes.TrimSpace(text)), err)
	}
	if stream {
		text, err := readStream(resp.Body)
		return resp.Header, text, err
	}
	var answer struct {
		Choices []struct {
			Message      struct{ Content string }
			FinishReason string `json:"finish_reason"`
		}
	}
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
		return resp.Header, "", fmt.Errorf("read the answer: %w", err)
	}
	if len(answer.Choices) != 1 || answer.Choices[0].FinishReason == "" {
		return resp.Header, "", fmt.Errorf("the answer is not complete: %+v", answer)
	}
	return resp.Header, answer.Choices[0].Message.Content, nil
}

// sleep waits and reports false when ctx ends first.
func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}
