package cache

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/dsnode/dsnode/cluster/config"
)

const (
	maxWrites     = 16 << 10
	maxWriteBytes = 32 << 20
	maxBatch      = 256
	// gather lets a few more answers come into a batch: a commit costs as much
	// for one as for a hundred.
	gather = 10 * time.Millisecond
)

// write1 is an answer on its way to the shared tier, from here or from a peer, or,
// without either, the key of one that is worth nothing there.
type write1 struct {
	key    Key
	answer *Answer
	entry  *Entry // of a peer, sealed already
}

func newWrites(n *counts) *Queue[write1] {
	return NewQueue(maxWrites, maxWriteBytes, func(w write1) int {
		switch {
		case w.entry != nil:
			return w.entry.Size()
		case w.answer != nil:
			return w.answer.weight()
		}
		return len(w.key)
	}, func(lost int) { n.lost[lostQueue].Add(uint64(lost)) }) //nolint:gosec // not negative
}

// keepWriting seals and writes what was kept.
func (c *Cache) keepWriting(ctx context.Context) error {
	select { // what peers have kept for us may come before our tier is open
	case <-ctx.Done():
		return nil
	case <-c.begun:
	}
	wait := time.NewTimer(0)
	defer wait.Stop()
	for {
		first, err := c.writes.Take(ctx, 1)
		if err != nil {
			return nil // ctx has ended, Run writes the rest
		}
		wait.Reset(gather)
		select {
		case <-ctx.Done():
		case <-wait.C:
		}
		// What was taken is written even when ctx has just ended.
		c.write(context.WithoutCancel(ctx), append(first, c.writes.now(maxBatch-1)...))
	}
}

func (c *Cache) writeAll(ctx context.Context) {
	for ctx.Err() == nil {
		batch := c.writes.now(maxBatch)
		if len(batch) == 0 {
			return
		}
		c.write(ctx, batch)
	}
}

func (c *Cache) write(ctx context.Context, batch []write1) {
	entries := make([]Entry, 0, len(batch))
	var worthless []Key
	for _, w := range batch {
		if w.entry != nil {
			entries = append(entries, *w.entry)
			continue
		}
		if w.answer == nil {
			worthless = append(worthless, w.key)
			continue
		}
		e, err := c.seal(w.key, w.answer)
		if err != nil { // no key yet, or no more
			c.counts.lost[lostWrite].Add(1)
			continue
		}
		entries = append(entries, e)
		if c.out != nil {
			c.out.Offer(e)
		}
	}
	s := c.shared.Load()
	if s == nil {
		return
	}
	if len(worthless) > 0 { // first: a good one may be in the same batch
		if err := s.drop(ctx, worthless); err != nil {
			c.log.Debug("damaged entries stay in the shared cache", "entries", len(worthless), "err", err)
		}
	}
	if len(entries) == 0 {
		return
	}
	if err := s.put(ctx, entries, c.conf.Load().maxAge); err != nil {
		c.counts.lost[lostWrite].Add(uint64(len(entries)))
		if !errors.Is(err, errResting) {
			c.log.Debug("answers were not written to the shared cache", "entries", len(entries), "err", err)
		}
	}
}

// keepTier opens the shared tier that the configuration wants, tries one that
// rests, and sweeps. A remote one that rests is opened anew from time to time: its
// password, its certificates or its addresses may have been put right.
func (c *Cache) keepTier(ctx context.Context) error {
	try, sweep := time.NewTicker(tryEvery), time.NewTicker(sweepEvery)
	defer try.Stop()
	defer sweep.Stop()
	var have tierSpec
	var opened time.Time // or tried to
	var begin sync.Once
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-c.changed:
			opened = time.Time{}
		case <-sweep.C:
			c.sweep(ctx)
			continue
		case <-try.C:
			s := c.shared.Load()
			if s != nil {
				s.try(ctx)
			}
			if s != nil && s.reads.resting() && have.site.Shared == config.SharedRedis && time.Since(opened) >= reopenEvery {
				have = tierSpec{}
			}
		}
		want := c.want()
		if want == have || time.Since(opened) < reopenEvery {
			continue
		}
		opened = time.Now()
		err := c.retier(ctx, have, want)
		begin.Do(func() { close(c.begun) })
		if err != nil {
			c.tierFails(string(want.site.Shared), err.Error())
			have = tierSpec{}
			continue
		}
		have = want
	}
}

