package cluster

import (
	"cmp"
	"slices"
	"time"

	"github.com/dsnode/dsnode/cluster/clock"
)

// relayHears is how long ago a peer may have been heard, and at that moment have
// heard a node, to be asked for a tunnel there. It covers the slowest pings that
// are answered: on a busy machine an old word is better than none.
const relayHears = pingTimeout + time.Second

// relays are the peers that lately said that they hear a node, and were heard
// themselves: those of a third site first, then neighbours, of this node and of
// that one; who is silent right now comes last. A peer that reaches the node
// only through another will refuse.
func (c *Cluster) relays(node string) []string {
	now, members := clock.Boottime(), c.members()
	site := func(name string) string { return members[name].Site }
	return rankRelays(node, c.opts.Site, site, c.peers.hearing(node, now), now-c.silence())
}

// rankRelays puts the peers that hear a node into the order in which they are
// asked; those who have answered no ping that was sent later than that are last.
func rankRelays(node, ownSite string, siteOf func(string) string, hearing map[string]answer, later time.Duration) []string {
	ranks := map[string]int{}
	names := []string{}
	for name, a := range hearing {
		site := siteOf(name)
		if name == node || site == "" {
			continue
		}
		switch site {
		case ownSite:
			ranks[name] = 1
		case siteOf(node):
			ranks[name] = 2
		}
		if a.sent <= later || a.got.GetHealth().GetDraining() {
			ranks[name] += 3
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
		if now-a.sent >= relayHears {
			continue
		}
		for _, h := range a.got.GetHeard() {
			if h.GetNode() == node && h.GetAgoMs() < relayHears.Milliseconds() {
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
	now := clock.Boottime()
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
