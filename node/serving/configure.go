package serving

import (
	"errors"
	"fmt"
	"time"

	"github.com/dsnode/dsnode/cluster"
)

// Configure publishes a configuration. Upstreams whose definition is unchanged
// keep their health, breaker and connections; requests under way end with what
// they began with. The error tells of upstreams that can't be used (TLS files,
// keys); all others serve.
func (p *Pipeline) Configure(c *cluster.Config) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	err := p.configure(c)
	select {
	case p.probe <- struct{}{}:
	default: // a round is due anyway
	}
	return err
}

// repair tries again what a file or a variable kept from working.
func (p *Pipeline) repair() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, u := range p.table.Load().upstreams {
		if u.broken != nil {
			_ = p.configure(p.conf) // told when it was applied, and shown in the status
			return
		}
	}
}

func (p *Pipeline) configure(c *cluster.Config) error {
	p.conf = c
	old := p.table.Load()
	next := make(map[string]*upstream)
	var wrong []error
	for name, def := range c.Upstreams {
		if def.Site != p.site {
			continue
		}
		u, err := p.upstream(old.upstreams[name], name, def, c.TimeoutsFor("", name).Connect.D())
		if err != nil {
			wrong = append(wrong, fmt.Errorf("upstream %s: %w", name, err))
		}
		u.drained.Store(p.drained[name])
		next[name] = u
	}
	p.table.Store(newTable(c, p.site, next))
	for name, u := range old.upstreams {
		if next[name] == nil {
			p.metrics.forget(name)
		}
		if next[name] != u && u.transport != nil {
			u.transport.CloseIdleConnections()
		}
	}
	return errors.Join(wrong...)
}

// upstream keeps the one that serves already, or makes a new one.
func (p *Pipeline) upstream(old *upstream, name string, def cluster.Upstream, connect time.Duration) (*upstream, error) {
	material, err := readMaterial(def.TLS, p.opts.ReadFile)
	if old != nil && old.broken == nil && err == nil && old.def == def && old.connect == connect && old.material == material.digest() {
		return old, old.refreshKey(p.opts.LookupEnv, p.opts.ReadFile)
	}
	u := newUpstream(name, def, connect, material, err)
	u.counts = p.metrics.backend(name)
	u.counts.show(breakerClosed)
	u.onMove = p.moved
	if p.opts.Transport != nil {
		u.client = p.opts.Transport(name)
	}
	return u, errors.Join(u.broken, u.refreshKey(p.opts.LookupEnv, p.opts.ReadFile))
}

// SetDrained names the upstreams that get no new requests; all others do.
func (p *Pipeline) SetDrained(names []string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.drained = make(map[string]bool, len(names))
	for _, n := range names {
		p.drained[n] = true
	}
	for name, u := range p.table.Load().upstreams {
		u.drained.Store(p.drained[name])
	}
}
