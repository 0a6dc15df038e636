package serving

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/node/cache"
	"github.com/dsnode/dsnode/node/openai"
	"github.com/dsnode/dsnode/node/upstream"
	"github.com/dsnode/dsnode/storage/keyring/keyringtest"
)

// keeping gives a rig a cache in memory, whose clock can be set forward.
func keeping(ahead *atomic.Int64) rigOption {
	return func(r *rig, _ *upstream.Options) {
		ring, _ := keyringtest.New(r.t(), 1)
		c, err := cache.New(cache.Options{Site: "east", Ring: ring, Registerer: r.reg, Now: func() time.Time {
			if ahead == nil {
				return time.Now()
			}
			return time.Now().Add(time.Duration(ahead.Load()))
		}})
		if err != nil {
			panic(err)
		}
		r.cache = c
		for name, m := range r.conf.Models {
			m.Cache = config.ModelCache{
				Enabled: true, Store: config.StoreDeterministic, LocalTTL: seconds(600), SharedTTL: seconds(3600), Stale: seconds(86400),
			}
			r.conf.Models[name] = m
		}
	}
}

// t is for keyringtest, whose New can't fail.
func (*rig) t() testing.TB { return &testing.T{} }

// cold is a deterministic request.
func cold(stream bool, extra ...string) Request {
	body := fmt.Sprintf(`{"model":"m","stream":%t,"temperature":0,"messages":[{"role":"user","content":"hi"}]%s}`, stream, strings.Join(extra, ""))
	return request("/v1/chat/completions", body, stream)
}

func cacheStatus(saw *recorder) CacheStatus {
	if len(saw.heads) == 0 {
		return ""
	}
	return saw.heads[0].Cache.Status
}

// TestPlanCache: which requests may be answered from the cache.
func TestPlanCache(t *testing.T) {
	on := config.ModelCache{Enabled: true, Store: config.StoreDeterministic}
	all, none := on, on
	all.Store, none.Store = config.StoreAll, config.StoreNone
	var off config.ModelCache
	endpoint := openai.EndpointAt
	chat := openai.Request{Endpoint: endpoint("/v1/chat/completions")}
	cold, completion := chat, openai.Request{Endpoint: endpoint("/v1/completions"), Deterministic: true}
	cold.Deterministic = true
	embed, embeds := openai.Request{Endpoint: endpoint("/v1/embeddings")}, openai.Request{Endpoint: endpoint("/v1/embeddings"), Stream: true}
	other := openai.Request{Endpoint: endpoint("/v1/responses"), Deterministic: true}
	both, look, keep, no := cachePlan{lookup: true, keep: true}, cachePlan{lookup: true, only: true}, cachePlan{keep: true}, cachePlan{}
	for _, c := range []struct {
		name string
		r    Request
		m    config.ModelCache
		want cachePlan
	}{
		{"temperature 0", Request{Request: cold}, on, both},
		{"temperature 0, completion", Request{Request: completion}, on, both},
		{"any temperature", Request{Request: chat}, on, no},
		{"any temperature, all are kept", Request{Request: chat}, all, both},
		{"embeddings", Request{Request: embed}, on, both},
		{"streamed embeddings", Request{Request: embeds}, on, no},
		{"another endpoint", Request{Request: other}, all, no},
		{"store", Request{Request: chat, Cache: CacheStore}, on, both},
		{"store, but none are kept", Request{Request: chat, Cache: CacheStore}, none, no},
		{"no-store", Request{Request: cold, Cache: CacheNoStore}, all, no},
		{"only", Request{Request: chat, Cache: CacheOnly}, on, look},
		{"only, switched off", Request{Request: chat, Cache: CacheOnly}, off, cachePlan{only: true}},
		{"only, another endpoint", Request{Request: other, Cache: CacheOnly}, on, cachePlan{only: true}},
		{"refresh", Request{Request: chat, Cache: CacheRefresh}, on, keep},
		{"switched off", Request{Request: cold}, off, no},
		{"from a peer", Request{Request: cold, Hops: 1}, on, no},
	} {
		if got := planCache(&c.r, &c.m); got != c.want {
			t.Errorf("%s: %+v, want %+v", c.name, got, c.want)
		}
	}
}

