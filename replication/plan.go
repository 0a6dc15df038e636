package replication

import (
	"cmp"
	"hash/fnv"
	"slices"
)

// View is the input of Plan.
type View struct {
	Self    string
	Members []Member
	// Gain is how many records each node holds that this one lacks, by origin.
	Gain map[string]map[string]uint64
	// Stalled are the origins of which this node has lacked records for some time without
	// receiving any. They are pulled from a second node too.
	Stalled map[string]bool
	// Current are the present sources, by origin; Plan keeps them where possible.
	Current map[string][]string
}

// Plan returns the nodes to pull from, with the origins to pull from each. Nodes with the
// same view agree without communicating: each origin of another site has one relay in this
// site, which pulls it from there, and the others pull it from the relay. So each record
// crosses the link between two sites once.
func Plan(v View) map[string][]string {
	origins := map[string]bool{}
	for _, m := range v.Members {
		origins[m.Node] = true
	}
	for o := range v.Gain {
		origins[o] = true // origins that are no longer members, or this node's own earlier streams
	}
	plan := map[string][]string{}
	for o := range origins {
		from := v.source(o)
		if from != "" {
			plan[from] = append(plan[from], o)
		}
		if second := v.most(o, from); second != "" && (from == "" || v.Stalled[o]) {
			plan[second] = append(plan[second], o)
		}
	}
	for _, os := range plan {
		slices.Sort(os)
	}
	return plan
}

// source returns the node to pull an origin from, "" for none.
func (v *View) source(origin string) string {
	if origin == v.Self {
		return "" // its own missing records are pulled like those of a stalled origin
	}
	self, o := v.member(v.Self), v.member(origin)
	if o.Heard && o.Site == self.Site {
		return origin
	}
	relay := v.relay(self, o, origin)
	switch {
	case relay == "":
		return ""
	case relay != v.Self:
		return relay
	case o.Heard:
		return origin
	}
	return v.best(self, o, origin)
}

// relay returns the node of this site that pulls an origin for the whole site: one that
// hears the origin or, if there is none, one that hears any node of another site.
func (v *View) relay(self, o Member, origin string) string {
	hears := func(m Member, node string) bool {
		if m.Node == v.Self || m.Hears == nil {
			return v.member(node).Heard
		}
		return m.Hears[node]
	}
	var near, far []string
	for _, m := range v.Members {
		if m.Site != self.Site || !m.Heard || m.Node == origin {
			continue
		}
		if o.Node != "" && hears(m, origin) {
			near = append(near, m.Node)
		}
		if slices.ContainsFunc(v.Members, func(x Member) bool { return x.Site != self.Site && hears(m, x.Node) }) {
			far = append(far, m.Node)
		}
	}
	if len(near) > 0 {
		return rendezvous(origin, near)
	}
	return rendezvous(origin, far)
}

// best returns the node to pull an origin from that this node does not hear.
func (v *View) best(self, o Member, origin string) string {
	var heard []Member
	for _, m := range v.Members {
		// A neighbour pulls from this node, so it is only useful if it holds more.
		if m.Node != v.Self && m.Node != origin && m.Heard && (m.Site != self.Site || v.Gain[origin][m.Node] > 0) {
			heard = append(heard, m)
		}
	}
	if len(heard) == 0 {
		return ""
	}
	most := slices.MaxFunc(heard, func(a, b Member) int {
		return cmp.Or(
			cmp.Compare(v.Gain[origin][a.Node], v.Gain[origin][b.Node]),
			boolean(a.Site == o.Site)-boolean(b.Site == o.Site),
			cmp.Compare(weight(origin, a.Node), weight(origin, b.Node)))
	}).Node
	for _, m := range heard {
		gain := v.Gain[origin][m.Node]
		if slices.Contains(v.Current[origin], m.Node) && (gain > 0 || v.Gain[origin][most] == 0) {
			return m.Node
		}
	}
	return most
}

// most returns the living node, other than but, that holds most of the records that this
// node lacks of an origin; "" if none holds any.
func (v *View) most(origin, but string) string {
	self := v.member(v.Self)
	best, found := Member{}, false
	better := func(a, b Member) bool {
		return cmp.Or(
			boolean(slices.Contains(v.Current[origin], a.Node))-boolean(slices.Contains(v.Current[origin], b.Node)),
			boolean(a.Site == self.Site)-boolean(b.Site == self.Site),
			cmp.Compare(v.Gain[origin][a.Node], v.Gain[origin][b.Node]),
			cmp.Compare(weight(origin, a.Node), weight(origin, b.Node))) > 0
	}
	for _, m := range v.Members {
		if m.Node == v.Self || m.Node == but || !m.Heard || v.Gain[origin][m.Node] == 0 {
			continue
		}
		if !found || better(m, best) {
			best, found = m, true
		}
	}
	return best.Node
}

func (v *View) member(node string) Member {
	for _, m := range v.Members {
		if m.Node == node {
			return m
		}
	}
	return Member{}
}

// rendezvous chooses one of the nodes for a key. Callers with the same nodes choose the same
// one; when a node disappears only its keys move.
func rendezvous(key string, nodes []string) string {
	if len(nodes) == 0 {
		return ""
	}
	return slices.MaxFunc(nodes, func(a, b string) int {
		return cmp.Or(cmp.Compare(weight(key, a), weight(key, b)), cmp.Compare(a, b))
	})
}

func weight(key, node string) uint64 {
	h := fnv.New64a()
	_, _ = h.Write([]byte(key + "\x00" + node)) // never fails
	// The high bits of FNV hardly depend on the last bytes, so mix them.
	x := h.Sum64()
	x ^= x >> 33
	x *= 0xff51afd7ed558ccd
	x ^= x >> 33
	x *= 0xc4ceb9fe1a85ec53
	return x ^ x>>33
}

func boolean(b bool) int {
	if b {
		return 1
	}
	return 0
}
