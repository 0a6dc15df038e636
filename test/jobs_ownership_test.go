//go:build linux

package test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/test/lab"
)

// ownerState is the owner of a stream of jobs, who may execute them: one register per
// stream, which is empty before the stream is opened, whose token only rises, and which
// ends with the stream.
type ownerState struct {
	owner string
	token agreed.FenceToken
	done  bool
}

// ownerOp is a read through the log, a change of the owner (from none when the stream
// is opened), or the end of the stream.
type ownerOp struct {
	stream string
	read   bool
	ends   bool
	from   string
	to     ownerState
}

var ownerModel = (&porcupine.NondeterministicModel{
	Partition: func(history []porcupine.Operation) [][]porcupine.Operation {
		of := map[string][]porcupine.Operation{}
		for _, op := range history {
			stream := op.Input.(ownerOp).stream
			of[stream] = append(of[stream], op)
		}
		var parts [][]porcupine.Operation
		for _, part := range of {
			parts = append(parts, part)
		}
		return parts
	},
	Init: func() []any { return []any{ownerState{}} },
	Step: func(state, input, output any) []any {
		is, op := state.(ownerState), input.(ownerOp)
		switch {
		case op.read && (output.(ownerState) == is || output.(ownerState) == ownerState{} && is.done):
			return []any{is}
		case op.read:
			return nil
		case op.ends && is.owner != "" && !is.done: // it ends now or later
			return []any{is, ownerState{done: true}}
		case op.ends:
			return []any{is}
		case is.done || is.owner != op.from || op.to.token.Compare(is.token) <= 0:
			return nil
		}
		return []any{op.to}
	},
	Equal:             func(a, b any) bool { return a == b },
	DescribeOperation: func(in, out any) string { return fmt.Sprintf("%+v → %+v", in, out) },
}).ToModel()

// The model accepts histories that are linearizable, and no others.
func TestOwnershipModelRefuses(t *testing.T) {
	at := func(call, ret int64, op ownerOp, got ownerState) porcupine.Operation {
		return porcupine.Operation{ClientId: int(call), Input: op, Output: got, Call: call, Return: ret}
	}
	is := func(owner string, index uint64) ownerState {
		return ownerState{owner: owner, token: agreed.FenceToken{Generation: 1, Index: index}}
	}
	read := ownerOp{read: true}
	opened := at(1, 2, ownerOp{to: is("a", 5)}, ownerState{})
	for name, c := range map[string]struct {
		ops []porcupine.Operation
		ok  bool
	}{
		"opened, adopted":        {[]porcupine.Operation{opened, at(3, 9, ownerOp{from: "a", to: is("b", 7)}, ownerState{}), at(4, 5, read, is("a", 5)), at(10, 11, read, is("b", 7))}, true},
		"two from one owner":     {[]porcupine.Operation{opened, at(3, 9, ownerOp{from: "a", to: is("b", 7)}, ownerState{}), at(3, 9, ownerOp{from: "a", to: is("c", 8)}, ownerState{})}, false},
		"the token falls":        {[]porcupine.Operation{opened, at(3, 9, ownerOp{from: "a", to: is("b", 4)}, ownerState{})}, false},
		"the token stays":        {[]porcupine.Operation{opened, at(3, 9, ownerOp{from: "a", to: is("b", 5)}, ownerState{})}, false},
		"a read of an old owner": {[]porcupine.Operation{opened, at(3, 4, ownerOp{from: "a", to: is("b", 7)}, ownerState{}), at(5, 6, read, is("a", 5))}, false},
		"a read of no change":    {[]porcupine.Operation{opened, at(5, 6, read, is("c", 6))}, false},
		"ended":                  {[]porcupine.Operation{opened, at(3, never, ownerOp{ends: true}, ownerState{}), at(5, 6, read, ownerState{})}, true},
		"not ended yet":          {[]porcupine.Operation{opened, at(3, never, ownerOp{ends: true}, ownerState{}), at(5, 6, read, is("a", 5))}, true},
		"ended, and there again": {[]porcupine.Operation{opened, at(3, never, ownerOp{ends: true}, ownerState{}), at(5, 6, read, ownerState{}), at(7, 8, read, is("a", 5))}, false},
		"gone without an end":    {[]porcupine.Operation{opened, at(5, 6, read, ownerState{})}, false},
	} {
		t.Run(name, func(t *testing.T) {
			if got := porcupine.CheckOperations(ownerModel, c.ops); got != c.ok {
				t.Errorf("linearizable: %v, want %v", got, c.ok)
			}
		})
	}
}

