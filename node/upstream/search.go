package upstream

import (
	"slices"
	"time"
)

// Query is what a request needs of the fleet.
type Query struct {
	Table *Table
	Model *Model // of Table
	// Tenant and Prompt say which server may have the prompt's beginning in its
	// cache. An empty prompt has no such server.
	Tenant string
	Prompt []byte
	// OwnSite: the request came from a peer, and goes to no other one.
	OwnSite bool
}

// Search goes through the fleet for one request: the own site's servers, the sites
// of the same city, the other sites, then, as a last resort, those whose breaker is
// open; and the same again for each fallback model. No server is asked twice, and
// no other site either, unless its first node could not be reached.
type Search struct {
	Query
	fleet *Fleet
	now   time.Time
	model *Model   // that is searched for
	rest  []string // fallbacks not yet tried
	stage stage
	site  int // index into model.remote

	tried     []*backend // asked, or refused for good
	asked     []string   // sites whose peers were asked
	unreached []*backend // peers that could not be reached
	full      bool       // some server was full or paused
	wait      time.Duration
	waits     bool // wait is set

	keyed, hasKey bool // the affinity was looked for, and found
	key           uint64
}

type stage int

const (
	stageLocal stage = iota
	stageRemote
	stageLastResort
	stageFallback
)

// Search begins a search. It asks nothing.
func (f *Fleet) Search(q Query) *Search {
	return &Search{Query: q, fleet: f, model: q.Model, rest: q.Model.fallbacks}
}

// Next takes a permit from the next server in order. It is false when none is left.
func (s *Search) Next() (Permit, bool) {
	s.now = s.fleet.o.Now()
	for {
		switch s.stage {
		case stageLocal:
			if p, ok := s.local(false); ok {
				return p, true
			}
			s.stage, s.site = stageRemote, 0
		case stageRemote:
			if p, ok := s.remote(false); ok {
				return p, true
			}
			s.stage = stageLastResort
		case stageLastResort:
			// The own site's first. A breaker may be wrong; a failing probe that agrees
			// with it is not.
			if p, ok := s.local(true); ok {
				return p, true
			}
			if p, ok := s.remote(true); ok {
				return p, true
			}
			s.stage = stageFallback
		case stageFallback:
			if !s.fallback() {
				return Permit{}, false
			}
			s.stage = stageLocal
		}
	}
}

// Unreached lets another node of a peer's site be asked: this one never got the
// request.
func (s *Search) Unreached(p *Permit) {
	if p.Peer == "" {
		return
	}
	s.unreached = append(s.unreached, p.backend)
	s.asked = slices.DeleteFunc(s.asked, func(a string) bool { return a == p.Site })
	if s.stage == stageRemote {
		s.site = 0
	}
}

// Refused says why servers were passed over: whether one was full or paused, and when
// the first may be asked again.
func (s *Search) Refused() (full bool, retryAfter time.Duration) {
	if !s.waits || s.wait <= 0 {
		return s.full, time.Second
	}
	return s.full, s.wait
}

// fallback goes on to the next fallback model.
func (s *Search) fallback() bool {
	for len(s.rest) > 0 {
		m := s.Table.Model(s.rest[0])
		s.rest = s.rest[1:]
		if m != nil {
			s.model = m
			// A peer may well have an upstream for another model, unless it can't be
			// reached at all.
			s.asked = s.asked[:0]
			s.tried = slices.DeleteFunc(s.tried, func(b *backend) bool {
				return b.node != "" && !slices.Contains(s.unreached, b)
			})
			return true
		}
	}
	return false
}

