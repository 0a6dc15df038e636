package serving

import (
	"net/http"
	"slices"
	"time"
)

// candidate is a backend that a request may be sent to now; the permit has
// been taken.
type candidate struct {
	permit permit
	client http.RoundTripper
	model  *model
	target target // of an upstream
	peer   *peer  // or the peer
	timers timers
}

// search is one request's way through the pool: the own site's upstreams, the
// same city's sites, remote sites, then what is broken as a last resort; and
// the same again for each fallback model. No upstream is asked twice, no peer
// site either, unless its first node failed at connect.
type search struct {
	p      *Pipeline
	t      *table
	r      *Request
	now    time.Time
	model  *model
	rest   []string // fallbacks not yet tried
	cached CacheStatus
	stage  stage
	site   int // index into model.remote

	tried     []*backend // asked, or refused for good
	asked     []string   // sites whose peers were asked
	unreached []*backend // peers that failed at connect
	full      bool       // some backend had no room
	wait      time.Duration
	tight     bool // wait is set

	keyed, hasKey bool // affinity was looked for, and found
	key           uint64
}

type stage int

const (
	stageLocal stage = iota
	stageRemote
	stageLastResort
	stageFallback
)

// next takes a permit from the next backend in order.
func (s *search) next() (candidate, bool) {
	s.now = s.p.now()
	for {
		switch s.stage {
		case stageLocal:
			if c, ok := s.local(false); ok {
				return c, true
			}
			s.stage, s.site = stageRemote, 0
		case stageRemote:
			if c, ok := s.remote(false); ok {
				return c, true
			}
			s.stage = stageLastResort
		case stageLastResort:
			// Own breakers first, then the peers'. A breaker may be wrong; a
			// failing probe that agrees with it is not.
			if c, ok := s.local(true); ok {
				return c, true
			}
			if c, ok := s.remote(true); ok {
				return c, true
			}
			s.stage = stageFallback
		case stageFallback:
			if !s.fallback() {
				return candidate{}, false
			}
			s.stage = stageLocal
		}
	}
}

func (s *search) fallback() bool {
	for len(s.rest) > 0 {
		m := s.t.models[s.rest[0]]
		s.rest = s.rest[1:]
		if m != nil {
			s.model = m
			// A peer may well have an upstream for another model, unless it
			// can't be reached at all.
			s.asked = s.asked[:0]
			s.tried = slices.DeleteFunc(s.tried, func(b *backend) bool {
				return b.node != "" && !slices.Contains(s.unreached, b)
			})
			return true
		}
	}
	return false
}

// local picks among the own site's upstreams.
func (s *search) local(lastResort bool) (candidate, bool) {
	var room [16]target
	for {
		usable := room[:0]
		failing := 0
		for _, t := range s.model.local {
			if s.skip(t, lastResort) {
				continue
			}
			if t.probeFails() {
				failing++
			}
			usable = append(usable, t)
		}
		if failing < len(usable) { // a failing probe alone never empties the pool
			usable = slices.DeleteFunc(usable, func(t target) bool { return t.probeFails() })
		}
		if len(usable) == 0 {
			return candidate{}, false
		}
		t := usable[s.p.pick(s, usable)]
		permit, why := t.enter(s.now, lastResort)
		if why != granted {
			s.refused(&t.backend, why)
			if why == refusedBroken && !lastResort {
				continue // the trial went to another request meanwhile
			}
			s.tried = append(s.tried, &t.backend)
			continue
		}
		s.tried = append(s.tried, &t.backend)
		return candidate{permit: permit, client: t.client, model: s.model, target: t, timers: t.timers}, true
	}
}

// skip sorts out what can't be asked, and notes why for the client's sake.
func (s *search) skip(t target, lastResort bool) bool {
	b := &t.backend
	if !t.usable() || slices.Contains(s.tried, b) {
		return true
	}
	if lastResort {
		return t.probeFails()
	}
	if why := b.ready(s.now); why != granted {
		s.refused(b, why)
		return true
	}
	return false
}

// refused remembers when it would be worth asking again.
func (s *search) refused(b *backend, why refusal) {
	if why == refusedFull {
		s.full = true
		return
	}
	paused, broken := b.away(s.now)
	if left := max(paused, broken); !s.tight || left < s.wait {
		s.wait, s.tight = left, true
	}
	if paused > 0 {
		s.full = true
	}
}

// remote picks among the peers of the other sites, nearest first. A request
// that came from a peer stays in this site.
func (s *search) remote(lastResort bool) (candidate, bool) {
	if s.r.Hops > 0 || len(s.model.remote) == 0 {
		return candidate{}, false
	}
	if lastResort {
		s.site = 0
	}
	peers := s.p.peers()
	for ; s.site < len(s.model.remote); s.site++ {
		site := s.model.remote[s.site]
		if slices.Contains(s.asked, site.name) {
			continue
		}
		if c, ok := s.peerOf(site, peers, lastResort); ok {
			return c, true
		}
	}
	return candidate{}, false
}

// peerOf takes the least burdened node of a site; draining ones come last.
func (s *search) peerOf(site remoteSite, peers []Peer, lastResort bool) (candidate, bool) {
	for _, draining := range []bool{false, true} {
		for {
			var best *peer
			var via Peer
			for _, p := range peers {
				if p.Site != site.name || p.Draining != draining || p.Client == nil {
					continue
				}
				if !lastResort && deadThere(p, site.upstreams) {
					continue
				}
				b := s.p.fleet.peer(p)
				if slices.Contains(s.tried, &b.backend) || !lastResort && b.open(s.now) {
					continue
				}
				if best == nil || b.load(s.now).cost() < best.load(s.now).cost() {
					best, via = b, p
				}
			}
			if best == nil {
				break
			}
			s.tried = append(s.tried, &best.backend)
			permit, why := best.enter(s.now, lastResort)
			if why != granted {
				s.refused(&best.backend, why)
				continue
			}
			s.asked = append(s.asked, site.name)
			return candidate{permit: permit, client: via.Client, model: s.model, peer: best, timers: s.model.timers}, true
		}
	}
	return candidate{}, false
}

// deadThere reports that the peer itself says it reaches none of its upstreams
// for the model.
func deadThere(p Peer, upstreams []string) bool {
	for _, u := range upstreams {
		if !p.Dead[u] {
			return false
		}
	}
	return true
}

// reopen lets another node of a site be asked: the first never got the request.
func (s *search) reopen(p *peer) {
	s.unreached = append(s.unreached, &p.backend)
	s.asked = slices.DeleteFunc(s.asked, func(a string) bool { return a == p.site })
	if s.stage == stageRemote {
		s.site = 0
	}
}

// exhausted is the error when nobody is left to ask and nobody was asked.
func (s *search) exhausted() *BusyError {
	wait := s.wait
	if !s.tight || wait <= 0 {
		wait = time.Second
	}
	if s.full {
		return &BusyError{Err: ErrOverloaded, RetryAfter: wait}
	}
	return &BusyError{Err: ErrNoUpstream, RetryAfter: wait}
}