// ownershipFor is how long faults follow each other. An adoption takes ten seconds, so
// a shorter time would show few.
const ownershipFor = 5 * time.Minute

// Under random faults, many of them long enough for an adoption, clients at all nodes
// read the owners of all streams of jobs, some of them through the log. For each stream
// what they see is linearizable. Law 4 holds for the requests that the model servers
// got, compared with the starts in the journals: the owner under the start's token made
// each of them, and none is later than the first one of the next owner or than the end
// of the owner's last lease. LAB_SEED repeats faults and reads.
func TestJobsOwnershipIsLinearizable(t *testing.T) {
	fullOnly(t, "an owner must be gone for ten seconds before another adopts its stream")
	requests := &requestLog{}
	l := lab.Start(t, lab.Topology{Nodes: []int{2, 1, 1}, Link: lab.RoundTrip(betweenCities)})
	s := &scenario{t: t, lab: l}
	s.ordinaryLinks()
	for _, site := range l.Sites {
		requests.listen(t, l, site)
	}
	owners := &ownerHistory{config: withUnendingJobs(l.ClusterYAML()), streams: map[string]*streamHistory{}}
	if err := l.Nodes()[0].ApplyConfig(t.Context(), owners.config); err != nil {
		t.Fatal(err)
	}
	l.WaitHealthy(within(returns))
	starts := newStartRecords(t, l)
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for i, n := range l.Nodes() {
		seed := l.Random.Uint64()
		wg.Go(func() { owners.client(ctx, i, n, seed) })
		wg.Go(func() { submitUnending(ctx, n) })
	}
	wg.Go(func() { starts.follow(ctx) })
	var faults []string
	for until := time.Now().Add(ownershipFor); time.Now().Before(until); {
		faults = append(faults, s.longFault(requests))
	}
	l.WaitHealthy(time.Minute) // no promised time
	stop()
	wg.Wait()
	owners.readAll(t, l)
	for _, n := range l.Nodes() {
		n.Terminate(30 * time.Second)
	}
	starts.copyAll()
	t.Logf("faults: %s", strings.Join(faults, ", "))
	ops := owners.operations()
	t.Log(owners.summary())
	report(t, "answers about owners contradict each other", owners.wrong)
	if owners.adoptions() < 5 {
		t.Errorf("only %d changes of owner, too few for the test to prove anything", owners.adoptions())
	}
	if res := porcupine.CheckOperationsTimeout(ownerModel, ops, 2*time.Minute); res != porcupine.Ok {
		t.Errorf("the history of %d operations is %s", len(ops), res)
		for _, part := range ownerModel.Partition(ops) {
			if porcupine.CheckOperations(ownerModel, part) {
				continue
			}
			for _, op := range part {
				t.Logf("%d: %d–%d %s", op.ClientId, op.Call, op.Return, ownerModel.DescribeOperation(op.Input, op.Output))
			}
		}
	}
	starts.verify(t, owners, requests)
}

// withUnendingJobs adds a model whose servers fail each request with a retryable error.
// Its jobs never end, so their streams last, and every owner has jobs to start.
func withUnendingJobs(text string) string {
	var upstreams, serve strings.Builder
	for line := range strings.Lines(text) {
		name, rest, found := strings.Cut(strings.TrimSpace(line), "-sim: {")
		if !found {
			continue
		}
		_, host, _ := strings.Cut(rest, "http://")
		host, _, _ = strings.Cut(host, ":")
		fmt.Fprintf(&upstreams, "  %s-log: {site: %s, url: \"http://%s:%d/v1\"}\n", name, name, host, requestLogPort)
		fmt.Fprintf(&serve, "      - {upstream: %s-log, model: m}\n", name)
	}
	text = strings.Replace(text, "\nupstreams:\n", "\nupstreams:\n"+upstreams.String(), 1)
	text = strings.Replace(text, "\nmodels:\n", "\nmodels:\n  "+unendingModel+":\n    serve:\n"+serve.String(), 1)
	return text + "jobs: {concurrency: 64, max_attempts: 100}\n"
}

