package replication

import (
	"cmp"
	"hash/fnv"
	"slices"
)

// View is what a node decides on from whom it pulls.
type View struct {
	Self    string
	Members []Member
	// Gain is how many records each node holds that this one lacks, by origin.
	Gain map[string]map[string]uint64
	// Stalled are the origins of which this node lacks records for some time
	// without getting on: they are pulled from a second node too.
	Stalled map[string]bool
	// Current are the sources at present, by origin; the choice stays where it can.
	Current map[string][]string
}

// Plan says whom a node pulls from, and which origins. Nodes that see the same
// agree without a word: each origin of another site has one relay in this site,
// which pulls it from there; the others pull it from the relay. So a record
// crosses the link between two sites once.
func Plan(v View) map[string][]string {
	origins := map[string]bool{}
	for _, m := range v.Members {
		origins[m.Node] = true
	}
	for o := range v.Gain {
		origins[o] = true // of a node that was removed, or this node's own of an earlier life
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

// source is the node to pull an origin from, empty for none.
func (v *View) source(origin string) string {
	if origin == v.Self {
		return "" // what this node lacks of its own is fetched like what stalls
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

// relay is the node of this site that fetches an origin for all of it: one that
// hears the origin, else one that hears another site at all.
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

// best is where to pull an origin from that can't be heard itself.
func (v *View) best(self, o Member, origin string) string {
	var heard []Member
	for _, m := range v.Members {
		// A neighbour pulls from this node: it is of use when it holds more.
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

// most is the living node with the most that is lacking of an origin, apart from
// the one that it is pulled from; empty when none has any.
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

// rendezvous chooses one of the nodes for a key. Who sees the same nodes chooses
// the same, and when one goes only its keys move.
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
	// FNV's high bits hardly depend on the last bytes.
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
