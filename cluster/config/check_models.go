package config

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

func validModelName(s string) bool { return s != "" && len(s) <= 256 && isPrintable(s) }

func (c *checker) models() {
	if c.tooMany(At("models"), len(c.Models), MaxModels) {
		return
	}
	upstreams := slices.Sorted(maps.Keys(c.Upstreams))
	models := slices.Sorted(maps.Keys(c.Models))
	for _, name := range models {
		m, at := c.Models[name], At("models", name)
		if !validModelName(name) {
			c.reject(at, "write 1 to 256 printable characters", "%s cannot be a model's name", quoted(name))
			continue
		}
		if len(m.Serve) == 0 {
			c.missing(at.At("serve"), "write at least one, such as serve: [{upstream: "+firstName(upstreams, "a-vllm")+"}]")
		}
		if len(m.Revision) > 256 || !isPrintable(m.Revision) {
			c.reject(at.At("revision"), "write up to 256 printable characters", "%s cannot be a revision", quoted(m.Revision))
		}
		if c.tooMany(at.At("serve"), len(m.Serve), maxServe) || c.tooMany(at.At("fallbacks"), len(m.Fallbacks), maxFallbacks) {
			continue
		}
		for i, s := range m.Serve {
			c.serve(at.At("serve", i), s, m.Serve[:i], upstreams)
		}
		for i, f := range m.Fallbacks {
			at := at.At("fallbacks", i)
			_, known := c.Models[f]
			switch {
			case f == name:
				c.reject(at, "remove it", "a model cannot be its own fallback")
			case slices.Contains(m.Fallbacks[:i], f):
				c.reject(at, "remove it", "%s is listed twice", quoted(f))
			case !known:
				c.reject(at, c.src.suggest(f, namesWithout(models, name), "add it under models"), "there is no model %s", quoted(f))
			}
		}
	}
}

func firstName(names []string, otherwise string) string {
	if len(names) > 0 {
		return names[0]
	}
	return otherwise
}

func namesWithout(names []string, name string) []string {
	return slices.DeleteFunc(slices.Clone(names), func(n string) bool { return n == name })
}

func (c *checker) serve(at Path, s Serve, before []Serve, upstreams []string) {
	_, known := c.Upstreams[s.Upstream]
	switch {
	case s.Upstream == "":
		c.missing(at.At("upstream"), "write "+wordChoices(upstreams))
	case !known && !c.src.Broken(At("upstreams")):
		c.reject(at.At("upstream"), c.src.suggest(s.Upstream, upstreams, "add it under upstreams"), "there is no upstream %s", quoted(s.Upstream))
	case slices.Contains(before, s):
		c.reject(at, "remove it", "is listed twice")
	}
	if s.Model != "" && !validModelName(s.Model) {
		c.reject(at.At("model"), "write 1 to 256 printable characters", "%s cannot be a model's name", quoted(s.Model))
	}
}

// fallbackCycles rejects cycles of fallbacks, found depth first. While all
// upstreams are down, a request would loop in such a cycle.
func (c *checker) fallbackCycles() {
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
					cycle[i] = clipWord(n)
				}
				c.reject(At("models", name, "fallbacks", i), "remove one of these fallbacks", "the fallbacks form a cycle: %s", strings.Join(shorten(cycle), " → "))
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

// shorten keeps both ends of a long path.
func shorten(names []string) []string {
	const most = 8
	if len(names) <= most {
		return names
	}
	return slices.Concat(names[:most-1], []string{"…"}, names[len(names)-1:])
}

// timeouts checks the four timers against each other after inheritance, and
// rejects them at the first place where they contradict each other.
func (c *checker) timeouts() {
	upstreams, models := slices.Sorted(maps.Keys(c.Upstreams)), slices.Sorted(maps.Keys(c.Models))
	fine := c.timers(At("timeouts"), c.Timeouts)
	for _, name := range upstreams {
		fine = c.timers(At("upstreams", name, "timeouts"), c.Upstreams[name].Timeouts) && fine
	}
	for _, name := range models {
		fine = c.timers(At("models", name, "timeouts"), c.Models[name].Timeouts) && fine
	}
	// Upstreams and models inherit the cluster's timers, and so their mistakes.
	if !fine || !c.timersFit(At("timeouts"), c.Timeouts.over(DefaultTimeouts())) {
		return
	}
	wrong := map[string]bool{}
	for _, name := range upstreams {
		wrong[name] = !c.timersFit(At("upstreams", name, "timeouts"), c.TimeoutsFor("", name))
	}
	for _, name := range models {
		m := c.Models[name]
		if m.Timeouts == (Timeouts{}) {
			continue
		}
		for _, s := range m.Serve {
			if !wrong[s.Upstream] && !c.timersFit(At("models", name, "timeouts"), c.TimeoutsFor(name, s.Upstream)) {
				break
			}
		}
	}
}

// timers checks each timer that is set at this place, without inheritance.
func (c *checker) timers(at Path, own Timeouts) bool {
	fine := true
	for key, d := range map[string]Duration{
		"connect": own.Connect, "first_token": own.FirstToken, "between_tokens": own.BetweenTokens, "total": own.Total,
	} {
		p := at.At(key)
		switch {
		case c.src.Broken(p):
		case d == 0 && c.src.Has(p):
			c.reject(p, "write a time, or remove the key to inherit one", "must be more than zero")
		case d.D() > 24*time.Hour:
			c.reject(p, "write at most 24h", "%s is out of range", d)
		default:
			continue
		}
		fine = false
	}
	if n := own.MinTokensPerSecond; n < 0 || n > 10_000 {
		c.reject(at.At("min_tokens_per_second"), "write a number from 1 to 10000, or remove the key", "%d is out of range", n)
		fine = false
	}
	return fine
}

// timersFit checks the timers in effect against each other. It rejects the one
// of a contradicting pair that is set at this place.
func (c *checker) timersFit(at Path, effect Timeouts) bool {
	type timer struct {
		key string
		d   Duration
	}
	connect, firstToken := timer{"connect", effect.Connect}, timer{"first_token", effect.FirstToken}
	between, total := timer{"between_tokens", effect.BetweenTokens}, timer{"total", effect.Total}
	set := func(t timer) bool { return c.src.Has(at.At(t.key)) }
	shown := func(t timer) string {
		if set(t) {
			return t.d.String()
		}
		return t.d.String() + ", not set here"
	}
	fine := true
	for _, pair := range [][2]timer{{connect, firstToken}, {firstToken, total}, {between, total}} {
		less, more := pair[0], pair[1]
		if less.d <= more.d {
			continue
		}
		fine = false
		blame := less
		if !set(less) {
			blame = more
		}
		c.reject(at.At(blame.key), fmt.Sprintf("lower %s or raise %s", less.key, more.key),
			"%s (%s) must not exceed %s (%s)", less.key, shown(less), more.key, shown(more))
	}
	return fine
}