// TestHit: the second time no upstream is asked, and a stream has the same events.
func TestHit(t *testing.T) {
	for _, stream := range []bool{false, true} {
		up := newServer(t, "up", well)
		r := newRig(t, []*server{up}, keeping(nil))
		first, err := r.serve(t, cold(stream))
		if err != nil {
			t.Fatal(err)
		}
		second, err := r.serve(t, cold(stream))
		if err != nil {
			t.Fatal(err)
		}
		if cacheStatus(first) != Miss || cacheStatus(second) != HitLocal {
			t.Errorf("stream %v: %s, then %s", stream, cacheStatus(first), cacheStatus(second))
		}
		if up.hits.Load() != 1 || !slices.Equal(first.events, second.events) {
			t.Errorf("stream %v: asked %d times, %q then %q", stream, up.hits.Load(), first.events, second.events)
		}
		h := second.heads[0]
		if h.Stream != stream || h.Header.Get("Content-Type") != first.heads[0].Header.Get("Content-Type") || h.Attempts != 0 || h.Cache.Key.IsZero() {
			t.Errorf("head %+v", h)
		}
		if third, err := r.serve(t, cold(!stream)); err != nil || cacheStatus(third) != Miss {
			t.Errorf("the other shape: %v, %s", err, cacheStatus(third))
		}
		refresh := cold(stream)
		refresh.Cache = CacheRefresh
		if again, err := r.serve(t, refresh); err != nil || cacheStatus(again) != Miss || up.hits.Load() != 3 {
			t.Errorf("refresh: %v, %s", err, cacheStatus(again))
		}
		only := cold(stream)
		only.Cache = CacheOnly
		if again, err := r.serve(t, only); err != nil || cacheStatus(again) != HitLocal {
			t.Errorf("only: %v, %s", err, cacheStatus(again))
		}
		only = cold(stream, `,"seed":1`)
		only.Cache = CacheOnly
		if _, err := r.serve(t, only); !errors.Is(err, ErrNotCached) || up.hits.Load() != 3 {
			t.Errorf("only, of nothing: %v", err)
		}
		warm, err := r.serve(t, chat(stream))
		if err != nil || cacheStatus(warm) != Bypass {
			t.Errorf("not deterministic: %v, %s", err, cacheStatus(warm))
		}
	}
}

// TestOwners: tenants don't share answers, and keys without a tenant don't either.
func TestOwners(t *testing.T) {
	up := newServer(t, "up", well)
	r := newRig(t, []*server{up}, keeping(nil))
	hits := int64(0)
	for _, who := range []Principal{{}, {Tenant: "a"}, {Tenant: "b"}, {KeyID: "a"}, {KeyID: "k", Tenant: "c"}} {
		for range 2 {
			req := cold(false)
			req.Principal = who
			if _, err := r.serve(t, req); err != nil {
				t.Fatal(err)
			}
		}
		hits++
		if up.hits.Load() != hits {
			t.Errorf("%+v: asked %d times, want %d", who, up.hits.Load(), hits)
		}
	}
	// Keys of one tenant share.
	req := cold(false)
	req.Principal = Principal{KeyID: "other", Tenant: "c"}
	if saw, err := r.serve(t, req); err != nil || cacheStatus(saw) != HitLocal {
		t.Errorf("%v, %s", err, cacheStatus(saw))
	}
}

// TestHeadersInTheKey: headers that may change an answer are a part of its key, however
// they are spread over lines.
func TestHeadersInTheKey(t *testing.T) {
	up := newServer(t, "up", well)
	r := newRig(t, []*server{up}, keeping(nil))
	for i, h := range []http.Header{
		{},
		{"Openai-Beta": {"x"}},
		{"Openai-Beta": {"x", "y"}},
		{"Openai-Beta": {"x", "Accept-Language", "y"}},
		{"Openai-Beta": {"x"}, "Accept-Language": {"y"}},
		{"Accept-Language": {"x"}},
	} {
		for range 2 {
			req := cold(false)
			req.Header = h
			if _, err := r.serve(t, req); err != nil {
				t.Fatal(err)
			}
		}
		if got := up.hits.Load(); got != int64(i+1) {
			t.Errorf("%v: asked %d times, want %d", h, got, i+1)
		}
	}
}

