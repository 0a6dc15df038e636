package serving

import (
	"maps"
	"slices"

	"github.com/dsnode/dsnode/cluster"
)

// table is a configuration as requests see it from this site. It is immutable;
// what lives in the upstreams it points at is theirs.
type table struct {
	models    map[string]*model
	upstreams map[string]*upstream // of the own site
	order     []string             // model names, sorted
}

// model is a name that clients ask for, resolved for this site.
type model struct {
	name      string
	quoted    []byte
	local     []target
	remote    []remoteSite // nearest first
	fallbacks []string
	timers    timers // for what a peer is asked
}

// target is an upstream of the own site under the name it knows the model by.
type target struct {
	*upstream
	serves []byte // quoted; nil when it is the client's name
	timers timers
}

// remoteSite is another site that serves a model, and its upstreams for it.
type remoteSite struct {
	name      string
	upstreams []string
}

func newTable(c *cluster.Config, site string, upstreams map[string]*upstream) *table {
	t := &table{models: make(map[string]*model, len(c.Models)), upstreams: upstreams}
	t.order = slices.Sorted(maps.Keys(c.Models))
	order := c.SiteOrder(site)
	for _, name := range t.order {
		def := c.Models[name]
		m := &model{name: name, quoted: quoted(name), fallbacks: def.Fallbacks, timers: timersOf(c.TimeoutsFor(name, ""))}
		for _, s := range def.Serve {
			up, ok := c.Upstreams[s.Upstream]
			if !ok {
				continue // a Config that was parsed has no such thing
			}
			if up.Site != site {
				m.addRemote(up.Site, s.Upstream)
				continue
			}
			t := target{upstream: upstreams[s.Upstream], timers: timersOf(c.TimeoutsFor(name, s.Upstream))}
			if s.Model != "" && s.Model != name {
				t.serves = quoted(s.Model)
			}
			m.local = append(m.local, t)
		}
		slices.SortStableFunc(m.remote, func(a, b remoteSite) int {
			return slices.Index(order, a.name) - slices.Index(order, b.name)
		})
		t.models[name] = m
	}
	return t
}

func (m *model) addRemote(site, upstream string) {
	for i := range m.remote {
		if m.remote[i].name == site {
			m.remote[i].upstreams = append(m.remote[i].upstreams, upstream)
			return
		}
	}
	m.remote = append(m.remote, remoteSite{site, []string{upstream}})
}
