package cluster

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"slices"
	"time"
)

const houseEvery = 2 * time.Second

// keepHouse does the leader's small duties: learning addresses from the agreed
// state on every node, and raising the feature level on the leader.
func (c *Cluster) keepHouse(ctx context.Context) error {
	tick := time.NewTicker(houseEvery)
	defer tick.Stop()
	for {
		changed := c.Changed()
		s := c.State()
		for _, n := range s.Nodes {
			c.book.learn(n)
		}
		if _, leads := c.Leading(); leads {
			if level := featureLevel(s); level > s.FeatureLevel {
				if _, err := c.Propose(ctx, CmdFeatureRaise, FeatureRaise{Level: level}); err != nil && !errors.Is(err, context.Canceled) {
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

// featureLevel is the highest that every member supports.
func featureLevel(s *State) int {
	if len(s.Nodes) == 0 {
		return s.FeatureLevel
	}
	level := MaxFeatureLevel
	for _, n := range s.Nodes {
		level = min(level, n.Feature)
	}
	return max(level, s.FeatureLevel)
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }

func compareStrings(a, b string) int { return cmp.Compare(a, b) }
