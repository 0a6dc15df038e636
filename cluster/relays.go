package cluster

import (
	"cmp"
	"slices"
	"time"
)

// relayFreshness bounds the age of a peer's newest answer, and the age at that time of the
// peer's newest answer from a node, for the peer to be asked for a tunnel to the node. It
// covers the slowest pings that are answered: on a busy machine an old report is better
// than none.
const relayFreshness = pingTimeout + time.Second

// relays are the peers to ask for a tunnel to a node, in this order: peers of a third
// site, of this node's site, of that node's site; after all these, those that are draining
// or silent now. They answered a ping lately and reported that they hear the node. A
// peer that itself reaches the node only through a tunnel will refuse.
func (c *Cluster) relays(node string) []string {
	now, members := c.opts.Host.Boottime(), c.members()
	site := func(name string) string { return members[name].Site }
	return rankRelays(node, c.opts.Site, site, c.peers.peersHearing(node, now), now-c.pingSilence())
}

// rankRelays sorts the peers that hear a node as relays describes. A peer is silent if it
// has answered no ping sent after the time later.
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

// peersHearing returns the newest answers of the peers that heard a node lately.
func (t *peerTable) peersHearing(node string, now time.Duration) map[string]answer {
	t.mu.Lock()
	defer t.mu.Unlock()
	found := map[string]answer{}
	for name, a := range t.answers {
		if now-a.sent >= relayFreshness {
			continue
		}
		for _, h := range a.got.GetHeard() {
			if h.GetNode() == node && h.GetAgoMs() < relayFreshness.Milliseconds() {
				found[name] = a
			}
		}
	}
	return found
}

// pingSilence is how long a peer may answer no ping before the mesh examines the route to
// it: two ticks and a round trip between distant cities. Examining the route to a peer
// that only paused costs a dial.
func (c *Cluster) pingSilence() time.Duration { return 2*c.Timing().Tick + 100*time.Millisecond }

// silentPeers are the peers that answered pings earlier, but not within pingSilence.
func (c *Cluster) silentPeers() []string {
	now := c.opts.Host.Boottime()
	c.peers.mu.Lock()
	defer c.peers.mu.Unlock()
	var names []string
	for name, a := range c.peers.answers {
		if now-a.sent > c.pingSilence() {
			names = append(names, name)
		}
	}
	return names
}
