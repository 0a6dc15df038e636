package cluster

import (
	"cmp"
	"slices"
	"time"
)

// relayHears is how old a peer's word that it hears a node may be, for the peer
// to be asked for a tunnel there. It covers the slowest ping that is answered.
const relayHears = pingTimeout + time.Second

// relays are the peers that lately said that they hear a node, and were heard
// themselves: those of a third site first, then neighbours, of this node and of
// that one. A peer that reaches the node only through another will refuse.
func (c *Cluster) relays(node string) []string {
	now, members := Boottime(), c.members()
	site := func(name string) string { return members[name].Site }
	return rankRelays(node, c.opts.Site, site, c.peers.hearing(node, now), now-c.silence())
}

// rankRelays puts the peers that hear a node, and answered a ping sent later
// than that, into the order in which they are asked.
func rankRelays(node, ownSite string, siteOf func(string) string, hearing map[string]answer, later time.Duration) []string {
	ranks := map[string]int{}
	names := []string{}
	for name, a := range hearing {
		site := siteOf(name)
		if name == node || site == "" || a.sent <= later {
			continue
		}
		switch site {
		case ownSite:
			ranks[name] = 1
		case siteOf(node):
			ranks[name] = 2
		}
		if a.got.GetHealth().GetDraining() {
			ranks[name] += 3 // it is about to go
		}
		names = append(names, name)
	}
	slices.SortFunc(names, func(a, b string) int {
		return cmp.Or(cmp.Compare(ranks[a], ranks[b]), cmp.Compare(a, b))
	})
	return names
}

// hearing gives the answers of the peers that heard a node lately.
func (t *peerTable) hearing(node string, now time.Duration) map[string]answer {
	t.mu.Lock()
	defer t.mu.Unlock()
	found := map[string]answer{}
	for name, a := range t.answers {
		for _, h := range a.got.GetHeard() {
			if h.GetNode() == node && now-a.sent+time.Duration(h.GetAgoMs())*time.Millisecond < relayHears {
				found[name] = a
			}
		}
	}
	return found
}

// silence is how long a ping may go unanswered before the way is doubted: two
// ticks and a round trip between far cities. A peer that stood still for a
// moment is doubted too often, which costs a dial.
func (c *Cluster) silence() time.Duration { return 2*c.Timing().Tick + 100*time.Millisecond }

// silent are the nodes that answered pings once and don't now.
func (c *Cluster) silent() []string {
	now := Boottime()
	c.peers.mu.Lock()
	defer c.peers.mu.Unlock()
	var names []string
	for name, a := range c.peers.answers {
		if now-a.sent > c.silence() {
			names = append(names, name)
		}
	}
	return names
}