// TestWhatIsNotKept: answers that failed, were cut or filtered are not kept.
func TestWhatIsNotKept(t *testing.T) {
	cut := strings.Replace(plainBody, `"stop"`, `null`, 1)
	exhausted := strings.Replace(plainBody, `"stop"`, `"insufficient_system_resource"`, 1)
	filtered := strings.Replace(plainBody, `"stop"`, `"content_filter"`, 1)
	for _, c := range []struct {
		name   string
		stream bool
		answer answering
	}{
		{"429", false, status(429)},
		{"400", false, plain(400, `{"error":{"message":"no"}}`)},
		{"500", false, status(500)},
		{"201", false, plain(201, plainBody)},
		{"an error under a 200", false, plain(200, `{"error":{"message":"x"}}`)},
		{"no finish_reason", false, plain(200, cut)},
		{"exhausted", false, plain(200, exhausted)},
		{"filtered", false, plain(200, filtered)},
		{"cut stream", true, events(roleChunk + delta("Hel"))},
		{"reset stream", true, then(events(roleChunk+delta("Hel")), abort)},
		{"[DONE] without finish_reason", true, events(roleChunk + delta("Hel") + doneChunk)},
		{"an error event", true, events(roleChunk + delta("Hel") + `data: {"error":{"message":"x"}}` + "\n\n")},
		{"exhausted stream", true, events(roleChunk + delta("Hel") + strings.Replace(finishChunk, "stop", "insufficient_system_resource", 1) + doneChunk)},
		{"filtered stream", true, events(roleChunk + delta("Hel") + strings.Replace(finishChunk, "stop", "content_filter", 1) + doneChunk)},
	} {
		t.Run(c.name, func(t *testing.T) {
			up := newServer(t, "up", c.answer)
			r := newRig(t, []*server{up}, keeping(nil))
			_, _ = r.serve(t, cold(c.stream)) // whatever comes of it
			only := cold(c.stream)
			only.Cache = CacheOnly
			if saw, err := r.serve(t, only); !errors.Is(err, ErrNotCached) {
				t.Errorf("kept: %v, %q", err, saw.text())
			}
		})
	}
}

func TestFallbacksAnswerIsNotKept(t *testing.T) {
	r, up, _ := threeSites(t, status(500), status(500), well, keeping(nil))
	for i := range int64(2) {
		saw, err := r.serve(t, request("/v1/chat/completions", `{"messages":[],"model":"first"}`, false))
		if err != nil || cacheStatus(saw) != Miss || up["far"].hits.Load() != i+1 {
			t.Fatalf("%v, %s, asked %d times", err, cacheStatus(saw), up["far"].hits.Load())
		}
	}
}

// TestStaleIfError: when no upstream can answer, an expired answer is given while it is
// kept. A refusal is an answer.
func TestStaleIfError(t *testing.T) {
	for _, stream := range []bool{false, true} {
		var ahead atomic.Int64
		up := newServer(t, "up", well)
		r := newRig(t, []*server{up}, keeping(&ahead))
		first, err := r.serve(t, cold(stream))
		if err != nil {
			t.Fatal(err)
		}
		up.set(status(500))
		ahead.Store(int64(2 * time.Hour))
		saw, err := r.serve(t, cold(stream))
		if err != nil {
			t.Fatal(err)
		}
		if h := saw.heads[0].Cache; h.Status != Stale || h.Age < 2*time.Hour-time.Minute || h.Left > -time.Hour+time.Minute {
			t.Errorf("%+v", h)
		}
		if !slices.Equal(first.events, saw.events) || up.hits.Load() != 2 {
			t.Errorf("%q, asked %d times", saw.events, up.hits.Load())
		}
		up.set(plain(400, `{"error":{"message":"no"}}`))
		var refused *StatusError
		if _, err := r.serve(t, cold(stream)); !errors.As(err, &refused) {
			t.Errorf("a refusal: %v", err)
		}
		up.set(status(500))
		ahead.Store(int64(26 * time.Hour))
		if _, err := r.serve(t, cold(stream)); err == nil {
			t.Error("an answer older than the configured stale time")
		}
	}
}

// gate is an upstream that waits in the middle of its answer.
func gate(stream bool, open <-chan struct{}) answering {
	return func(w http.ResponseWriter, r *http.Request) {
		if !stream {
			select {
			case <-open:
				plain(200, plainBody)(w, r)
			case <-r.Context().Done():
			}
			return
		}
		events(roleChunk+delta("Hel"))(w, r)
		select {
		case <-open:
			for _, e := range strings.SplitAfter(delta("lo")+finishChunk+doneChunk, "\n\n") {
				_, _ = io.WriteString(w, e)
				flush(w)
			}
		case <-r.Context().Done():
		}
	}
}

