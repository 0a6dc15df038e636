package gossip

import (
	"context"
	"net/netip"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"
)

// meetMax bounds the nodes met at the same time.
const meetMax = 8

// rejoinTiming says how often this node looks for those it doesn't hear.
type rejoinTiming struct {
	first  time.Duration // after the first attempt found nobody; doubles
	steady time.Duration // at most, and always in the end
	lost   time.Duration // while somebody is lost since not longer than recent
	recent time.Duration
	// conflict is while the others hold this node for its earlier self, under
	// another address: each meeting renews the claim to the name.
	conflict time.Duration
}

var defaultRejoinTiming = rejoinTiming{
	first: time.Second, steady: 30 * time.Second,
	lost: 5 * time.Second, recent: 10 * time.Minute,
	conflict: 3 * time.Second,
}

// pause decides how long to wait after an attempt.
func (r rejoinTiming) pause(v meeting, last time.Duration) time.Duration {
	switch {
	case v.conflict:
		return r.conflict
	case v.newly:
		return r.lost
	case v.alone:
		return min(max(2*last, r.first), r.steady)
	}
	return r.steady
}

// keepMeeting joins seeds and lost members until ctx ends. In a cluster where
// everybody is heard it opens no connection.
func (g *Gossip) keepMeeting(ctx context.Context, list *memberlist.Memberlist, t *transport) {
	var pause time.Duration
	for ctx.Err() == nil {
		before := g.table.meeting(time.Now(), g.timing.rejoin.recent)
		g.meet(ctx, list, g.toMeet(ctx, before, *t.advertise.Load()))
		after := g.table.meeting(time.Now(), g.timing.rejoin.recent)
		if !after.alone && before.alone {
			pause = 0
		}
		pause = g.timing.rejoin.pause(after, pause)
		g.rest(ctx, pause)
	}
}

// rest waits for the next meeting, which comes earlier when somebody is lost.
func (g *Gossip) rest(ctx context.Context, pause time.Duration) {
	next := time.Now().Add(pause)
	timer := time.NewTimer(pause)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
			return
		case <-g.table.stir:
			now := time.Now()
			sooner := now.Add(g.timing.rejoin.pause(g.table.meeting(now, g.timing.rejoin.recent), 0))
			if sooner.Before(next) {
				next = sooner
				timer.Reset(time.Until(next))
			}
		}
	}
}

// toMeet is every seed and lost member that is not heard already.
func (g *Gossip) toMeet(ctx context.Context, v meeting, self netip.AddrPort) []netip.AddrPort {
	met := map[netip.AddrPort]bool{self: true}
	var addrs []netip.AddrPort
	add := func(a netip.AddrPort) {
		// With its name in dispute this node has to be heard by everybody.
		if !met[a] && (v.conflict || !v.live[a]) && len(addrs) < gossipMembersMax {
			met[a] = true
			addrs = append(addrs, a)
		}
	}
	if v.conflict {
		for a := range v.live {
			add(a)
		}
	}
	for _, a := range v.lost {
		add(a)
	}
	for _, seed := range g.opts.Seeds() {
		resolved, err := resolveHostPort(ctx, seed)
		if err != nil {
			g.metrics.joins.WithLabelValues("unresolved").Inc()
			g.opts.Logger.Debug("gossip: a seed can't be resolved", "seed", seed, "error", err)
			continue
		}
		for _, a := range resolved {
			add(a)
		}
	}
	return addrs
}

func (g *Gossip) meet(ctx context.Context, list *memberlist.Memberlist, addrs []netip.AddrPort) {
	slots := make(chan struct{}, meetMax)
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
				g.opts.Logger.Debug("gossip: a node was not met", "address", a.String(), "error", err)
				return
			}
			g.metrics.joins.WithLabelValues("met").Inc()
		})
	}
}
