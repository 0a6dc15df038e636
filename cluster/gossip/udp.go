package gossip

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"
)

// maxUDPProbes bounds the UDP probes in each interval. In a larger cluster a member is
// probed in turn.
const maxUDPProbes = 64

// probeUDPLoop sends a UDP packet to each member once per probe interval and notes who
// answers, until ctx ends. memberlist's own probes are of one member per interval, and are
// satisfied when another member or TCP reaches it.
func (g *Gossip) probeUDPLoop(ctx context.Context, list *memberlist.Memberlist) {
	tick := time.NewTicker(g.timing.probeInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		var probes sync.WaitGroup
		for name, addr := range g.table.toProbe(time.Now().Add(-g.timing.probeInterval/2), maxUDPProbes) {
			probes.Go(func() {
				if _, err := list.Ping(name, net.UDPAddrFromAddrPort(addr)); err == nil {
					g.table.udpAnswered(name)
				}
			})
		}
		probes.Wait() // memberlist ends each after the probe timeout
	}
}

// UDPAgo is how long ago a member last answered a UDP packet of this node; ever is false
// if it never did.
func (g *Gossip) UDPAgo(name string) (ago time.Duration, ever bool) {
	at := g.table.udpAt(name)
	return time.Since(at), !at.IsZero()
}

// toProbe returns the addresses of at most most members that have not answered a UDP
// packet since a time, also of dead ones: their return shows when UDP works again.
func (t *table) toProbe(since time.Time, most int) map[string]netip.AddrPort {
	now := time.Now()
	t.mu.Lock()
	defer t.mu.Unlock()
	found := map[string]netip.AddrPort{}
	for name, e := range t.entries { // in random order, so that each member has its turn
		if name == t.self || e.member.State == MemberLeft || e.udpAt.After(since) {
			continue
		}
		if len(found) == most {
			break
		}
		found[name] = e.addr
		if e.claimed(now) {
			found[name] = e.claimAddr
		}
	}
	return found
}

// udpAnswered notes that a member answered a UDP packet of this node.
func (t *table) udpAnswered(name string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if e, ok := t.entries[name]; ok {
		e.answeredUDP(time.Now())
	}
}

func (t *table) udpAt(name string) time.Time {
	t.mu.Lock()
	defer t.mu.Unlock()
	if e, ok := t.entries[name]; ok {
		return e.udpAt
	}
	return time.Time{}
}

func (e *entry) answeredUDP(now time.Time) { e.udpBlocked, e.udpAt = false, now }