// TestThousandAtOnce: one upstream call, and all requests have the answer.
func TestThousandAtOnce(t *testing.T) {
	for _, stream := range []bool{false, true} {
		open := make(chan struct{})
		up := newServer(t, "up", gate(stream, open))
		r := newRig(t, []*server{up}, keeping(nil))
		const n = 1000
		var group sync.WaitGroup
		var statuses sync.Map
		for range n {
			group.Go(func() {
				saw, err := r.serve(t, cold(stream))
				want := plainBody
				if stream {
					want = wellStream
				}
				if err != nil || saw.text() != want {
					t.Errorf("%v: %q", err, saw.text())
				}
				count, _ := statuses.LoadOrStore(cacheStatus(saw), new(atomic.Int64))
				count.(*atomic.Int64).Add(1)
			})
		}
		eventuallyLong(t, "all are waiting", func() bool { return r.metric("dsnode_cache_requests_total", "result", "coalesced") == n-1 })
		close(open)
		group.Wait()
		if up.hits.Load() != 1 {
			t.Errorf("stream %v: %d upstream calls", stream, up.hits.Load())
		}
		if c, ok := statuses.Load(Coalesced); !ok || c.(*atomic.Int64).Load() != n-1 {
			t.Errorf("stream %v: not %d coalesced", stream, n-1)
		}
	}
}

func eventuallyLong(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for range 8 {
		deadline := time.After(5 * time.Second)
		tick := time.NewTicker(5 * time.Millisecond)
		for waiting := true; waiting; {
			if ok() {
				tick.Stop()
				return
			}
			select {
			case <-deadline:
				waiting = false
			case <-tick.C:
			}
		}
		tick.Stop()
	}
	t.Fatalf("never happened: %s", what)
}

// TestFirstMayLeave: the others get the whole answer. When all have gone the upstream
// stops, and the next request asks it again.
func TestFirstMayLeave(t *testing.T) {
	for _, stream := range []bool{false, true} {
		open := make(chan struct{})
		up := newServer(t, "up", gate(stream, open))
		r := newRig(t, []*server{up}, keeping(nil))
		type end struct {
			saw *recorder
			err error
		}
		begin := func() (context.CancelFunc, chan end) {
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan end, 1)
			go func() {
				saw := &recorder{}
				err := r.Serve(ctx, cold(stream), saw)
				done <- end{saw, err}
			}()
			return cancel, done
		}
		leave, first := begin()
		eventually(t, "the upstream is asked", func() bool { return up.active.Load() == 1 })
		stay, second := begin()
		defer stay()
		eventually(t, "the second has joined", func() bool { return r.metric("dsnode_cache_requests_total", "result", "coalesced") == 1 })
		leave()
		if e := <-first; !errors.Is(e.err, context.Canceled) {
			t.Errorf("the first: %v", e.err)
		}
		close(open)
		e := <-second
		want := plainBody
		if stream {
			want = wellStream
		}
		if e.err != nil || e.saw.text() != want || up.hits.Load() != 1 {
			t.Errorf("the second: %v, %q, asked %d times", e.err, e.saw.text(), up.hits.Load())
		}

		// All leave.
		up.set(gate(stream, make(chan struct{})))
		req := func() Request { return cold(stream, `,"seed":7`) }
		ctx, cancel := context.WithCancel(t.Context())
		var group sync.WaitGroup
		for range 5 {
			group.Go(func() {
				if err := r.Serve(ctx, req(), &recorder{}); !errors.Is(err, context.Canceled) {
					t.Errorf("one that has gone: %v", err)
				}
			})
		}
		eventually(t, "all wait", func() bool {
			return up.active.Load() == 1 && r.metric("dsnode_cache_requests_total", "result", "coalesced") == 5
		})
		cancel()
		group.Wait()
		eventually(t, "the upstream stops", func() bool { return up.active.Load() == 0 })
		up.set(well)
		if saw, err := r.serve(t, req()); err != nil || cacheStatus(saw) != Miss {
			t.Errorf("afterwards: %v, %s", err, cacheStatus(saw))
		}
	}
}

// TestSharedFailure: all requests get the error.
func TestSharedFailure(t *testing.T) {
	open := make(chan struct{})
	up := newServer(t, "up", func(w http.ResponseWriter, r *http.Request) {
		<-open
		status(500)(w, r)
	})
	r := newRig(t, []*server{up}, keeping(nil))
	var group sync.WaitGroup
	for range 20 {
		group.Go(func() {
			if _, err := r.serve(t, cold(true)); !errors.Is(err, ErrUpstreamFailed) {
				t.Errorf("%v", err)
			}
		})
	}
	eventually(t, "all wait", func() bool { return r.metric("dsnode_cache_requests_total", "result", "coalesced") == 19 })
	close(open)
	group.Wait()
	if up.hits.Load() != 1 {
		t.Errorf("asked %d times", up.hits.Load())
	}
}

