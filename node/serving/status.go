package serving

import (
	"maps"
	"slices"
	"time"
)

// ModelInfo is a model as GET /v1/models lists it.
type ModelInfo struct {
	ID string
}

// Models are the configured models that the principal may use, sorted by name.
func (p *Pipeline) Models(who Principal) []ModelInfo {
	t := p.table.Load()
	list := make([]ModelInfo, 0, len(t.order))
	for _, name := range t.order {
		if who.allows(name) {
			list = append(list, ModelInfo{ID: name})
		}
	}
	return list
}

// UpstreamStatus is what this node knows of one upstream of its own site. With
// discovery it sums up its Instances: as healthy as the best of them.
type UpstreamStatus struct {
	Name    string
	Site    string
	Models  []string // names that clients ask for
	Drained bool
	Standing
	// Instances are those that were discovered, by address; nil without
	// discovery.
	Instances []InstanceStatus
}

// InstanceStatus is one address of an upstream that is discovered.
type InstanceStatus struct {
	Address string // host:port
	Standing
}

// Standing is how one server is doing.
type Standing struct {
	Known    bool      // a probe or a request has told something
	Healthy  bool      // known, breaker not open, and the last sign of life good
	Breaker  string    // closed, open, half-open
	Since    time.Time // of the breaker's state; zero: from the start
	InFlight int
	LastErr  string
	// LastErrAt is when LastErr happened; zero: never.
	LastErrAt   time.Time
	PausedUntil time.Time // Retry-After or a refused key; zero: not paused
}

// Upstreams are the own site's upstreams, sorted by name.
func (p *Pipeline) Upstreams() []UpstreamStatus {
	t, now := p.table.Load(), p.now()
	models := make(map[string][]string)
	for _, name := range t.order {
		for _, serves := range t.models[name].upstreams {
			models[serves] = append(models[serves], name)
		}
	}
	list := make([]UpstreamStatus, 0, len(t.services))
	for _, name := range slices.Sorted(maps.Keys(t.services)) {
		s := t.services[name].status(now)
		s.Models = models[name]
		list = append(list, s)
	}
	return list
}

func (s *service) status(now time.Time) UpstreamStatus {
	all := UpstreamStatus{Name: s.name, Site: s.def.Site, Drained: s.drained}
	if s.found == nil {
		all.Standing = s.instances[0].standing(now)
		return all
	}
	all.Instances = make([]InstanceStatus, 0, len(s.instances))
	for _, u := range s.instances {
		one := InstanceStatus{u.address, u.standing(now)}
		all.Instances = append(all.Instances, one)
		all.add(one.Standing)
	}
	if len(s.instances) == 0 {
		all.Known, all.Breaker, all.LastErr = s.found.err != nil, breakerOpen.String(), errNoAddress.Error()
		if s.found.err != nil {
			all.LastErr = s.found.err.Error()
		}
	}
	return all
}

// add takes another instance in: the best breaker, the newest fault.
func (s *Standing) add(o Standing) {
	rank := []string{"", breakerOpen.String(), breakerHalfOpen.String(), breakerClosed.String()}
	if slices.Index(rank, o.Breaker) > slices.Index(rank, s.Breaker) {
		s.Breaker, s.Since = o.Breaker, o.Since
	}
	s.Known, s.Healthy, s.InFlight = s.Known || o.Known, s.Healthy || o.Healthy, s.InFlight+o.InFlight
	if o.LastErr != "" && (s.LastErr == "" || o.LastErrAt.After(s.LastErrAt)) {
		s.LastErr, s.LastErrAt = o.LastErr, o.LastErrAt
	}
}

func (u *upstream) standing(now time.Time) Standing {
	probe, failing := u.probed.Load(), u.probeFails()
	s := Standing{InFlight: int(u.inFlight.Load())}
	u.mu.Lock()
	defer u.mu.Unlock()
	state := u.turn(now)
	s.Breaker, s.Since = state.String(), u.breaker.since
	s.LastErr, s.LastErrAt = u.lastErr, u.lastBad
	if now.Before(u.paused) {
		s.PausedUntil = u.paused
	}
	s.Known = probe != nil || !u.lastGood.IsZero() || !u.lastBad.IsZero()
	switch {
	case u.broken != nil:
		s.Known, s.LastErr = true, u.broken.Error()
	case !u.def.APIKey.IsZero() && u.key.Load() == nil:
		s.Known, s.LastErr = true, errNoKey.Error()
	case failing:
		if probe.at.After(s.LastErrAt) {
			s.LastErr, s.LastErrAt = probe.err.Error(), probe.at
		}
	default:
		s.Healthy = s.Known && state != breakerOpen && (probe != nil || u.lastGood.After(u.lastBad))
	}
	return s
}
