package config

import (
	"cmp"
	"time"
)

// DefaultTimeouts are the four timers without any configuration. The first token
// may take two minutes because of reasoning models and full queues.
func DefaultTimeouts() Timeouts {
	return Timeouts{
		Connect:       Duration(2 * time.Second),
		FirstToken:    Duration(120 * time.Second),
		BetweenTokens: Duration(30 * time.Second),
		Total:         Duration(30 * time.Minute),
	}
}

// over returns t with base's values where t has none.
func (t Timeouts) over(base Timeouts) Timeouts {
	return Timeouts{
		Connect:       cmp.Or(t.Connect, base.Connect),
		FirstToken:    cmp.Or(t.FirstToken, base.FirstToken),
		BetweenTokens: cmp.Or(t.BetweenTokens, base.BetweenTokens),
		Total:         cmp.Or(t.Total, base.Total),

		MinTokensPerSecond: cmp.Or(t.MinTokensPerSecond, base.MinTokensPerSecond),
	}
}

// TimeoutsFor returns the timers of a model at an upstream: the model's own, else
// the upstream's, else the cluster's, else the defaults; never zero. A model or
// upstream that is not configured has none of its own.
func (c *Config) TimeoutsFor(model, upstream string) Timeouts {
	t := c.Timeouts.over(DefaultTimeouts())
	t = c.Upstreams[upstream].Timeouts.over(t)
	return c.Models[model].Timeouts.over(t)
}