// local takes a permit from one of the own site's servers.
func (s *Search) local(lastResort bool) (Permit, bool) {
	var buf [16]offer
	for {
		usable := buf[:0]
		failing := 0
		for _, o := range s.model.local {
			if s.skip(o, lastResort) {
				continue
			}
			if o.probeFails() {
				failing++
			}
			usable = append(usable, o)
		}
		if failing < len(usable) { // a failing probe alone never empties the pool
			usable = slices.DeleteFunc(usable, func(o offer) bool { return o.probeFails() })
		}
		if len(usable) == 0 {
			return Permit{}, false
		}
		o := usable[s.pick(usable)]
		trial, why := o.enter(s.now, lastResort)
		if why == refusedBroken && !lastResort {
			s.refused(&o.backend, why)
			continue // another request has taken the trial meanwhile
		}
		s.tried = append(s.tried, &o.backend)
		if why != granted {
			s.refused(&o.backend, why)
			continue
		}
		p := s.permit(&o.backend, trial)
		p.client, p.instance, p.ServedAs, p.Timeouts = o.client, o.instance, o.as, o.timeouts
		return p, true
	}
}

func (s *Search) permit(b *backend, trial bool) Permit {
	return Permit{
		Upstream: b.name, Site: b.site, Instance: b.address, Peer: b.node, Model: s.model,
		fleet: s.fleet, backend: b, trial: trial,
	}
}

// skip passes over what can't be asked, and notes why for the client's sake.
func (s *Search) skip(o offer, lastResort bool) bool {
	b := &o.backend
	if !o.usable() || slices.Contains(s.tried, b) {
		return true
	}
	if lastResort {
		return o.probeFails()
	}
	if why := b.ready(s.now); why != granted {
		s.refused(b, why)
		return true
	}
	return false
}

// refused notes why a server was passed over, and when it may be asked again.
func (s *Search) refused(b *backend, why refusal) {
	if why == refusedFull {
		s.full = true
		return
	}
	paused, broken := b.away(s.now)
	if left := max(paused, broken); !s.waits || left < s.wait {
		s.wait, s.waits = left, true
	}
	if paused > 0 {
		s.full = true
	}
}

// remote takes a permit from a peer of another site, nearest sites first.
func (s *Search) remote(lastResort bool) (Permit, bool) {
	if s.OwnSite || len(s.model.remote) == 0 {
		return Permit{}, false
	}
	if lastResort {
		s.site = 0
	}
	peers := s.fleet.o.Peers()
	for ; s.site < len(s.model.remote); s.site++ {
		site := s.model.remote[s.site]
		if slices.Contains(s.asked, site.name) {
			continue
		}
		if p, ok := s.peerOf(site, peers, lastResort); ok {
			return p, true
		}
	}
	return Permit{}, false
}

// peerOf takes a permit from the site's node with the least load. Draining nodes
// come last.
func (s *Search) peerOf(site remoteSite, listed []Peer, lastResort bool) (Permit, bool) {
	for _, draining := range []bool{false, true} {
		for {
			best, via := s.leastLoaded(site, listed, draining, lastResort)
			if best == nil {
				break
			}
			s.tried = append(s.tried, &best.backend)
			trial, why := best.enter(s.now, lastResort)
			if why != granted {
				s.refused(&best.backend, why)
				continue
			}
			s.asked = append(s.asked, site.name)
			p := s.permit(&best.backend, trial)
			p.client, p.lost, p.Timeouts = via.Client, best.lost, s.model.timeouts
			return p, true
		}
	}
	return Permit{}, false
}

func (s *Search) leastLoaded(site remoteSite, listed []Peer, draining, lastResort bool) (best *peer, via Peer) {
	for _, p := range listed {
		if p.Site != site.name || p.Draining != draining || p.Client == nil {
			continue
		}
		if !lastResort && p.reachesNone(site.upstreams) {
			continue
		}
		b := s.fleet.peers.peer(p)
		if slices.Contains(s.tried, &b.backend) || !lastResort && b.open(s.now) {
			continue
		}
		if best == nil || b.load(s.now).cost() < best.load(s.now).cost() {
			best, via = b, p
		}
	}
	return best, via
}
