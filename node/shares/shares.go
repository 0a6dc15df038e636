// Package shares counts how much of a bound each tenant uses, so that no tenant alone can
// use all of it. Counter is for everything that is bounded: requests, bytes, jobs.
//
// The default share is half. With less, a tenant that is alone leaves more of the node
// unused; with more, the largest tenant leaves less than what it has itself to all others.
// With half, any second tenant finds as much as the first one can have.
package shares

import (
	"fmt"
	"sync"
)

// Part is a tenant's share of a bound, at least 1. A percent of 0 means that there are no
// shares.
func Part(bound int64, percent int) int64 {
	if percent <= 0 || percent >= 100 {
		return bound
	}
	// In this order it can't overflow.
	return max(1, bound/100*int64(percent)+bound%100*int64(percent)/100)
}

// Counter has what each tenant uses of one bound. It has an entry only for tenants that use
// some, so the bound of the whole bounds it. The zero value is ready; it is safe for use by
// several goroutines.
type Counter struct {
	mu   sync.Mutex // guards used
	used map[string]int64
}

// Take adds n to what a tenant uses, unless it would then have more than most.
func (c *Counter) Take(tenant string, n, most int64) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.used[tenant]+n > most {
		return false
	}
	c.add(tenant, n)
	return true
}

// Add adds n, whatever the tenant's share is; a negative n gives back.
func (c *Counter) Add(tenant string, n int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.add(tenant, n)
}

func (c *Counter) add(tenant string, n int64) {
	if c.used == nil {
		c.used = map[string]int64{}
	}
	if c.used[tenant] += n; c.used[tenant] == 0 {
		delete(c.used, tenant)
	}
}

// Error refuses what would exceed a tenant's share.
type Error struct {
	Tenant  string // empty: the clients without a key
	Of      string // what is shared, such as "jobs that have not ended"
	Most    int64  // the share
	Percent int
}

func (e *Error) Error() string {
	who := fmt.Sprintf("tenant %q has", e.Tenant)
	if e.Tenant == "" {
		who = "the clients without a tenant have"
	}
	return fmt.Sprintf("%s used the whole share of this node's %s: %d, which is %d %% (limits.tenant_share)", who, e.Of, e.Most, e.Percent)
}
