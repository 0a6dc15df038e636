package config

import (
	"slices"
	"time"
)

// Jobs configures how every node accepts, keeps and runs asynchronous jobs.
type Jobs struct {
	// Durability says on which disks a job must be before it is accepted, if the
	// client doesn't specify it: node, site, two-sites (the default) or
	// two-cities. If that is impossible at the moment, it falls back to node.
	Durability string `yaml:"durability,omitempty"`
	// Concurrency bounds the jobs that one node runs at once. Default 16.
	Concurrency int `yaml:"concurrency,omitempty"`
	// Paused stops all nodes from starting jobs; they still accept them. It is for
	// maintenance of the model servers.
	Paused bool `yaml:"paused,omitempty"`
	// MaxQueued and MaxQueuedBytes bound the unfinished jobs of one node, and the
	// bytes of their bodies. Defaults 100000 and 1 GiB.
	MaxQueued      int   `yaml:"max_queued,omitempty"`
	MaxQueuedBytes int64 `yaml:"max_queued_bytes,omitempty"`
	// Retention is how long a job is kept after its end. Default 24h.
	Retention Duration `yaml:"retention,omitempty"`
	// MaxAttempts bounds how often a job is started. Default 5.
	MaxAttempts int `yaml:"max_attempts,omitempty"`
	// ExpiresIn is how long a job may wait for its start, if the client doesn't
	// specify it. Default 24h.
	ExpiresIn Duration `yaml:"expires_in,omitempty"`
}

// Running is how many jobs a node may run at once: none while paused.
func (j Jobs) Running() int {
	if j.Paused {
		return 0
	}
	return j.Concurrency
}

// JobDurabilities are the durabilities of jobs, weakest first.
func JobDurabilities() []string { return []string{"node", "site", "two-sites", "two-cities"} }

// MaxJobExpiry bounds how long a job may wait for its start.
const MaxJobExpiry = 7 * 24 * time.Hour

// DefaultJobs is the configuration of jobs without a jobs section.
func DefaultJobs() Jobs {
	return Jobs{
		Durability: "two-sites", Concurrency: 16, MaxQueued: 100_000, MaxQueuedBytes: 1 << 30,
		Retention: Duration(24 * time.Hour), MaxAttempts: 5, ExpiresIn: Duration(24 * time.Hour),
	}
}

func (c *checker) jobs() {
	j, at := c.Jobs, At("jobs")
	if !slices.Contains(JobDurabilities(), j.Durability) {
		c.reject(at.At("durability"), c.src.suggest(j.Durability, JobDurabilities(), ""), "%s is not a durability", quoted(j.Durability))
	}
	c.between(at.At("concurrency"), int64(j.Concurrency), 1, 4096)
	c.between(at.At("max_queued"), int64(j.MaxQueued), 1, 1_000_000)
	c.between(at.At("max_queued_bytes"), j.MaxQueuedBytes, 1<<20, 1<<40)
	c.between(at.At("max_attempts"), int64(j.MaxAttempts), 1, 100)
	c.within(at.At("retention"), j.Retention, time.Minute, 30*24*time.Hour)
	c.within(at.At("expires_in"), j.ExpiresIn, time.Second, MaxJobExpiry)
}
