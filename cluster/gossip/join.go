package gossip

import (
	"context"
	"net/netip"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"
)

// maxJoins bounds the nodes that are joined at the same time.
const maxJoins = 8

// joinTiming are the delays between two attempts to join seeds and lost members.
type joinTiming struct {
	first  time.Duration // after the first attempt that found no node; doubles
	steady time.Duration // the longest delay, and the one when no other applies
	lost   time.Duration // while a member has been dead for less than recent
	recent time.Duration
	// conflict is the delay while other members know this node's name under its
	// address before the restart: each join announces the new address again.
	conflict time.Duration
}

var defaultJoinTiming = joinTiming{
	first: time.Second, steady: 30 * time.Second,
	lost: 5 * time.Second, recent: 10 * time.Minute,
	conflict: 3 * time.Second,
}

// delay is the time until the next attempt; last is the delay before.
func (t joinTiming) delay(s joinState, last time.Duration) time.Duration {
	switch {
	case s.conflict:
		return t.conflict
	case s.recentlyLost:
		return t.lost
	case s.alone:
		return min(max(2*last, t.first), t.steady)
	}
	return t.steady
}

// joinLoop joins seeds and lost members until ctx ends. While all of them are
// alive it opens no connection.
func (g *Gossip) joinLoop(ctx context.Context, list *memberlist.Memberlist, t *transport) {
	var delay time.Duration
	for ctx.Err() == nil {
		before := g.table.joinState(time.Now(), g.timing.join.recent)
		g.join(ctx, list, g.joinTargets(ctx, before, *t.advertise.Load()))
		after := g.table.joinState(time.Now(), g.timing.join.recent)
		if !after.alone && before.alone {
			delay = 0
		}
		delay = g.timing.join.delay(after, delay)
		g.waitToJoin(ctx, delay)
	}
}

// waitToJoin waits for the delay, or for a shorter one when a member is lost or
// this node's name gets into conflict meanwhile.
func (g *Gossip) waitToJoin(ctx context.Context, delay time.Duration) {
	next := time.Now().Add(delay)
	timer := time.NewTimer(delay)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
			return
		case <-g.table.wakeJoin:
			now := time.Now()
			sooner := now.Add(g.timing.join.delay(g.table.joinState(now, g.timing.join.recent), 0))
			if sooner.Before(next) {
				next = sooner
				timer.Reset(time.Until(next))
			}
		}
	}
}

// joinTargets lists the addresses of all seeds and lost members, except those of
// living members. While this node's name is in conflict it lists the living members
// too, because each of them must hear the new address.
func (g *Gossip) joinTargets(ctx context.Context, s joinState, self netip.AddrPort) []netip.AddrPort {
	listed := map[netip.AddrPort]bool{self: true}
	var addrs []netip.AddrPort
	add := func(a netip.AddrPort) {
		if !listed[a] && (s.conflict || !s.alive[a]) && len(addrs) < maxMembers {
			listed[a] = true
			addrs = append(addrs, a)
		}
	}
	if s.conflict {
		for a := range s.alive {
			add(a)
		}
	}
	for _, a := range s.lost {
		add(a)
	}
	for _, seed := range g.opts.Seeds() {
		resolved, err := resolveHostPort(ctx, seed)
		if err != nil {
			g.metrics.joins.WithLabelValues("unresolved").Inc()
			g.opts.Logger.Debug("gossip: could not resolve a seed's address", "seed", seed, "err", err)
			continue
		}
		for _, a := range resolved {
			add(a)
		}
	}
	return addrs
}

func (g *Gossip) join(ctx context.Context, list *memberlist.Memberlist, addrs []netip.AddrPort) {
	slots := make(chan struct{}, maxJoins)
	var joins sync.WaitGroup
	defer joins.Wait()
	for _, a := range addrs {
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			return
		}
		joins.Go(func() {
			defer func() { <-slots }()
			if _, err := list.Join([]string{a.String()}); err != nil {
				g.metrics.joins.WithLabelValues("failed").Inc()
				g.opts.Logger.Debug("gossip: could not join a node", "address", a.String(), "err", err)
				return
			}
			g.metrics.joins.WithLabelValues("met").Inc()
		})
	}
}
