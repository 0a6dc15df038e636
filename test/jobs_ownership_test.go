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

// holding is who may execute a stream's jobs: one register a stream, which begins
// empty, whose token only rises, and which ends with the stream.
type holding struct {
	owner string
	token agreed.FenceToken
	done  bool
}

// holdingOp is a read through the log, a change to what is named, from an owner
// that is known or (a stream's opening) none; or the stream's end.
type holdingOp struct {
	stream string
	read   bool
	ends   bool
	from   string
	to     holding
}

var holdingModel = (&porcupine.NondeterministicModel{
	Partition: func(history []porcupine.Operation) [][]porcupine.Operation {
		of := map[string][]porcupine.Operation{}
		for _, op := range history {
			stream := op.Input.(holdingOp).stream
			of[stream] = append(of[stream], op)
		}
		var parts [][]porcupine.Operation
		for _, part := range of {
			parts = append(parts, part)
		}
		return parts
	},
	Init: func() []any { return []any{holding{}} },
	Step: func(state, input, output any) []any {
		is, op := state.(holding), input.(holdingOp)
		switch {
		case op.read && (output.(holding) == is || output.(holding) == holding{} && is.done):
			return []any{is}
		case op.read:
			return nil
		case op.ends && is.owner != "" && !is.done: // at some time, or never
			return []any{is, holding{done: true}}
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

// The model refuses what must not be.
func TestOwnershipModelRefuses(t *testing.T) {
	at := func(call, ret int64, op holdingOp, got holding) porcupine.Operation {
		return porcupine.Operation{ClientId: int(call), Input: op, Output: got, Call: call, Return: ret}
	}
	is := func(owner string, index uint64) holding {
		return holding{owner: owner, token: agreed.FenceToken{Generation: 1, Index: index}}
	}
	read := holdingOp{read: true}
	opened := at(1, 2, holdingOp{to: is("a", 5)}, holding{})
	for name, c := range map[string]struct {
		ops []porcupine.Operation
		ok  bool
	}{
		"opened, adopted":        {[]porcupine.Operation{opened, at(3, 9, holdingOp{from: "a", to: is("b", 7)}, holding{}), at(4, 5, read, is("a", 5)), at(10, 11, read, is("b", 7))}, true},
		"two from one owner":     {[]porcupine.Operation{opened, at(3, 9, holdingOp{from: "a", to: is("b", 7)}, holding{}), at(3, 9, holdingOp{from: "a", to: is("c", 8)}, holding{})}, false},
		"the token falls":        {[]porcupine.Operation{opened, at(3, 9, holdingOp{from: "a", to: is("b", 4)}, holding{})}, false},
		"the token stays":        {[]porcupine.Operation{opened, at(3, 9, holdingOp{from: "a", to: is("b", 5)}, holding{})}, false},
		"a read of the past":     {[]porcupine.Operation{opened, at(3, 4, holdingOp{from: "a", to: is("b", 7)}, holding{}), at(5, 6, read, is("a", 5))}, false},
		"a read from nowhere":    {[]porcupine.Operation{opened, at(5, 6, read, is("c", 6))}, false},
		"ended":                  {[]porcupine.Operation{opened, at(3, never, holdingOp{ends: true}, holding{}), at(5, 6, read, holding{})}, true},
		"not ended yet":          {[]porcupine.Operation{opened, at(3, never, holdingOp{ends: true}, holding{}), at(5, 6, read, is("a", 5))}, true},
		"it is there after all":  {[]porcupine.Operation{opened, at(3, never, holdingOp{ends: true}, holding{}), at(5, 6, read, holding{}), at(7, 8, read, is("a", 5))}, false},
		"gone, and nobody ended": {[]porcupine.Operation{opened, at(5, 6, read, holding{})}, false},
	} {
		t.Run(name, func(t *testing.T) {
			if got := porcupine.CheckOperations(holdingModel, c.ops); got != c.ok {
				t.Errorf("linearizable: %v, want %v", got, c.ok)
			}
		})
	}
}

// ownershipFor is how long the cluster is tormented: an adoption takes ten
// seconds, so a shorter time shows little.
const ownershipFor = 5 * time.Minute

// Under random faults, many of them longer than an owner may be gone, clients at
// all nodes read through the log and past it who executes which stream of jobs.
// What they see is one order of changes for each stream. And what the model
// servers were asked, held against the starts in the journals of all nodes, keeps
// law 4: each start by its token's owner, and none of an owner after the next one
// began, or after its last lease had ended. LAB_SEED repeats faults and questions.
func TestJobsOwnershipIsLinearizable(t *testing.T) {
	fullOnly(t, "an owner must be gone for ten seconds before another follows")
	asked := &requestBook{}
	l := lab.Start(t, lab.Topology{Nodes: []int{2, 1, 1}, Link: lab.RoundTrip(betweenCities)})
	s := &story{t: t, lab: l}
	s.ordinaryLinks()
	for _, site := range l.Sites {
		asked.listen(t, l, site)
	}
	book := &holdingBook{config: withAnchors(l.ClusterYAML()), streams: map[string]*streamSeen{}}
	if err := l.Nodes()[0].ApplyConfig(t.Context(), book.config); err != nil {
		t.Fatal(err)
	}
	l.WaitHealthy(within(returns))
	starts := newStartBook(t, l)
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for i, n := range l.Nodes() {
		seed := l.Random.Uint64()
		wg.Go(func() { book.client(ctx, i, n, seed) })
		wg.Go(func() { handIn(ctx, n) })
	}
	wg.Go(func() { starts.follow(ctx) })
	var faults []string
	for until := time.Now().Add(ownershipFor); time.Now().Before(until); {
		faults = append(faults, s.longFault(asked))
	}
	l.WaitHealthy(time.Minute) // how soon is not what this is about
	stop()
	wg.Wait()
	book.readAll(t, l)
	for _, n := range l.Nodes() {
		n.Terminate(30 * time.Second)
	}
	starts.copyAll()
	t.Logf("faults: %s", strings.Join(faults, ", "))
	ops := book.operations()
	t.Log(book.summary())
	report(t, "things were seen of owners that can't be", book.wrong)
	if book.adoptions() < 5 {
		t.Errorf("only %d changes of owner, that proves little", book.adoptions())
	}
	if res := porcupine.CheckOperationsTimeout(holdingModel, ops, 2*time.Minute); res != porcupine.Ok {
		t.Errorf("the history of %d operations is %s", len(ops), res)
		for _, part := range holdingModel.Partition(ops) {
			if porcupine.CheckOperations(holdingModel, part) {
				continue
			}
			for _, op := range part {
				t.Logf("%d: %d–%d %s", op.ClientId, op.Call, op.Return, holdingModel.DescribeOperation(op.Input, op.Output))
			}
		}
	}
	starts.verify(t, book, asked)
}

// withAnchors adds a model whose servers want each question to be asked again: its
// jobs never end, so streams stay, and each of their owners has something to start.
func withAnchors(text string) string {
	var upstreams, serve strings.Builder
	for line := range strings.Lines(text) {
		name, rest, found := strings.Cut(strings.TrimSpace(line), "-sim: {")
		if !found {
			continue
		}
		_, host, _ := strings.Cut(rest, "http://")
		host, _, _ = strings.Cut(host, ":")
		fmt.Fprintf(&upstreams, "  %s-book: {site: %s, url: \"http://%s:%d/v1\"}\n", name, name, host, bookPort)
		fmt.Fprintf(&serve, "      - {upstream: %s-book, model: m}\n", name)
	}
	text = strings.Replace(text, "\nupstreams:\n", "\nupstreams:\n"+upstreams.String(), 1)
	text = strings.Replace(text, "\nmodels:\n", "\nmodels:\n  "+anchorModel+":\n    serve:\n"+serve.String(), 1)
	return text + "jobs: {concurrency: 64, max_attempts: 100}\n"
}

const (
	bookPort    = 9001
	anchorModel = "deepseek-anchor"
)

// handIn submits jobs that never end at a node, a few each time its stream is new
// and some more as time goes on.
func handIn(ctx context.Context, n *lab.Node) {
	body, err := json.Marshal(map[string]any{
		"endpoint": "/v1/chat/completions", "durability": "node",
		"body": map[string]any{"model": anchorModel, "messages": []map[string]string{{"role": "user", "content": "Still there?"}}},
	})
	if err != nil {
		panic(err) // strings always marshal
	}
	for ctx.Err() == nil {
		ask, cancel := context.WithTimeout(ctx, 5*time.Second)
		_, _, _, _ = n.Post(ask, "/v1/jobs", body, nil) // a node that is down takes none
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

// longFault is a fault of which two in three last longer than an owner may be gone.
func (s *story) longFault(asked *requestBook) string {
	s.t.Helper()
	random, nodes := s.lab.Random, s.lab.Nodes()
	victim := nodes[random.IntN(len(nodes))]
	lasts := time.Duration(500+random.IntN(6000)) * time.Millisecond
	if random.IntN(3) > 0 {
		lasts += 11 * time.Second
	}
	calm := time.Duration(random.IntN(5000)) * time.Millisecond
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
		asked.resumed(victim.Name)
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
	s.waitUntil(time.Now().Add(calm))
	return fmt.Sprintf("%s for %v", what, lasts)
}

// requestBook is model servers that note when they were asked for what, and say
// that it shall be asked again.
type requestBook struct {
	mu      sync.Mutex // guards all below
	seen    []request
	resumes map[string][]time.Time // by node
}

// request is one that came: of a job and its attempt, in a site.
type request struct {
	id   string // job-attempt, as the executor names it
	site string
	at   time.Time
}

func (b *requestBook) listen(t *testing.T, l *lab.Lab, site *lab.Site) {
	t.Helper()
	ln, err := l.Net.Listen(site.Index, bookPort)
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

func (b *requestBook) resumed(node string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.resumes == nil {
		b.resumes = map[string][]time.Time{}
	}
	b.resumes[node] = append(b.resumes[node], time.Now())
}

// justResumed reports whether a node was stopped shortly before: it may have been
// between its last look at the permit and the request, which no program can help.
// Such starts are found and don't count.
func (b *requestBook) justResumed(node string, at time.Time) bool {
	return slices.ContainsFunc(b.resumes[node], func(r time.Time) bool { return !at.Before(r) && at.Sub(r) < time.Second })
}
