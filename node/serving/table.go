package serving

import (
	"iter"
	"maps"
	"slices"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/node/openai"
)

// table is a configuration as requests see it from this site. It is immutable;
// what lives in the upstreams it points at is theirs.
type table struct {
	models   map[string]*model
	services map[string]*service // of the own site
	order    []string            // model names, sorted
}

// service is a configured upstream of the own site: one server, or as many
// instances as were discovered. It is as immutable as its table.
type service struct {
	name      string
	def       cluster.Upstream
	drained   bool
	instances []*upstream
	found     *found // nil when nothing is discovered
}

// instances are all that can be asked, of all services.
func (t *table) instances() iter.Seq[*upstream] {
	return func(yield func(*upstream) bool) {
		for _, s := range t.services {
			for _, u := range s.instances {
				if !yield(u) {
					return
				}
			}
		}
	}
}

// model is a name that clients ask for, resolved for this site.
type model struct {
	name      string
	quoted    []byte
	local     []target
	upstreams []string     // of the own site, drained ones too
	remote    []remoteSite // nearest first
	fallbacks []string
	timers    timers // for what a peer is asked
	revision  string // of the weights
	cache     cluster.ModelCache
}

// target is an instance of the own site under the name it knows the model by.
type target struct {
	*upstream
	serves []byte // quoted; nil when it is the client's name
	timers timers
}

// remoteSite is another site that serves a model, and its upstreams for it that
// are not drained.
type remoteSite struct {
	name      string
	upstreams []string
}

func newTable(c *cluster.Config, site string, services map[string]*service, drained map[string]bool) *table {
	t := &table{models: make(map[string]*model, len(c.Models)), services: services}
	t.order = slices.Sorted(maps.Keys(c.Models))
	order := c.SiteOrder(site)
	for _, name := range t.order {
		def := c.Models[name]
		m := &model{name: name, quoted: openai.Quote(name), fallbacks: def.Fallbacks, timers: timersOf(c.TimeoutsFor(name, ""))}
		m.timers.pace = 0 // a peer's own node sees to it
		m.revision, m.cache = def.Revision, def.Cache
		for _, s := range def.Serve {
			up, ok := c.Upstreams[s.Upstream]
			if !ok {
				continue // a Config that was parsed has no such thing
			}
			if up.Site == site && !slices.Contains(m.upstreams, s.Upstream) {
				m.upstreams = append(m.upstreams, s.Upstream)
			}
			if drained[s.Upstream] {
				continue
			}
			if up.Site != site {
				m.addRemote(up.Site, s.Upstream)
				continue
			}
			as := target{timers: timersOf(c.TimeoutsFor(name, s.Upstream))}
			if s.Model != "" && s.Model != name {
				as.serves = openai.Quote(s.Model)
			}
			for _, as.upstream = range services[s.Upstream].instances {
				m.local = append(m.local, as)
			}
		}
		slices.SortStableFunc(m.remote, func(a, b remoteSite) int {
			return slices.Index(order, a.name) - slices.Index(order, b.name)
		})
		for _, to := range m.local {
			if len(m.local) > 1 {
				to.rivals.Store(true)
			}
		}
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
