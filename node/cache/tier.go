package cache

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/dsnode/dsnode/cluster/config"
)

// runTier opens the shared tier that the configuration wants, tries a tier that fails,
// and sweeps both tiers, until ctx ends.
func (c *Cache) runTier(ctx context.Context) error {
	try, sweep := time.NewTicker(tryEvery), time.NewTicker(sweepEvery)
	defer try.Stop()
	defer sweep.Stop()
	var have tierSpec
	var opened time.Time // the last attempt to open a tier
	var first sync.Once
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
			// A Redis that fails is opened again now and then: the operator may have
			// replaced its password, certificates or addresses.
			if s != nil && s.reads.isOpen() && have.site.Shared == config.SharedRedis && time.Since(opened) >= reopenEvery {
				have = tierSpec{}
			}
		}
		want := c.want()
		if want == have || time.Since(opened) < reopenEvery {
			continue
		}
		opened = time.Now()
		err := c.switchTier(ctx, have, want)
		first.Do(func() { close(c.tierTried) })
		if err != nil {
			c.noteTierError(string(want.site.Shared), err.Error())
			have = tierSpec{}
			continue
		}
		have = want
	}
}

// switchTier closes the open tier and opens the wanted one, unless they are the same.
func (c *Cache) switchTier(ctx context.Context, have, want tierSpec) error {
	have.maxAge = want.maxAge
	if have == want && c.shared.Load() != nil {
		return nil
	}
	if err := c.closeTier(); err != nil {
		c.log.Warn("can't close the shared cache", "err", err)
	}
	var s store
	var err error
	switch want.site.Shared {
	case config.SharedEmbedded:
		s, err = openEmbedded(c.o.Dir, want.bytes, c.now, c.log, func() { c.counts.rebuilds.Add(1) })
	case config.SharedRedis:
		s, err = openRedis(want.site.Redis, maxAnswer+maxOverhead, c.o.Files)
	default:
		c.tierError.Store(nil)
		return nil
	}
	if err != nil {
		return err
	}
	kind := string(want.site.Shared)
	begun := false
	tier := newShared(s, func(open bool, why error) {
		switch {
		case !begun: // logged below
		case open:
			c.noteTierError(kind, why.Error())
		default:
			c.noteTierOpen(kind)
		}
	}, func(open bool, why error) {
		if open {
			c.log.Warn("writes to the shared cache fail, it is only read", "tier", kind, "err", why)
		} else {
			c.log.Info("the shared cache is written again", "tier", kind)
		}
	})
	// If the tier does not answer, its breaker opens here and not at requests' expense.
	tier.begin(ctx)
	if !tier.reads.isOpen() {
		c.noteTierOpen(kind)
	} else {
		c.noteTierError(kind, tier.reads.reason())
	}
	begun = true
	c.shared.Store(tier)
	return nil
}

// noteTierError logs why the shared tier is not used, once for each reason.
func (c *Cache) noteTierError(kind, why string) {
	if was := c.tierError.Swap(&why); was != nil && *was == why {
		return
	}
	c.log.Warn("the shared cache fails, it is not used until it works again", "tier", kind, "err", why)
}

func (c *Cache) noteTierOpen(kind string) {
	c.tierError.Store(nil)
	c.log.Info("the shared cache is open", "tier", kind)
}

// closeTier closes the shared tier. It does not wait for one that hangs.
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
	case <-time.After(batchTime):
		return errSlow
	}
}

// sweep drops answers that are too old to be given even when no upstream can answer,
// and purged ones from memory.
func (c *Cache) sweep(ctx context.Context) {
	now, most := c.now(), c.conf.Load().maxAge
	purges := c.o.Purges()
	c.local.sweep(func(k Key, r *resident) bool {
		return now.Sub(r.answer.StoredAt) > most || r.answer.Purge < purges.Least(r.model, k.String)
	})
	if s := c.shared.Load(); s != nil {
		if err := s.sweep(ctx, now.Add(-most)); err != nil && !errors.Is(err, errOpen) && ctx.Err() == nil {
			c.log.Warn("can't sweep the shared cache", "err", err)
		}
	}
}
