package upstream

import (
	"maps"
	"slices"
	"time"
)

// Status is what this node knows of one upstream of its own site. With discovery it
// sums up its Instances: as healthy as the best of them.
type Status struct {
	Name    string
	Site    string
	Models  []string // names that clients ask for
	Drained bool
	Health
	// Instances are those that were discovered, by address; nil without discovery.
	Instances []InstanceStatus
}

// InstanceStatus is one address of an upstream that is discovered.
type InstanceStatus struct {
	Address string // host:port
	Health
}

// Health is how one server is doing.
type Health struct {
	Known    bool      // a probe or a request has told something
	Healthy  bool      // known, breaker not open, and the last probe or request succeeded
	Breaker  string    // closed, open, half-open
	Since    time.Time // of the breaker's state; zero: from the start
	InFlight int
	LastErr  string
	// LastErrAt is when LastErr happened; zero: never.
	LastErrAt   time.Time
	PausedUntil time.Time // Retry-After or a refused key; zero: not paused
}

// Status is that of the own site's upstreams, sorted by name.
func (f *Fleet) Status() []Status {
	t, now := f.Table(), f.o.Now()
	models := make(map[string][]string)
	for _, name := range t.order {
		for _, u := range t.models[name].upstreams {
			models[u] = append(models[u], name)
		}
	}
	list := make([]Status, 0, len(t.upstreams))
	for _, name := range slices.Sorted(maps.Keys(t.upstreams)) {
		s := t.upstreams[name].status(now)
		s.Models = models[name]
		list = append(list, s)
	}
	return list
}

func (u *upstream) status(now time.Time) Status {
	all := Status{Name: u.name, Site: u.def.Site, Drained: u.drained}
	if u.found == nil {
		all.Health = u.instances[0].health(now)
		return all
	}
	all.Instances = make([]InstanceStatus, 0, len(u.instances))
	for _, i := range u.instances {
		one := InstanceStatus{i.address, i.health(now)}
		all.Instances = append(all.Instances, one)
		all.add(one.Health)
	}
	if len(u.instances) == 0 {
		all.Known, all.Breaker, all.LastErr = u.found.err != nil, breakerOpen.String(), errNoAddress.Error()
		if u.found.err != nil {
			all.LastErr = u.found.err.Error()
		}
	}
	return all
}

// add takes another instance in: the best breaker, the newest error.
func (h *Health) add(o Health) {
	rank := []string{"", breakerOpen.String(), breakerHalfOpen.String(), breakerClosed.String()}
	if slices.Index(rank, o.Breaker) > slices.Index(rank, h.Breaker) {
		h.Breaker, h.Since = o.Breaker, o.Since
	}
	h.Known, h.Healthy, h.InFlight = h.Known || o.Known, h.Healthy || o.Healthy, h.InFlight+o.InFlight
	if o.LastErr != "" && (h.LastErr == "" || o.LastErrAt.After(h.LastErrAt)) {
		h.LastErr, h.LastErrAt = o.LastErr, o.LastErrAt
	}
}

func (i *instance) health(now time.Time) Health {
	probe, failing := i.probed.Load(), i.probeFails()
	h := Health{InFlight: int(i.inFlight.Load())}
	i.mu.Lock()
	defer i.mu.Unlock()
	state := i.breakerState(now)
	h.Breaker, h.Since = state.String(), i.breaker.since
	h.LastErr, h.LastErrAt = i.lastErr, i.lastBad
	if now.Before(i.paused) {
		h.PausedUntil = i.paused
	}
	h.Known = probe != nil || !i.lastGood.IsZero() || !i.lastBad.IsZero()
	switch {
	case i.broken != nil:
		h.Known, h.LastErr = true, i.broken.Error()
	case !i.def.APIKey.IsZero() && i.key.Load() == nil:
		h.Known, h.LastErr = true, errNoKey.Error()
	case failing:
		if probe.at.After(h.LastErrAt) {
			h.LastErr, h.LastErrAt = probe.err.Error(), probe.at
		}
	default:
		h.Healthy = h.Known && state != breakerOpen && (probe != nil || i.lastGood.After(i.lastBad))
	}
	return h
}
