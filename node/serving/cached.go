package serving

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net/http"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/dsnode/dsnode/cluster/cause"
	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/node/cache"
	"github.com/dsnode/dsnode/node/openai"
)

// CacheMode is what a client wants of the cache: X-Dsnode-Cache in a request.
type CacheMode string

// The modes. Without one a deterministic answer is looked for and kept.
const (
	CacheStore   CacheMode = "store"    // look for and keep it, deterministic or not
	CacheNoStore CacheMode = "no-store" // neither
	CacheOnly    CacheMode = "only"     // from the cache or not at all
	CacheRefresh CacheMode = "refresh"  // ask an upstream, and keep that answer
)

// CacheStatus is what the cache had to do with an answer: X-Dsnode-Cache.
type CacheStatus string

const (
	HitLocal  CacheStatus = "hit-local"
	HitShared CacheStatus = "hit-shared"
	Stale     CacheStatus = "stale"
	Coalesced CacheStatus = "coalesced"
	Miss      CacheStatus = "miss"
	Bypass    CacheStatus = "bypass"
)

// Cached is the cache's part in an answer.
type Cached struct {
	Status CacheStatus
	// The following are known of a hit and of a stale answer.
	Key  cache.Key
	Age  time.Duration
	Left time.Duration // until it expires, negative of a stale one
}

// cached answers from the cache, or lets identical requests in flight share one
// answer, which it keeps.
type cached struct {
	next    Server
	cache   *cache.Cache // nil: none
	flights *flights
	log     *slog.Logger
}

// Serve looks for a kept answer first.
func (s *cached) Serve(ctx context.Context, r Request, sink Sink) error {
	plan := s.plan(&r)
	var key cache.Key
	usable := false
	if plan.lookup || plan.keep {
		q := question(&r)
		key, usable = s.cache.Key(&q)
	}
	if !usable {
		return s.bypass(ctx, r, sink, plan.only)
	}
	life := cache.LifeOf(r.model.Cache)
	var old cache.Found
	if plan.lookup {
		found, ok := s.cache.Local(key, r.model.Name, life)
		if ok && found.Fresh {
			return replay(sink, key, found, HitLocal)
		}
		old = found
	}
	if plan.only {
		if found, ok := s.cache.Shared(ctx, key, r.model.Name, life); ok && found.Fresh {
			return replay(sink, key, found, HitShared)
		}
		return ErrNotCached
	}
	r.cached = Miss
	f, reader, leads := s.flights.join(ctx, key, s.cache.Purges(), plan.lookup, s.cache.EntryBytes())
	switch {
	case f == nil: // too many answers are shared already
		return s.next.Serve(ctx, r, sink)
	case leads:
		s.begin(f, r, plan, old)
	default:
		s.cache.Note(cache.Coalesced)
	}
	return f.follow(ctx, reader, sink)
}

func (s *cached) bypass(ctx context.Context, r Request, sink Sink, only bool) error {
	if only {
		return ErrNotCached
	}
	if s.cache != nil && r.Hops == 0 {
		s.cache.Note(cache.Bypass)
	}
	r.cached = Bypass
	return s.next.Serve(ctx, r, sink)
}

// cachePlan is what the cache does for one request.
type cachePlan struct {
	lookup, keep bool
	only         bool // the answer comes from the cache or not at all
}

func (s *cached) plan(r *Request) cachePlan {
	if s.cache == nil {
		return cachePlan{only: r.Cache == CacheOnly && r.Hops == 0}
	}
	return planCache(r, &r.model.Cache)
}

// planCache decides whether a request may be answered from the cache, and its answer
// kept. The answer to a peer's request is kept by the node that the client asked.
func planCache(r *Request, m *config.ModelCache) cachePlan {
	only := r.Cache == CacheOnly
	embeds := r.Endpoint.Embeds
	switch {
	case r.Hops > 0:
		return cachePlan{}
	case !m.Enabled, m.Store == config.StoreNone, r.Cache == CacheNoStore:
		return cachePlan{only: only}
	case !r.Endpoint.Cacheable, embeds && r.Stream:
		return cachePlan{only: only}
	case only:
		return cachePlan{lookup: true, only: true}
	case r.Cache == CacheRefresh:
		return cachePlan{keep: true}
	case r.Cache == CacheStore, m.Store == config.StoreAll, r.Deterministic, embeds:
		return cachePlan{lookup: true, keep: true}
	}
	return cachePlan{}
}

// question is what the answer to a request depends on. Tenants never share
// answers, keys without a tenant neither.
func question(r *Request) cache.Question {
	owner := "tenant " + r.Principal.Tenant
	if r.Principal.Tenant == "" {
		owner = "key " + r.Principal.KeyID
	}
	q := cache.Question{
		Owner: owner, Endpoint: r.Endpoint.Path, Model: r.model.Name, Revision: r.model.Revision, Shape: cache.Plain, Body: r.Body,
	}
	if r.Stream {
		q.Shape = cache.Stream
	}
	for _, name := range [...]string{"Openai-Beta", "Accept-Language"} {
		if v := r.Header[name]; len(v) > 0 {
			// No value has a line break, so different values never give the same text.
			q.Headers = append(q.Headers, name, strings.Join(v, "\n"))
		}
	}
	return q
}

