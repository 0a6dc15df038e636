package upstream

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/dsnode/dsnode/cluster/config"
)

// Configure puts a configuration in force. Upstreams whose definition is unchanged
// keep their health, breaker and connections; requests under way end with the table
// that they began with. Upstreams with discover that are new are looked up first,
// which may take two seconds. The error tells of upstreams that can't be used (TLS
// files, keys); all others serve.
func (f *Fleet) Configure(c *config.Config) error {
	f.discoverNew(c)
	f.mu.Lock()
	defer f.mu.Unlock()
	err := f.configure(c)
	f.probeSoon()
	return err
}

// probeSoon asks Run for a round of probes.
func (f *Fleet) probeSoon() {
	select {
	case f.probeNow <- struct{}{}:
	default: // a round is due anyway
	}
}

// repair tries again what a file or a variable kept from working.
func (f *Fleet) repair() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i := range f.Table().instances() {
		if i.broken != nil {
			_ = f.configure(f.conf) // the error was returned by Configure, and is in the status
			return
		}
	}
}

// configure makes the table anew; the caller holds the lock.
func (f *Fleet) configure(c *config.Config) error {
	f.conf = c
	old := f.Table()
	next := make(map[string]*upstream)
	var wrong []error
	for name, def := range c.Upstreams {
		if def.Site != f.o.Site {
			continue
		}
		u, err := f.upstream(old.upstreams[name], name, def, c.TimeoutsFor("", name).Connect.D())
		if err != nil {
			wrong = append(wrong, fmt.Errorf("upstream %s: %w", name, err))
		}
		next[name] = u
	}
	f.table.Store(newTable(c, f.o.Site, next, f.drained))
	for name := range f.found {
		if u := next[name]; u == nil || u.found == nil {
			delete(f.found, name)
		}
	}
	for name, u := range old.upstreams {
		f.retire(u, next[name])
	}
	return errors.Join(wrong...)
}

// retire ends the instances that next no longer has; next is nil when the upstream
// has left the configuration.
func (f *Fleet) retire(old, next *upstream) {
	for _, i := range old.instances {
		if next != nil && slices.Contains(next.instances, i) {
			continue
		}
		i.counts.retire(&i.backend)
		if i.transport != nil {
			i.transport.CloseIdleConnections()
		}
	}
	if next == nil {
		f.metrics.forget(old.name)
	}
}

// upstream keeps the instances of old that have not changed, and makes new ones.
func (f *Fleet) upstream(old *upstream, name string, def config.Upstream, connect time.Duration) (*upstream, error) {
	u := &upstream{name: name, def: def, drained: f.drained[name]}
	var files config.TLSMaterial
	var unreadable error
	if def.Secure() {
		files, unreadable = def.TLS.Read(f.o.ReadFile)
	}
	addresses := []string{""} // as the URL says
	if originOf(def).discovers() {
		u.found = f.found[name]
		if u.found == nil {
			u.found = &found{of: originOf(def)}
			f.found[name] = u.found
		}
		addresses = u.found.addresses
	}
	var wrong error
	material := digest(files)
	for _, address := range addresses {
		i := old.unchanged(address, def, connect, material, unreadable)
		if i == nil {
			i = f.instance(name, address, def, connect, files, unreadable)
		}
		// The instances have one definition: what is wrong with one is wrong with all.
		wrong = errors.Join(i.broken, i.refreshKey(f.o.LookupEnv, f.o.ReadFile))
		u.instances = append(u.instances, i)
	}
	return u, wrong
}

// unchanged finds the instance at an address if it can serve on.
func (u *upstream) unchanged(address string, def config.Upstream, connect time.Duration, material [sha256.Size]byte, unreadable error) *instance {
	if u == nil || unreadable != nil {
		return nil
	}
	for _, i := range u.instances {
		if i.address == address && i.broken == nil && i.def == def && i.connect == connect && i.material == material {
			return i
		}
	}
	return nil
}

func (f *Fleet) instance(name, address string, def config.Upstream, connect time.Duration, files config.TLSMaterial, unreadable error) *instance {
	i := newInstance(f.o.Host, name, address, def, connect, files, unreadable)
	i.counts = f.metrics.backend(name)
	i.counts.setState(&i.backend, breakerClosed)
	i.onMove = f.breakerMoved
	if f.o.Transport != nil {
		if client := f.o.Transport(name); client != nil {
			i.client = client
		}
	}
	return i
}

// SetDrained names the upstreams, of whatever site, that get no new requests;
// all others do.
func (f *Fleet) SetDrained(names []string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.drained = make(map[string]bool, len(names))
	for _, n := range names {
		f.drained[n] = true
	}
	if f.conf != nil {
		_ = f.configure(f.conf) // the error was returned by Configure, and is in the status
	}
}
