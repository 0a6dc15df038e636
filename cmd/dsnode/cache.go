package main

import (
	"context"
	"fmt"
	"io"
	"maps"
	"slices"

	"github.com/spf13/cobra"

	"github.com/dsnode/dsnode/node/admin"
)

func newCacheCommand(env *environment) *cobra.Command {
	return newGroup("cache", "Show and purge the answer cache", newCacheStatsCommand(env), newCachePurgeCommand(env))
}

func newCacheStatsCommand(env *environment) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "stats",
		Short: "Show a node's cache and its hits and misses",
		Long: "Show the cache of the node that answers: its two tiers, and how many lookups of each tier had which result\n" +
			"since the node started. - is an unknown value.",
		Args: takes(),
	}
	return onCluster(env, cmd, func(ctx context.Context, s *session, _ []string) error {
		stats, err := s.CacheStats(ctx)
		if err != nil {
			return err
		}
		return s.show(stats, func(w io.Writer) error {
			tiers := &grid{heads: []string{"TIER", "KIND", "STATE", "ENTRIES", "BYTES", "OF"}}
			for _, t := range []struct {
				name string
				is   admin.CacheTier
			}{{"local", stats.Local}, {"shared", stats.Shared}} {
				of := "-"
				if t.is.MaxBytes > 0 {
					of = fmt.Sprint(t.is.MaxBytes)
				}
				state := cell{t.is.State, yellow}
				if t.is.State == "ok" {
					state.colour = green
				}
				tiers.add(plain(t.name), plain(t.is.Kind), state, plain(number(t.is.Entries)), plain(number(t.is.Bytes)), plain(of))
			}
			if err := tiers.write(w, env.palette()); err != nil {
				return err
			}
			if stats.Shared.Reason != "" {
				if err := emit(w, "\nThe shared tier is %s: %s\n", stats.Shared.State, stats.Shared.Reason); err != nil {
					return err
				}
			}
			looks := &grid{heads: []string{"TIER", "RESULT", "REQUESTS"}}
			for _, tier := range slices.Sorted(maps.Keys(stats.Requests)) {
				for _, result := range slices.Sorted(maps.Keys(stats.Requests[tier])) {
					looks.add(plain(tier), plain(result), plain(fmt.Sprint(stats.Requests[tier][result])))
				}
			}
			if err := emit(w, "\n"); err != nil {
				return err
			}
			return looks.write(w, env.palette())
		})
	})
}

func newCachePurgeCommand(env *environment) *cobra.Command {
	var r admin.CachePurge
	cmd := &cobra.Command{
		Use:   "purge --all | --model MODEL | --key KEY",
		Short: "Make cached answers unusable in every site",
		Long: "Make cached answers unusable in every site, also in a site that can't be reached now: it will not use them\n" +
			"when it is back. The header Cache-Status of an answer shows its KEY.",
		Args: takes(),
	}
	cmd.Flags().BoolVar(&r.All, "all", false, "purge all answers")
	cmd.Flags().StringVar(&r.Model, "model", "", "purge all answers of this `MODEL`")
	cmd.Flags().StringVar(&r.Key, "key", "", "purge the answer with this `KEY`")
	return onCluster(env, cmd, func(ctx context.Context, s *session, _ []string) error {
		named := 0
		for _, is := range []bool{r.All, r.Model != "", r.Key != ""} {
			if is {
				named++
			}
		}
		if named != 1 {
			return usage("dsnode cache purge --all purges everything", "give exactly one of --all, --model and --key")
		}
		what := "all cached answers"
		switch {
		case r.Model != "":
			what = "all cached answers of " + r.Model
		case r.Key != "":
			what = "the answer"
		}
		return s.done(s.PurgeCache(ctx, r, ""), "purged %s in every site", what)
	})
}
