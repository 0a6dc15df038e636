package cluster

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

func validModelName(s string) bool { return s != "" && len(s) <= 256 && printable(s) }

func (c *configCheck) models() {
	c.count(At("models"), len(c.Models), MaxModels)
	upstreams := slices.Sorted(maps.Keys(c.Upstreams))
	models := slices.Sorted(maps.Keys(c.Models))
	for _, name := range models {
		m, at := c.Models[name], At("models", name)
		if !validModelName(name) {
			c.reject(at, "write 1 to 256 printable characters", "%s cannot be a model's name", quoted(name))
			continue
		}
		if len(m.Serve) == 0 {
			c.missing(at.At("serve"), "write at least one, such as serve: [{upstream: "+first(upstreams, "a-vllm")+"}]")
		}
		c.count(at.At("serve"), len(m.Serve), maxServe)
		for i, s := range m.Serve {
			c.serve(at.At("serve", i), s, m.Serve[:i], upstreams)
		}
		c.count(at.At("fallbacks"), len(m.Fallbacks), maxFallbacks)
		for i, f := range m.Fallbacks {
			at := at.At("fallbacks", i)
			_, known := c.Models[f]
			switch {
			case f == name:
				c.reject(at, "remove it", "a model cannot be its own fallback")
			case slices.Contains(m.Fallbacks[:i], f):
				c.reject(at, "remove it", "%s stands here a second time", quoted(f))
			case !known:
				c.reject(at, suggest(f, without(models, name)), "model %s is not under models", quoted(f))
			}
		}
	}
}

func first(names []string, otherwise string) string {
	if len(names) > 0 {
		return names[0]
	}
	return otherwise
}

func without(names []string, name string) []string {
	return slices.DeleteFunc(slices.Clone(names), func(n string) bool { return n == name })
}

func (c *configCheck) serve(at ConfigPath, s Serve, before []Serve, upstreams []string) {
	_, known := c.Upstreams[s.Upstream]
	switch {
	case s.Upstream == "":
		c.missing(at.At("upstream"), oneOf(upstreams))
	case !known && !c.src.Broken(At("upstreams")):
		c.reject(at.At("upstream"), suggest(s.Upstream, upstreams), "upstream %s is not under upstreams", quoted(s.Upstream))
	case slices.Contains(before, s):
		c.reject(at, "remove it", "stands here a second time")
	}
	if s.Model != "" && !validModelName(s.Model) {
		c.reject(at.At("model"), "write 1 to 256 printable characters", "%s cannot be a model's name", quoted(s.Model))
	}
}

// fallbackCycles follows fallbacks depth first. A cycle would have a request
// go round while everything is down, which is when fallbacks matter.
func (c *configCheck) fallbackCycles() {
	const onPath, done = 1, 2
	state := map[string]int{}
	var path []string
	var visit func(name string)
	visit = func(name string) {
		state[name] = onPath
		path = append(path, name)
		for i, f := range c.Models[name].Fallbacks {
			switch {
			case state[f] == onPath && f != name:
				cycle := append(slices.Clone(path[slices.Index(path, f):]), f)
				for i, n := range cycle {
					cycle[i] = clip(n)
				}
				c.reject(At("models", name, "fallbacks", i), "remove one of these fallbacks", "goes round in a circle: %s", strings.Join(shorten(cycle), " → "))
			case state[f] == 0:
				visit(f)
			}
		}
		path = path[:len(path)-1]
		state[name] = done
	}
	for _, name := range slices.Sorted(maps.Keys(c.Models)) {
		if state[name] == 0 {
			visit(name)
		}
	}
}

// shorten keeps both ends of a long way.
func shorten(names []string) []string {
	const most = 8
	if len(names) <= most {
		return names
	}
	return slices.Concat(names[:most-1], []string{"…"}, names[len(names)-1:])
}

// timeouts checks the four timers against each other as they will be in
// effect, and blames the place where they first go wrong.
func (c *configCheck) timeouts() {
	if !c.timers(At("timeouts"), c.Timeouts, c.Timeouts.over(DefaultTimeouts())) {
		return // everything inherits the fault
	}
	wrong := map[string]bool{}
	for _, name := range slices.Sorted(maps.Keys(c.Upstreams)) {
		wrong[name] = !c.timers(At("upstreams", name, "timeouts"), c.Upstreams[name].Timeouts, c.TimeoutsFor("", name))
	}
	for _, name := range slices.Sorted(maps.Keys(c.Models)) {
		m, at := c.Models[name], At("models", name, "timeouts")
		if m.Timeouts == (Timeouts{}) {
			c.timers(at, m.Timeouts, DefaultTimeouts()) // explicit zeros
			continue
		}
		for _, s := range m.Serve {
			if !wrong[s.Upstream] && !c.timers(at, m.Timeouts, c.TimeoutsFor(name, s.Upstream)) {
				break
			}
		}
	}
}

// timers checks one set of timers: own is what stands at this place, in effect
// is what comes out with what it inherits.
func (c *configCheck) timers(at ConfigPath, own, effect Timeouts) bool {
	type timer struct {
		key         string
		own, effect Duration
	}
	connect := timer{"connect", own.Connect, effect.Connect}
	firstToken := timer{"first_token", own.FirstToken, effect.FirstToken}
	between := timer{"between_tokens", own.BetweenTokens, effect.BetweenTokens}
	total := timer{"total", own.Total, effect.Total}

	fine := true
	for _, t := range []timer{connect, firstToken, between, total} {
		p := at.At(t.key)
		switch {
		case c.src.Broken(p):
			fine = false
		case t.own == 0 && c.src.Has(p):
			c.reject(p, "write a time, or remove the key to inherit one", "must be more than zero")
			fine = false
		case t.own.D() > 24*time.Hour:
			c.reject(p, "write at most 24h", "%s is out of range", t.own)
			fine = false
		}
	}
	if !fine {
		return false
	}
	for _, pair := range [][2]timer{{connect, firstToken}, {firstToken, total}, {between, total}} {
		less, more := pair[0], pair[1]
		if less.effect <= more.effect {
			continue
		}
		fine = false
		origin := func(t timer) string {
			if c.src.Has(at.At(t.key)) {
				return t.effect.String()
			}
			return t.effect.String() + ", not set here"
		}
		blame := less
		if !c.src.Has(at.At(less.key)) {
			blame = more
		}
		c.reject(at.At(blame.key), fmt.Sprintf("lower %s or raise %s", less.key, more.key),
			"%s (%s) must not exceed %s (%s)", less.key, origin(less), more.key, origin(more))
	}
	return fine
}
