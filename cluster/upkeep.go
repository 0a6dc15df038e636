package cluster

import (
	"context"
	"errors"
	"time"

	"github.com/dsnode/dsnode/cluster/agreed"
)

const upkeepEvery = 2 * time.Second

// upkeep runs small periodic tasks: it copies addresses from the agreed state to the
// address book, takes a snapshot after each change of raft's configuration, lets a node that
// lost its log take part in elections again and, on the leader, raises the feature level
// and keeps the cluster key.
func (c *Cluster) upkeep(ctx context.Context) error {
	tick := time.NewTicker(upkeepEvery)
	defer tick.Stop()
	for {
		changed := c.Changed()
		s := c.State()
		for _, n := range s.Nodes {
			c.book.recordIndirect(n)
		}
		c.snapshotConfiguration()
		c.allowElections()
		if _, leads := c.Leading(); leads {
			if level := featureLevel(s); level > s.FeatureLevel {
				if _, err := c.Propose(ctx, agreed.CmdFeatureRaise, agreed.FeatureRaise{Level: level}); err != nil && !errors.Is(err, context.Canceled) {
					c.log.Warn("could not raise the feature level", "to", level, "err", err)
				} else if err == nil {
					c.log.Info("feature level raised", "to", level)
				}
			}
			if err := c.keepClusterKey(ctx); err != nil && ctx.Err() == nil {
				c.log.Warn("could not set the cluster key; members that join meanwhile have no ticket", "err", err)
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

// snapshotConfiguration takes a snapshot if the newest one does not have raft's newest
// configuration. At a start, raft restores only the entries before the newest
// configuration that is in no snapshot (see restoredLog). Without this snapshot, a node
// that restarts alone would use an agreed state from before that configuration.
func (c *Cluster) snapshotConfiguration() {
	index := c.fsm.configured.Load()
	if index <= c.snapshotted {
		return
	}
	kept, err := c.opts.Snapshots.List()
	if err != nil {
		return // the store has logged the error
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

// announcedLevel is the feature level that a node announces. An operator may hold it
// below the newest one, but a member can't lower the cluster's level: its commands are in
// the log.
func announcedLevel(held, agreedLevel int) int {
	if held == 0 {
		return agreed.MaxFeatureLevel
	}
	return min(max(held, agreedLevel), agreed.MaxFeatureLevel)
}

// featureLevel is the highest feature level that every member supports.
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
