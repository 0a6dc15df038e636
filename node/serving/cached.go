package serving

import (
	"bytes"
	"context"
	"errors"
	"net/http"
	"strings"
	"time"

	"github.com/dsnode/dsnode/cluster"
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
	CacheRefresh CacheMode = "refresh"  // ask anew, and keep that
)

// CacheStatus is what the cache had to do with an answer: X-Dsnode-Cache.
type CacheStatus string

// The statuses.
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

// cachePlan is what is done for one request.
type cachePlan struct {
	lookup, keep, only bool
}

// none: the cache has no part in it.
func (c cachePlan) none() bool { return !c.lookup && !c.keep }

// planCache decides whether a request may be answered from the cache, and its
// answer kept. A request that a peer passed on is its own node's to keep.
func planCache(r *Request, m *cluster.ModelCache) cachePlan {
	only := r.Cache == CacheOnly
	switch {
	case r.Hops > 0:
		return cachePlan{}
	case !m.Enabled, m.Store == cluster.StoreNone, r.Cache == CacheNoStore:
		return cachePlan{only: only}
	case !r.Endpoint.Cacheable, r.Endpoint.Embeds && r.Stream:
		return cachePlan{only: only}
	case only:
		return cachePlan{lookup: true, only: true}
	case r.Cache == CacheRefresh:
		return cachePlan{keep: true}
	case r.Cache == CacheStore, m.Store == cluster.StoreAll, r.Deterministic, r.Endpoint.Embeds:
		return cachePlan{lookup: true, keep: true}
	}
	return cachePlan{}
}

// question is what the answer to a request depends on. Tenants never share
// answers, keys without a tenant neither.
func question(r *Request, m *model) cache.Question {
	owner := "tenant " + r.Principal.Tenant
	if r.Principal.Tenant == "" {
		owner = "key " + r.Principal.KeyID
	}
	q := cache.Question{
		Owner: owner, Endpoint: r.Endpoint.Path, Model: r.Model, Revision: m.revision, Shape: cache.Plain, Body: r.Body,
	}
	if r.Stream {
		q.Shape = cache.Stream
	}
	for _, name := range [...]string{"Openai-Beta", "Accept-Language"} {
		if v := r.Header[name]; len(v) > 0 {
			// No value holds a line's end, so no two sets of lines are one.
			q.Headers = append(q.Headers, name, strings.Join(v, "\n"))
		}
	}
	return q
}

// cached is the step before the pool: an answer that was kept, or one that is
// just being fetched for somebody else, or a new one.
func (p *Pipeline) cached(ctx context.Context, t *table, m *model, r *Request, sink Sink) error {
	plan := cachePlan{}
	if p.cache != nil {
		plan = planCache(r, &m.cache)
	} else {
		plan.only = r.Cache == CacheOnly && r.Hops == 0
	}
	var key cache.Key
	usable := false
	if !plan.none() {
		q := question(r, m)
		key, usable = p.cache.Key(&q)
	}
	if !usable {
		if plan.only {
			return ErrNotCached
		}
		if p.cache != nil && r.Hops == 0 {
			p.cache.Note(cache.Bypass)
		}
		return p.fetch(ctx, t, m, r, sink, Bypass)
	}
	life := cache.LifeOf(m.cache)
	var old cache.Found
	if plan.lookup {
		found, ok := p.cache.Local(key, r.Model, life)
		if ok && found.Fresh {
			return replay(sink, key, found, HitLocal)
		}
		old = found
	}
	if plan.only {
		if found, ok := p.cache.Shared(ctx, key, r.Model, life); ok && found.Fresh {
			return replay(sink, key, found, HitShared)
		}
		return ErrNotCached
	}
	f, seat, leads := p.flights.board(ctx, key, p.cache.Purges(), plan.lookup, p.cache.EntryBytes())
	if f == nil { // there is no room to share
		return p.fetch(ctx, t, m, r, sink, Miss)
	}
	if leads {
		p.flights.work.Go(func() { p.lead(f, t, m, r, plan, old) })
	} else {
		p.cache.Note(cache.Coalesced)
	}
	return f.follow(ctx, seat, sink)
}

// lead gets the answer of a flight. It outlives the request that began it, as
// long as somebody waits.
func (p *Pipeline) lead(f *flight, t *table, m *model, r *Request, plan cachePlan, old cache.Found) {
	err := errFlightLost // unless what follows gets to its end
	defer func() {
		if lost := recover(); lost != nil {
			p.log.Error("a request failed beyond words", "request", r.ID, "panic", lost)
		}
		p.flights.leave(f)
		f.end(err)
	}()
	if plan.lookup {
		found, ok := p.cache.Shared(f.ctx, f.key, r.Model, cache.LifeOf(m.cache))
		if ok && found.Fresh {
			err = replay(f, f.key, found, HitShared)
			return
		}
		if ok && (old.Answer == nil || found.Age < old.Age) {
			old = found
		}
	}
	err = p.fetch(f.ctx, t, m, r, f, Miss)
	switch {
	case err == nil:
		if a := f.answer(r); a != nil {
			a.Purge = f.purge
			p.cache.Keep(f.key, r.Model, a)
		}
	case old.Answer != nil && !f.begun() && excusesStale(err):
		p.log.Info("nobody can answer, an expired answer is served", "request", r.ID, "model", m.name, "age", old.Age, "err", err)
		err = replay(f, f.key, old, Stale)
	}
}

// excusesStale: nobody could answer, as opposed to somebody who refused.
func excusesStale(err error) bool {
	var busy *BusyError
	if errors.As(err, &busy) {
		return true
	}
	for _, e := range []error{ErrNoUpstream, ErrOverloaded, ErrTimeout, ErrTruncated, ErrUpstreamFailed} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// replay gives a kept answer to a sink, a stream with the chunks it had.
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

// answer is what the flight brought, nil when it must not be kept: when it is
// too large, not what the asked model says, or not whole.
func (f *flight) answer(r *Request) *cache.Answer {
	f.mu.Lock()
	defer f.mu.Unlock()
	h := &f.head
	switch {
	case !f.whole, !f.headed, h.Status != http.StatusOK, h.Model != r.Model, h.Stream != r.Stream,
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
	// What a filter cut off may pass another time.
	if bytes.Contains(a.Body, []byte(`"content_filter"`)) {
		return nil
	}
	return a
}

// completePlain looks once more whether a plain answer says that it is whole.
// Of a stream the relay has made sure.
func completePlain(e *openai.Endpoint, body []byte) bool {
	if !e.Completes {
		_, ok := openai.Member(body, "data")
		return ok
	}
	found, ok := openai.ScanAnswer(body)
	return ok && found.Complete() && !found.Exhausted
}