// begin fetches the answer of a flight in the background. It goes on after the request
// that began it has ended, while some other one still reads.
func (s *cached) begin(f *flight, r Request, plan cachePlan, old cache.Found) {
	s.flights.work.Go(func() { s.fetch(f, r, plan, old) })
}

// fetch gets the answer from the shared tier or from the next stage, and keeps it. old
// is an expired answer of the local tier, if there is one.
func (s *cached) fetch(f *flight, r Request, plan cachePlan, old cache.Found) {
	err := errFlightLost // unless what follows gets to its end
	defer func() {
		if p := recover(); p != nil {
			s.log.Error("panic while answering a request", "request", r.ID, "panic", cause.Panic(p), "stack", string(debug.Stack()))
		}
		s.flights.remove(f)
		f.end(err)
	}()
	if plan.lookup {
		found, ok := s.cache.Shared(f.ctx, f.key, r.model.Name, cache.LifeOf(r.model.Cache))
		if ok && found.Fresh {
			err = replay(f, f.key, found, HitShared)
			return
		}
		if ok && (old.Answer == nil || found.Age < old.Age) {
			old = found
		}
	}
	err = s.next.Serve(f.ctx, r, f)
	switch {
	case err == nil:
		if a := f.answer(&r); a != nil {
			a.Purge = f.purge
			s.cache.Keep(f.key, r.model.Name, a)
		}
	case old.Answer != nil && !f.begun() && excusesStale(err):
		s.log.Info("no upstream can answer, serving an expired answer", "request", r.ID, "model", r.model.Name, "age", old.Age, "err", err)
		err = replay(f, f.key, old, Stale)
	}
}

// excusesStale reports that no server could answer. A server that refused the request
// is an answer.
func excusesStale(err error) bool {
	none := []error{ErrNoUpstream, ErrOverloaded, ErrTimeout, ErrTruncated, ErrUpstreamFailed}
	return slices.ContainsFunc(none, func(e error) bool { return errors.Is(err, e) })
}

// replay gives a kept answer to a sink, a stream in the events that it had.
func replay(sink Sink, key cache.Key, found cache.Found, status CacheStatus) error {
	a := found.Answer
	h := Head{
		Status: http.StatusOK, Header: typed(a.ContentType), Length: int64(len(a.Body)), Whole: !a.Stream, Stream: a.Stream,
		Cache: Cached{Status: status, Key: key, Age: found.Age, Left: found.Left},
	}
	if a.Stream {
		h.Length = -1
	}
	if err := sink.Head(h); err != nil {
		return err
	}
	if !a.Stream {
		return sink.Data(a.Body)
	}
	batch, batches := sink.(Batcher)
	from := 0
	for _, to := range a.Ends {
		var err error
		if batches {
			err = batch.Hold(a.Body[from:to])
		} else {
			err = sink.Data(a.Body[from:to])
		}
		if err != nil {
			return err
		}
		from = to
	}
	if batches {
		return batch.Flush()
	}
	return nil
}

var jsonAnswer = http.Header{"Content-Type": {"application/json"}}

// typed is a header with a content type, shared by nearly all answers.
func typed(kind string) http.Header {
	if kind == "application/json" {
		return jsonAnswer
	}
	return http.Header{"Content-Type": {kind}}
}

// answer is what the flight brought, nil when it must not be kept: it is too large,
// not the asked model's, or not whole.
func (f *flight) answer(r *Request) *cache.Answer {
	f.mu.Lock()
	defer f.mu.Unlock()
	h := &f.head
	switch {
	case !f.whole, !f.headed, h.Status != http.StatusOK, h.Model != r.model.Name, h.Stream != r.Stream,
		h.Header.Get("X-Dsnode-Degraded") != "":
		return nil
	}
	a := &cache.Answer{ContentType: h.Header.Get("Content-Type"), Stream: h.Stream}
	for _, piece := range f.pieces {
		a.Body = append(a.Body, piece...)
		if h.Stream {
			a.Ends = append(a.Ends, len(a.Body))
		}
	}
	if !h.Stream && !completePlain(r.Endpoint, a.Body) {
		return nil
	}
	// An answer that a content filter cut off may pass it another time.
	if bytes.Contains(a.Body, []byte(`"content_filter"`)) {
		return nil
	}
	return a
}

// completePlain reports whether a plain answer says that it is whole. Of a stream the
// relay has made sure.
func completePlain(e *openai.Endpoint, body []byte) bool {
	if !e.Completes {
		_, ok := openai.Member(body, "data")
		return ok
	}
	found, ok := openai.ScanAnswer(body)
	return ok && found.Complete() && !found.Exhausted
}