// TestSlowReader doesn't hold up the others: one that is too far behind is cut off with an
// error. Alone it sets the pace itself.
func TestSlowReader(t *testing.T) {
	word := delta(strings.Repeat("x", 1000))
	long := roleChunk + strings.Repeat(word, 3000) + finishChunk + doneChunk // 3 MiB, of which 1 are held
	open := make(chan struct{})
	up := newServer(t, "up", func(w http.ResponseWriter, r *http.Request) {
		events(roleChunk+word)(w, r)
		<-open
		events(strings.TrimPrefix(long, roleChunk+word))(w, r)
	})
	r := newRig(t, []*server{up}, keeping(nil))
	goOn := make(chan struct{})
	slow := &recorder{onData: func(n int) error {
		if n == 2 {
			<-goOn
		}
		return nil
	}}
	ends := make(chan error, 1)
	go func() { ends <- r.Serve(t.Context(), cold(true), slow) }()
	eventually(t, "the upstream is asked", func() bool { return up.active.Load() == 1 })
	fast := make(chan *recorder, 1)
	go func() {
		saw, err := r.serve(t, cold(true))
		if err != nil {
			t.Error(err)
		}
		fast <- saw
	}()
	eventually(t, "the second has joined", func() bool { return r.metric("dsnode_cache_requests_total", "result", "coalesced") == 1 })
	close(open)
	if saw := <-fast; saw.text() != long {
		t.Errorf("the fast one has %d bytes of %d", len(saw.text()), len(long))
	}
	close(goOn)
	if err := <-ends; !errors.Is(err, ErrLagging) {
		t.Errorf("the slow one: %v", err)
	}
	// Too long to be kept.
	only := cold(true)
	only.Cache = CacheOnly
	if _, err := r.serve(t, only); !errors.Is(err, ErrNotCached) {
		t.Errorf("kept: %v", err)
	}
	if r.flights.bytes != 0 || r.flights.count != 0 {
		t.Errorf("%d bytes, %d flights left", r.flights.bytes, r.flights.count)
	}
	saw, err := r.serve(t, cold(true, `,"seed":1`))
	if err != nil || saw.text() != long {
		t.Errorf("alone: %v, %d bytes", err, len(saw.text()))
	}
}

// TestPeersAnswerIsKept by the node that the client asked, and not by the peer.
func TestPeersAnswerIsKept(t *testing.T) {
	r, _, sites := threeSites(t, status(500), well, well, keeping(nil))
	for i, want := range []CacheStatus{Miss, HitLocal} {
		saw, err := r.serve(t, cold(true))
		if err != nil || cacheStatus(saw) != want || saw.text() != wellStream {
			t.Fatalf("%d: %v, %s, %q", i, err, cacheStatus(saw), saw.text())
		}
	}
	if sites["east2"].hits.Load() != 1 {
		t.Errorf("the peer was asked %d times", sites["east2"].hits.Load())
	}
}

func BenchmarkHit(b *testing.B) {
	ring, _ := keyringtest.New(b, 1)
	c, err := cache.New(cache.Options{Site: "east", Ring: ring})
	if err != nil {
		b.Fatal(err)
	}
	conf := &config.Config{
		Sites: map[string]config.Site{"east": {}}, Upstreams: map[string]config.Upstream{"a": {Site: "east", URL: "http://x/v1"}},
		Models: map[string]config.Model{"m": {
			Serve: []config.Serve{{Upstream: "a"}},
			Cache: config.ModelCache{Enabled: true, Store: config.StoreDeterministic, LocalTTL: seconds(600), SharedTTL: seconds(3600)},
		}},
	}
	up := &canned{"application/json", []byte(strings.Replace(plainBody, "hello", strings.Repeat("word ", 160), 1))}
	p := cannedPipeline(b, conf, up, c)
	req := cold(false)
	sink := &nowhere{}
	if err := p.Serve(b.Context(), req, sink); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if err := p.Serve(b.Context(), req, sink); err != nil {
			b.Fatal(err)
		}
	}
}
