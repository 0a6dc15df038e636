package config

import (
	"cmp"
	"maps"
	"slices"
	"strings"
	"time"
)

// What stands where cluster.yaml is silent.
const (
	DefaultRPOTarget      = Duration(time.Hour)
	DefaultRTOTarget      = Duration(15 * time.Minute)
	DefaultMaxConcurrency = 256
)

// DefaultTimeouts are the four timers where nothing else is said. The first
// token may take two minutes because reasoning models and full queues do.
func DefaultTimeouts() Timeouts {
	return Timeouts{
		Connect:       Duration(2 * time.Second),
		FirstToken:    Duration(120 * time.Second),
		BetweenTokens: Duration(30 * time.Second),
		Total:         Duration(30 * time.Minute),
	}
}

// DefaultLimits bound a node that nobody has tuned.
func DefaultLimits() Limits {
	return Limits{BodyBytes: 32 << 20, InFlight: 4096, Connections: 8192, HeaderBytes: 64 << 10}
}

func (s *Site) setDefaults() { s.RPOTarget, s.RTOTarget = DefaultRPOTarget, DefaultRTOTarget }

func (u *Upstream) setDefaults() {
	u.Kind, u.Discover, u.MaxConcurrency = KindOpenAI, DiscoverOff, DefaultMaxConcurrency
}

// Parse reads a cluster.yaml, fills in the defaults and checks all of it.
// name stands in the messages. The error is a Problems: everything that is
// wrong, with lines.
func Parse(name string, text []byte) (*Config, error) {
	c := &Config{
		Timeouts: DefaultTimeouts(),
		Limits:   DefaultLimits(),
		Cache:    DefaultCache(),
		Jobs:     DefaultJobs(),
		Timing:   TimingConfig{Heartbeat: Duration(DefaultHeartbeat)},
	}
	src := Decode(name, text, c)
	if !src.Broken(nil) { // else there is nothing to check
		v := &checker{Config: c, src: src}
		v.all()
	}
	if err := src.Err(); err != nil {
		return nil, err
	}
	c.source = src
	return c, nil
}

// Equal reports whether both say the same, wherever it was written.
func (c *Config) Equal(o *Config) bool {
	if c == nil || o == nil {
		return c == o
	}
	return c.Version == o.Version && c.Timeouts == o.Timeouts && c.Limits == o.Limits &&
		c.Access == o.Access && c.Timing == o.Timing && c.Jobs == o.Jobs && c.Cache.equal(o.Cache) &&
		maps.Equal(c.Sites, o.Sites) && maps.Equal(c.Upstreams, o.Upstreams) &&
		maps.EqualFunc(c.Models, o.Models, func(a, b Model) bool {
			return a.Timeouts == b.Timeouts && a.Revision == b.Revision && a.Cache == b.Cache && slices.Equal(a.Serve, b.Serve) && slices.Equal(a.Fallbacks, b.Fallbacks)
		})
}

// over takes t where it says something, else base.
func (t Timeouts) over(base Timeouts) Timeouts {
	or := func(d, base Duration) Duration {
		if d != 0 {
			return d
		}
		return base
	}
	return Timeouts{
		Connect:       or(t.Connect, base.Connect),
		FirstToken:    or(t.FirstToken, base.FirstToken),
		BetweenTokens: or(t.BetweenTokens, base.BetweenTokens),
		Total:         or(t.Total, base.Total),

		MinTokensPerSecond: cmp.Or(t.MinTokensPerSecond, base.MinTokensPerSecond),
	}
}

// TimeoutsFor are the four timers of a model at an upstream: the model's own,
// else the upstream's, else the cluster's, else the defaults; never zero.
// Unknown names have nothing of their own.
func (c *Config) TimeoutsFor(model, upstream string) Timeouts {
	t := c.Timeouts.over(DefaultTimeouts())
	t = c.Upstreams[upstream].Timeouts.over(t)
	return c.Models[model].Timeouts.over(t)
}

// Roles of a site, seen from the primary.
const (
	RolePrimary  = "primary"
	RoleSameCity = "same-city"
	RoleRemote   = "remote"
)

// Role is a site's relation to the primary: RolePrimary, RoleSameCity or
// RoleRemote, and "" when one of the two is not configured: unknown is not remote.
func (c *Config) Role(site, primary string) string {
	s, ok := c.Sites[site]
	p, known := c.Sites[primary]
	switch {
	case !ok || !known:
		return ""
	case site == primary:
		return RolePrimary
	case s.City == p.City:
		return RoleSameCity
	}
	return RoleRemote
}

// SiteOrder lists all configured sites in the order in which a node of one of
// them turns to them: its own, then those of its city, then the others; each
// group by priority. From a site that isn't configured, all are others.
func (c *Config) SiteOrder(from string) []string {
	distance := func(name string) int {
		switch c.Role(name, from) {
		case RolePrimary:
			return 0
		case RoleSameCity:
			return 1
		}
		return 2
	}
	return slices.SortedFunc(maps.Keys(c.Sites), func(a, b string) int {
		return cmp.Or(distance(a)-distance(b), cmp.Compare(c.Sites[a].Priority, c.Sites[b].Priority), strings.Compare(a, b))
	})
}
