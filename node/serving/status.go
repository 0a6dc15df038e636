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

// UpstreamStatus is what this node knows of one upstream of its own site.
type UpstreamStatus struct {
	Name     string
	Site     string
	Models   []string // names that clients ask for
	Known    bool     // a probe or a request has told something
	Healthy  bool     // known, breaker not open, and the last sign of life good
	Drained  bool
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
		for _, target := range t.models[name].local {
			if !slices.Contains(models[target.name], name) {
				models[target.name] = append(models[target.name], name)
			}
		}
	}
	list := make([]UpstreamStatus, 0, len(t.upstreams))
	for _, name := range slices.Sorted(maps.Keys(t.upstreams)) {
		s := t.upstreams[name].status(now)
		s.Models = models[name]
		list = append(list, s)
	}
	return list
}

func (u *upstream) status(now time.Time) UpstreamStatus {
	probe, failing := u.probed.Load(), u.probeFails()
	s := UpstreamStatus{Name: u.name, Site: u.site, Drained: u.drained.Load(), InFlight: int(u.inFlight.Load())}
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
