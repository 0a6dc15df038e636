package serving

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/dsnode/dsnode/cluster/config"
)

// Configure publishes a configuration. Upstreams whose definition is unchanged
// keep their health, breaker and connections; requests under way end with what
// they began with. Upstreams to be discovered that are new are looked up first,
// which may take two seconds. The error tells of upstreams that can't be used
// (TLS files, keys); all others serve.
func (p *Pipeline) Configure(c *config.Config) error {
	p.meet(c)
	p.mu.Lock()
	defer p.mu.Unlock()
	err := p.configure(c)
	p.probeSoon()
	return err
}

// probeSoon asks Run for a round of probes.
func (p *Pipeline) probeSoon() {
	select {
	case p.probe <- struct{}{}:
	default: // a round is due anyway
	}
}

// repair tries again what a file or a variable kept from working.
func (p *Pipeline) repair() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for u := range p.table.Load().instances() {
		if u.broken != nil {
			_ = p.configure(p.conf) // told when it was applied, and shown in the status
			return
		}
	}
}

// configure makes the table anew; the caller holds the lock.
func (p *Pipeline) configure(c *config.Config) error {
	p.conf = c
	old := p.table.Load()
	next := make(map[string]*service)
	var wrong []error
	for name, def := range c.Upstreams {
		if def.Site != p.site {
			continue
		}
		s, err := p.service(old.services[name], name, def, c.TimeoutsFor("", name).Connect.D())
		if err != nil {
			wrong = append(wrong, fmt.Errorf("upstream %s: %w", name, err))
		}
		next[name] = s
	}
	p.table.Store(newTable(c, p.site, next, p.drained))
	for name := range p.found {
		if s := next[name]; s == nil || s.found == nil {
			delete(p.found, name)
		}
	}
	for name, s := range old.services {
		for _, u := range s.instances {
			if next[name] != nil && slices.Contains(next[name].instances, u) {
				continue
			}
			u.counts.retire(&u.backend)
			if u.transport != nil {
				u.transport.CloseIdleConnections()
			}
		}
		if next[name] == nil {
			p.metrics.forget(name)
		}
	}
	return errors.Join(wrong...)
}

// service keeps the instances that serve already, and makes those that are new.
func (p *Pipeline) service(old *service, name string, def config.Upstream, connect time.Duration) (*service, error) {
	s := &service{name: name, def: def, drained: p.drained[name]}
	var files material
	var unreadable error
	if def.Secure() {
		files, unreadable = readMaterial(def.TLS, p.opts.ReadFile)
	}
	addresses := []string{""} // as the URL says
	if originOf(def).discovers() {
		s.found = p.found[name]
		if s.found == nil {
			s.found = &found{of: originOf(def)}
			p.found[name] = s.found
		}
		addresses = s.found.addresses
	}
	var wrong error
	digest := files.digest()
	for _, address := range addresses {
		u := old.keeps(address, def, connect, digest, unreadable)
		if u == nil {
			u = p.made(name, address, def, connect, files, unreadable)
		}
		// One instance's fault is that of all.
		wrong = errors.Join(u.broken, u.refreshKey(p.opts.LookupEnv, p.opts.ReadFile))
		s.instances = append(s.instances, u)
	}
	return s, wrong
}

// keeps finds the instance that serves already and has not changed.
func (s *service) keeps(address string, def config.Upstream, connect time.Duration, files [sha256.Size]byte, unreadable error) *upstream {
	if s == nil || unreadable != nil {
		return nil
	}
	for _, u := range s.instances {
		if u.address == address && u.broken == nil && u.def == def && u.connect == connect && u.material == files {
			return u
		}
	}
	return nil
}

func (p *Pipeline) made(name, address string, def config.Upstream, connect time.Duration, files material, unreadable error) *upstream {
	u := newUpstream(name, address, def, connect, files, unreadable)
	u.counts = p.metrics.backend(name)
	u.counts.stand(&u.backend, breakerClosed)
	u.onMove = p.moved
	if p.opts.Transport != nil {
		u.client = p.opts.Transport(name)
	}
	return u
}

// SetDrained names the upstreams, of whatever site, that get no new requests;
// all others do.
func (p *Pipeline) SetDrained(names []string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.drained = make(map[string]bool, len(names))
	for _, n := range names {
		p.drained[n] = true
	}
	if p.conf != nil {
		_ = p.configure(p.conf) // what can't be used was told when it was applied
	}
}
