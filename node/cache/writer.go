package cache

import (
	"context"
	"errors"
)

const (
	maxWrites     = 16 << 10
	maxWriteBytes = 32 << 20
	maxBatch      = 256
)

// pendingWrite is a change that is queued for the shared tier. It has an answer of this
// node, an entry of a peer, or neither: then key is to be dropped.
type pendingWrite struct {
	key    Key
	answer *Answer
	entry  *Entry
}

func newWrites(n *counts) *Queue[pendingWrite] {
	return NewQueue(maxWrites, maxWriteBytes, func(w pendingWrite) int {
		switch {
		case w.entry != nil:
			return w.entry.Size()
		case w.answer != nil:
			return w.answer.weight()
		}
		return len(w.key)
	}, func(dropped int) { n.dropped[dropQueueFull].Add(uint64(dropped)) }) //nolint:gosec // not negative
}

// runWriter seals and writes queued answers until ctx ends. It leaves the rest to
// writeAll.
func (c *Cache) runWriter(ctx context.Context) error {
	select { // peers may send entries before the tier is open
	case <-ctx.Done():
		return nil
	case <-c.tierTried:
	}
	for {
		batch, err := c.writes.Take(ctx, maxBatch)
		if err != nil {
			return nil // ctx has ended
		}
		// A batch that was taken is written also when ctx has just ended.
		c.write(context.WithoutCancel(ctx), batch)
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

func (c *Cache) write(ctx context.Context, batch []pendingWrite) {
	entries := make([]Entry, 0, len(batch))
	var drops []Key
	for _, w := range batch {
		if w.entry != nil {
			entries = append(entries, *w.entry)
			continue
		}
		if w.answer == nil {
			drops = append(drops, w.key)
			continue
		}
		e, err := c.seal(w.key, w.answer)
		if err != nil { // the ring has no data key
			c.counts.dropped[dropWriteFailed].Add(1)
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
	if len(drops) > 0 { // before put: the batch may have a good entry of the same key
		if err := s.drop(ctx, drops); err != nil {
			c.log.Debug("can't drop damaged entries of the shared cache", "entries", len(drops), "err", err)
		}
	}
	if len(entries) == 0 {
		return
	}
	if err := s.put(ctx, entries, c.conf.Load().maxAge); err != nil {
		c.counts.dropped[dropWriteFailed].Add(uint64(len(entries)))
		if !errors.Is(err, errOpen) {
			c.log.Debug("can't write answers to the shared cache", "entries", len(entries), "err", err)
		}
	}
}
