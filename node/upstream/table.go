package upstream

import (
	"iter"
	"maps"
	"slices"

	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/node/openai"
)

// Table is a configuration as this site sees it. It is immutable; the live state of
// the servers that it points to is theirs.
type Table struct {
	models    map[string]*Model
	upstreams map[string]*upstream // of the own site
	order     []string             // model names, sorted
}

// Model is a name that clients ask for, resolved for this site. Nobody changes it.
type Model struct {
	Name     string
	Quoted   []byte // Name as a JSON string
	Revision string // of the weights
	Cache    config.ModelCache

	local     []offer
	upstreams []string     // of the own site, drained ones too
	remote    []remoteSite // nearest first
	fallbacks []string
	timeouts  config.Timeouts // of a peer that is asked
}

// Model finds a model by its name, nil for none.
func (t *Table) Model(name string) *Model { return t.models[name] }

// upstream is a configured upstream of the own site: one server, or as many
// instances as were discovered. It is as immutable as its table.
type upstream struct {
	name      string
	def       config.Upstream
	drained   bool
	instances []*instance
	found     *found // nil without discovery
}

// instances are all that can be asked, of all upstreams.
func (t *Table) instances() iter.Seq[*instance] {
	return func(yield func(*instance) bool) {
		for _, u := range t.upstreams {
			for _, i := range u.instances {
				if !yield(i) {
					return
				}
			}
		}
	}
}

// offer is an instance that serves a model, and the name that it knows it by.
type offer struct {
	*instance
	as       []byte // quoted; nil when it is the model's name
	timeouts config.Timeouts
}

// remoteSite is another site that serves a model, and its upstreams for it that
// are not drained.
type remoteSite struct {
	name      string
	upstreams []string
}

func newTable(c *config.Config, site string, upstreams map[string]*upstream, drained map[string]bool) *Table {
	t := &Table{models: make(map[string]*Model, len(c.Models)), upstreams: upstreams}
	t.order = slices.Sorted(maps.Keys(c.Models))
	order := c.SiteOrder(site)
	for _, name := range t.order {
		def := c.Models[name]
		m := &Model{
			Name: name, Quoted: openai.Quote(name), Revision: def.Revision, Cache: def.Cache,
			fallbacks: def.Fallbacks, timeouts: c.TimeoutsFor(name, ""),
		}
		m.timeouts.MinTokensPerSecond = 0 // the peer's own node measures it
		for _, s := range def.Serve {
			m.serve(c, site, s, upstreams, drained[s.Upstream])
		}
		slices.SortStableFunc(m.remote, func(a, b remoteSite) int {
			return slices.Index(order, a.name) - slices.Index(order, b.name)
		})
		if len(m.local) > 1 {
			for _, o := range m.local {
				o.compared.Store(true)
			}
		}
		t.models[name] = m
	}
	return t
}

// serve adds one of the model's upstreams.
func (m *Model) serve(c *config.Config, site string, s config.Serve, upstreams map[string]*upstream, drained bool) {
	up, ok := c.Upstreams[s.Upstream]
	if !ok {
		return // a Config that was parsed names only upstreams that exist
	}
	if up.Site == site && !slices.Contains(m.upstreams, s.Upstream) {
		m.upstreams = append(m.upstreams, s.Upstream)
	}
	switch {
	case drained:
	case up.Site != site:
		m.addRemote(up.Site, s.Upstream)
	default:
		o := offer{timeouts: c.TimeoutsFor(m.Name, s.Upstream)}
		if s.Model != "" && s.Model != m.Name {
			o.as = openai.Quote(s.Model)
		}
		for _, o.instance = range upstreams[s.Upstream].instances {
			m.local = append(m.local, o)
		}
	}
}

func (m *Model) addRemote(site, upstream string) {
	for i := range m.remote {
		if m.remote[i].name == site {
			m.remote[i].upstreams = append(m.remote[i].upstreams, upstream)
			return
		}
	}
	m.remote = append(m.remote, remoteSite{site, []string{upstream}})
}
