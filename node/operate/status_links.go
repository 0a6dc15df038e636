package operate

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/dsnode/dsnode/cluster"
)

// link is traffic of one kind that does not go through between two nodes, which this node
// hears both, or is one of.
type link struct {
	kind  cluster.Traffic
	nodes [2]string     // by name
	dead  time.Duration // how long ago it last went through
}

// blockedLinks lists what this node and the peers that it hears say about the traffic
// between them. Traffic with a node that is not heard is left out: that is said of the
// node or its site.
func (v view) blockedLinks() []link {
	worst := map[link]time.Duration{} // by the link with dead 0: both ends may report it
	add := func(kind cluster.Traffic, from, to string, dead time.Duration) {
		if to != v.name && !v.peers[to].HeardWithin(v.patience) || from == to {
			return
		}
		l := link{kind: kind, nodes: [2]string{min(from, to), max(from, to)}}
		worst[l] = max(worst[l], dead)
	}
	for _, b := range v.health.Blocked {
		add(b.Kind, v.name, b.Node, b.For)
	}
	for name, p := range v.peers {
		if !p.HeardWithin(v.patience) {
			continue
		}
		for _, b := range p.Blocked {
			add(b.Kind, name, b.Node, b.For+p.Ago)
		}
		for other := range v.state.Nodes {
			if silent := v.unheardBy(p, other); silent >= v.patience {
				add(cluster.TrafficPing, name, other, silent)
			}
		}
	}
	list := make([]link, 0, len(worst))
	for l, dead := range worst {
		l.dead = dead
		list = append(list, l)
	}
	slices.SortFunc(list, func(a, b link) int {
		return cmp.Or(cmp.Compare(order[a.kind], order[b.kind]), cmp.Compare(a.nodes[0], b.nodes[0]), cmp.Compare(a.nodes[1], b.nodes[1]))
	})
	return list
}

// unheardBy is for how long a peer had not heard another node when it last answered. Both
// must have been there for that time.
func (v view) unheardBy(p cluster.PeerView, other string) time.Duration {
	silent := p.HeardFor - p.Ago
	if ago, ever := p.HeardBy[other]; ever {
		silent = min(silent, ago)
	}
	if other == v.name {
		return min(silent, v.now.Sub(v.started))
	}
	return min(silent, v.peers[other].HeardFor)
}

// order is that of the sentences.
var order = map[cluster.Traffic]int{
	cluster.TrafficPing: 1, cluster.TrafficLarge: 2, cluster.TrafficReplication: 3, cluster.TrafficGossip: 4,
}

// linkWords are a sentence for each kind, around the names of the nodes.
var linkWords = map[cluster.Traffic]struct{ begin, end string }{
	cluster.TrafficPing: {"pings are not answered", "although other nodes hear both"},
	cluster.TrafficLarge: {
		"requests of 4 KiB are not answered",
		"although pings are: forwarded requests fail too; check the MTU and the firewalls of the path",
	},
	cluster.TrafficReplication: {"replication does not get through", "copies of jobs fall behind"},
	cluster.TrafficGossip: {
		"UDP packets are not answered",
		"gossip uses TCP instead and learns of changes later; check the firewalls of the gossip port",
	},
}

// maxPairs bounds the pairs of nodes in one sentence.
const maxPairs = 4

// linkReasons says which traffic does not go through, a sentence for each kind.
func linkReasons(links []link) []string {
	var out []string
	for len(links) > 0 {
		kind, n := links[0].kind, 0
		var pairs []string
		for ; n < len(links) && links[n].kind == kind; n++ {
			if n < maxPairs {
				l := links[n]
				pairs = append(pairs, fmt.Sprintf("%s and %s (for %s)", l.nodes[0], l.nodes[1], l.dead.Round(100*time.Millisecond)))
			}
		}
		more := ""
		if n > maxPairs {
			more = fmt.Sprintf(" and %d more pairs of nodes", n-maxPairs)
		}
		words := linkWords[kind]
		out = append(out, fmt.Sprintf("%s between %s%s: %s", words.begin, strings.Join(pairs, ", "), more, words.end))
		links = links[n:]
	}
	return out
}

// cutOffSites are the sites whose traffic of some kind goes through to fewer than half of
// the other sites: the fault is rather theirs than that of the others.
func (v view) cutOffSites() map[string]bool {
	type end struct {
		site string
		kind cluster.Traffic
	}
	sites := map[string]bool{}
	for _, n := range v.state.Nodes {
		sites[n.Site] = true
	}
	apart := map[end]map[string]bool{}
	for _, l := range v.links {
		a, b := v.state.Nodes[l.nodes[0]].Site, v.state.Nodes[l.nodes[1]].Site
		if a == b {
			continue
		}
		for from, to := range map[string]string{a: b, b: a} {
			at := end{from, l.kind}
			if apart[at] == nil {
				apart[at] = map[string]bool{}
			}
			apart[at][to] = true
		}
	}
	cut := map[string]bool{}
	for at, others := range apart {
		if 2*len(others) > len(sites)-1 {
			cut[at.site] = true
		}
	}
	return cut
}

// troubled are the nodes that say of themselves, or that show, that they can't do their
// part.
func (v view) troubled() map[string]bool {
	nodes := map[string]bool{}
	if len(v.health.Problems) > 0 || v.keyProblem != "" || len(v.jobProblems) > 0 {
		nodes[v.name] = true
	}
	for name, p := range v.peers {
		if p.HeardWithin(v.patience) && (len(p.Problems) > 0 || v.raft.Quorum && (v.fenced(p) || p.Stuck >= v.patience)) {
			nodes[name] = true
		}
	}
	return nodes
}

// fenced reports whether a peer has no lease: since its start, or for longer than an
// election and a busy machine explain.
func (v view) fenced(p cluster.PeerView) bool { return p.Cold || p.Leaseless >= v.patience }

// peerReasons are what the peers that are heard say of themselves.
func (v view) peerReasons() []string {
	var out []string
	for _, name := range sortedNames(v.peers) {
		p := v.peers[name]
		if !p.HeardWithin(v.patience) {
			continue
		}
		if v.raft.Quorum && v.fenced(p) {
			out = append(out, fmt.Sprintf("node %s says that it has no quorum: it can't act as primary, start jobs or change anything", name))
		}
		for _, problem := range p.Problems {
			out = append(out, fmt.Sprintf("node %s: %s", name, problem))
		}
	}
	return out
}