// retier closes what is open, unless it can stay, and opens what is wanted.
func (c *Cache) retier(ctx context.Context, have, want tierSpec) error {
	have.maxAge = want.maxAge
	if have == want && c.shared.Load() != nil {
		return nil
	}
	if err := c.closeTier(); err != nil {
		c.log.Warn("close the shared cache", "err", err)
	}
	var s store
	var err error
	switch want.site.Shared {
	case config.SharedEmbedded:
		s, err = openEmbedded(c.o.Dir, want.bytes, c.now, c.log, func() { c.counts.rebuilds.Add(1) })
	case config.SharedRedis:
		s, err = openRedis(want.site.Redis, maxAnswer+maxOverhead, c.o.Files)
	default:
		c.trouble.Store(nil)
		return nil
	}
	if err != nil {
		return err
	}
	kind := string(want.site.Shared)
	begun := false
	tier := newShared(s, func(open bool, why error) {
		switch {
		case !begun:
		case open:
			c.tierFails(kind, why.Error())
		default:
			c.tierWorks(kind)
		}
	}, func(open bool, why error) {
		if open {
			c.log.Warn("the shared cache takes no answers, what it has is used", "tier", kind, "err", why)
		} else {
			c.log.Info("the shared cache takes answers again", "tier", kind)
		}
	})
	// Who can't reach it at all learns it here, not from a request.
	tier.begin(ctx)
	if !tier.reads.resting() {
		c.tierWorks(kind)
	} else {
		c.tierFails(kind, tier.reads.reason())
	}
	begun = true
	c.shared.Store(tier)
	return nil
}

// tierFails says why the shared tier is not used, once for each reason.
func (c *Cache) tierFails(kind, why string) {
	if was := c.trouble.Swap(&why); was != nil && *was == why {
		return
	}
	c.log.Warn("the shared cache fails and is left alone until it answers", "tier", kind, "err", why)
}

func (c *Cache) tierWorks(kind string) {
	c.trouble.Store(nil)
	c.log.Info("the shared cache is open", "tier", kind)
}

func (c *Cache) closeTier() error {
	s := c.shared.Swap(nil)
	if s == nil {
		return nil
	}
	done := make(chan error, 1)
	go func() { done <- s.store.close() }()
	select {
	case err := <-done:
		return err
	case <-time.After(batchTime): // it hangs; the end of the process frees it
		return errSlow
	}
}

// sweep drops what is too old for anything.
func (c *Cache) sweep(ctx context.Context) {
	now, most := c.now(), c.conf.Load().maxAge
	purges := c.o.Purges()
	c.local.sweep(func(k Key, r *resident) bool {
		return now.Sub(r.answer.StoredAt) > most || r.answer.Purge < purges.Least(r.model, k.String)
	})
	if s := c.shared.Load(); s != nil {
		if err := s.sweep(ctx, now.Add(-most)); err != nil && !errors.Is(err, errResting) && ctx.Err() == nil {
			c.log.Warn("sweep the shared cache", "err", err)
		}
	}
}

// TierStats is one tier at a moment.
type TierStats struct {
	Kind    string // "memory", "embedded", "redis" or "off"
	State   string // "ok", "opening", "resting", "read-only" or "off"
	Reason  string // of a state that is neither ok nor off, when known
	Entries *int64 // nil: not known
	Bytes   *int64
	Max     int64 // 0: the tier's own
}

// Stats are the cache's figures since the start of the process.
type Stats struct {
	Local, Shared TierStats
	// Requests are by tier and result.
	Requests map[string]map[string]uint64
	Stored   uint64
	Absorbed uint64
	Dropped  map[string]uint64
	Rebuilds uint64
	Purges   uint64 // agreed on so far
}

// Stats counts.
func (c *Cache) Stats() Stats {
	entries, bytes := c.local.size()
	n := int64(entries)
	st := Stats{
		Local:    TierStats{Kind: "memory", State: "ok", Entries: &n, Bytes: &bytes, Max: int64(c.local.held.GetMaximum())}, //nolint:gosec // checked by the configuration
		Requests: map[string]map[string]uint64{}, Dropped: map[string]uint64{},
		Stored: c.counts.kept.Load(), Absorbed: c.counts.absorbed.Load(), Rebuilds: c.counts.rebuilds.Load(),
		Purges: c.o.Purges().Count,
	}
	for r, names := range resultNames {
		if st.Requests[names[0]] == nil {
			st.Requests[names[0]] = map[string]uint64{}
		}
		st.Requests[names[0]][names[1]] = c.counts.results[r].Load()
	}
	for l, name := range lossNames {
		st.Dropped[name] = c.counts.lost[l].Load()
	}
	want, s := c.want(), c.shared.Load()
	st.Shared = TierStats{Kind: string(want.site.Shared), State: "ok"}
	switch {
	case want.site.Shared == "" || want.site.Shared == config.SharedOff:
		st.Shared.Kind, st.Shared.State = "off", "off"
	case s == nil:
		st.Shared.State = "opening"
		if why := c.trouble.Load(); why != nil {
			st.Shared.Reason = *why
		}
	case s.reads.resting():
		st.Shared.State, st.Shared.Reason = "resting", s.reads.reason()
	default:
		if s.writes.resting() {
			st.Shared.State, st.Shared.Reason = "read-only", s.writes.reason()
		}
		if entries, bytes, known := s.store.size(); known {
			st.Shared.Entries, st.Shared.Bytes = &entries, &bytes
		}
	}
	if want.site.Shared == config.SharedEmbedded {
		st.Shared.Max = want.bytes
	}
	return st
}
