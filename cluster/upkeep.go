package cluster

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"slices"
	"time"

	"github.com/dsnode/dsnode/cluster/agreed"
)

const upkeepEvery = 2 * time.Second

// upkeep runs small periodic tasks: learning addresses from the agreed state, a
// snapshot after each change of raft's configuration, and, on the leader,
// raising the feature level.
func (c *Cluster) upkeep(ctx context.Context) error {
	tick := time.NewTicker(upkeepEvery)
	defer tick.Stop()
	for {
		changed := c.Changed()
		s := c.State()
		for _, n := range s.Nodes {
			c.book.learn(n)
		}
		c.snapshotConfiguration()
		if _, leads := c.Leading(); leads {
			if level := featureLevel(s); level > s.FeatureLevel {
				if _, err := c.Propose(ctx, agreed.CmdFeatureRaise, agreed.FeatureRaise{Level: level}); err != nil && !errors.Is(err, context.Canceled) {
					c.log.Warn("feature level not raised", "to", level, "err", err)
				} else if err == nil {
					c.log.Info("feature level raised", "to", level)
				}
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-tick.C:
		}
	}
}

// snapshotConfiguration takes a snapshot when the newest one does not hold
// raft's configuration. What is restored at a start ends before the newest
// configuration outside a snapshot (see restoredLog), so without this a node
// that restarts alone, before the first regular snapshot, would serve an agreed
// state from before its cluster grew.
func (c *Cluster) snapshotConfiguration() {
	index := c.fsm.configured.Load()
	if index <= c.snapshotted {
		return
	}
	kept, err := c.opts.Snapshots.List()
	if err != nil {
		return // the store has said why
	}
	if len(kept) == 0 || kept[0].Index < index {
		if err := c.raft.Load().Snapshot().Error(); err != nil {
			c.log.Debug("no snapshot of raft's configuration yet", "err", err)
			return
		}
		c.log.Info("snapshot taken: raft's configuration has changed", "configuration_index", index)
	}
	c.snapshotted = index
}

// featureLevel is the highest that every member supports.
func featureLevel(s *agreed.State) int {
	if len(s.Nodes) == 0 {
		return s.FeatureLevel
	}
	level := agreed.MaxFeatureLevel
	for _, n := range s.Nodes {
		level = min(level, n.Feature)
	}
	return max(level, s.FeatureLevel)
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }

func compareStrings(a, b string) int { return cmp.Compare(a, b) }
