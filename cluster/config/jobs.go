package config

import (
	"fmt"
	"slices"
	"time"
)

// Jobs is how every node takes, keeps and runs asynchronous jobs.
type Jobs struct {
	// Durability is where a job is on disk before it is accepted, when the client
	// doesn't say: node, site, two-sites (the default) or two-cities. What can't
	// be had at that moment falls back to node.
	Durability string `yaml:"durability,omitempty"`
	// Concurrency bounds the jobs that one node runs at once. 16.
	Concurrency int `yaml:"concurrency,omitempty"`
	// Paused starts no job on any node, and takes them all the same: for the time
	// in which model servers are looked after.
	Paused bool `yaml:"paused,omitempty"`
	// MaxQueued and MaxQueuedBytes bound the jobs of one node that are not done,
	// and the bytes of their bodies. 100000, 1 GiB.
	MaxQueued      int   `yaml:"max_queued,omitempty"`
	MaxQueuedBytes int64 `yaml:"max_queued_bytes,omitempty"`
	// Retention is how long a job is kept after its end. 24h.
	Retention Duration `yaml:"retention,omitempty"`
	// MaxAttempts bounds how often a job is started. 5.
	MaxAttempts int `yaml:"max_attempts,omitempty"`
	// ExpiresIn is how long a job waits for its start, when the client doesn't
	// say. 24h.
	ExpiresIn Duration `yaml:"expires_in,omitempty"`
}

// Running is how many jobs a node may run at once.
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

// DefaultJobs is what stands where cluster.yaml is silent.
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
	bound := func(key string, v, least, most int64) {
		if v < least || v > most {
			c.reject(at.At(key), fmt.Sprintf("write a number from %d to %d", least, most), "%d is out of range", v)
		}
	}
	bound("concurrency", int64(j.Concurrency), 1, 4096)
	bound("max_queued", int64(j.MaxQueued), 1, 1_000_000)
	bound("max_queued_bytes", j.MaxQueuedBytes, 1<<20, 1<<40)
	bound("max_attempts", int64(j.MaxAttempts), 1, 100)
	c.within(at.At("retention"), j.Retention, time.Minute, 30*24*time.Hour)
	c.within(at.At("expires_in"), j.ExpiresIn, time.Second, MaxJobExpiry)
}