const (
	requestLogPort = 9001
	unendingModel  = "deepseek-unending"
)

// submitUnending submits jobs that never end to a node until ctx ends.
func submitUnending(ctx context.Context, n *lab.Node) {
	body, err := json.Marshal(map[string]any{
		"endpoint": "/v1/chat/completions", "durability": "node",
		"body": map[string]any{"model": unendingModel, "messages": []map[string]string{{"role": "user", "content": "Still there?"}}},
	})
	if err != nil {
		panic(err) // strings always marshal
	}
	for ctx.Err() == nil {
		ask, cancel := context.WithTimeout(ctx, 5*time.Second)
		_, _, _, _ = n.Post(ask, "/v1/jobs", body, nil) // fails while the node is down
		cancel()
		rest(ctx, 700*time.Millisecond)
	}
}

func rest(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}

// longFault causes a fault, ends it and describes it. Two of three last long enough for
// an adoption.
func (s *scenario) longFault(requests *requestLog) string {
	s.t.Helper()
	random, nodes := s.lab.Random, s.lab.Nodes()
	victim := nodes[random.IntN(len(nodes))]
	lasts := time.Duration(500+random.IntN(6000)) * time.Millisecond
	if random.IntN(3) > 0 {
		lasts += 11 * time.Second
	}
	rest := time.Duration(random.IntN(5000)) * time.Millisecond
	what := ""
	switch random.IntN(4) {
	case 0:
		what = victim.Name + " killed"
		victim.Kill()
		s.waitUntil(time.Now().Add(lasts))
		victim.Start()
	case 1:
		what = victim.Name + " stopped"
		victim.Stop()
		s.waitUntil(time.Now().Add(lasts))
		requests.resumed(victim.Name)
		victim.Continue()
	case 2:
		what = victim.Site.Name + " isolated"
		s.lab.Net.Isolate(victim.Site.Index)
		s.waitUntil(time.Now().Add(lasts))
		s.lab.Net.MendAll()
	case 3:
		other := (victim.Site.Index + 1 + random.IntN(len(s.lab.Sites)-1)) % len(s.lab.Sites)
		what = victim.Site.Name + " not heard in " + s.lab.Sites[other].Name
		s.lab.Net.Cut(victim.Site.Index, other)
		s.waitUntil(time.Now().Add(lasts))
		s.lab.Net.MendAll()
	}
	s.waitUntil(time.Now().Add(rest))
	return fmt.Sprintf("%s for %v", what, lasts)
}

// requestLog is one model server per site. They record every request and answer with a
// retryable error.
type requestLog struct {
	mu      sync.Mutex // guards all below
	seen    []request
	resumes map[string][]time.Time // by node
}

// request is a request for an attempt of a job.
type request struct {
	id   string // job-attempt, the executor's X-Request-Id
	site string // of the model server
	at   time.Time
}

func (b *requestLog) listen(t *testing.T, l *lab.Lab, site *lab.Site) {
	t.Helper()
	ln, err := l.Net.Listen(site.Index, requestLogPort)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{ReadHeaderTimeout: 10 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		at := time.Now()
		if !strings.HasSuffix(r.URL.Path, "/chat/completions") {
			w.WriteHeader(http.StatusOK) // a probe
			return
		}
		b.mu.Lock()
		b.seen = append(b.seen, request{r.Header.Get("X-Request-Id"), site.Name, at})
		b.mu.Unlock()
		http.Error(w, `{"error":{"message":"not yet","type":"conflict","code":"not_yet"}}`, http.StatusConflict)
	})}
	go func() { _ = server.Serve(ln) }() // it ends with the listener
	t.Cleanup(func() { _ = server.Close() })
}

func (b *requestLog) resumed(node string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.resumes == nil {
		b.resumes = map[string][]time.Time{}
	}
	b.resumes[node] = append(b.resumes[node], time.Now())
}

// justResumed reports whether a node was continued less than a second before. It may
// have been stopped between the check of its permit and the request, which no program
// can prevent. The product finds such starts, and their results don't count.
func (b *requestLog) justResumed(node string, at time.Time) bool {
	return slices.ContainsFunc(b.resumes[node], func(r time.Time) bool { return !at.Before(r) && at.Sub(r) < time.Second })
}
