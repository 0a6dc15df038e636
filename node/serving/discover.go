package serving

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/dsnode/dsnode/cluster/config"
)

const (
	// maxInstances bounds what one upstream's name may stand for.
	maxInstances  = 64
	lookUpEvery   = 5 * time.Second
	lookUpTimeout = 2 * time.Second
	lookUpsAtOnce = 16
)

// Resolver turns names into addresses; *net.Resolver is one.
type Resolver interface {
	LookupNetIP(ctx context.Context, network, host string) ([]netip.Addr, error)
	LookupSRV(ctx context.Context, service, proto, name string) (string, []*net.SRV, error)
}

// origin is what is looked up.
type origin struct {
	url  string
	mode config.DiscoverMode
}

func originOf(u config.Upstream) origin { return origin{u.URL, u.Discover} }

func (o origin) discovers() bool {
	return o.mode == config.DiscoverDNS || o.mode == config.DiscoverSRV
}

// found is what an origin was last known to stand for. A lookup that fails or
// finds nothing leaves the addresses as they were: a name server that is down
// must not take servers away that are well. It is immutable.
type found struct {
	of        origin
	addresses []string // host:port, sorted
	err       error    // of the newest lookup, nil when it went well
	dropped   int      // addresses beyond maxInstances
}

var errNoAddress = errors.New("no address was found")

// lookUp asks for an origin's addresses now, and keeps the old ones if it must.
func (p *Pipeline) lookUp(ctx context.Context, of origin, before *found) *found {
	ctx, cancel := context.WithTimeout(ctx, lookUpTimeout)
	defer cancel()
	next := &found{of: of}
	next.addresses, next.err = resolve(ctx, p.opts.Resolver, of)
	if next.err != nil {
		if before != nil && before.of == of {
			next.addresses, next.dropped = before.addresses, before.dropped
		}
		return next
	}
	// The same order on all nodes, so that all keep the same ones.
	slices.Sort(next.addresses)
	next.addresses = slices.Compact(next.addresses)
	if n := len(next.addresses); n > maxInstances {
		next.addresses, next.dropped = next.addresses[:maxInstances], n-maxInstances
	}
	return next
}

func resolve(ctx context.Context, r Resolver, of origin) ([]string, error) {
	u, err := url.Parse(of.url)
	if err != nil {
		return nil, fmt.Errorf("upstream url: %w", err)
	}
	if of.mode == config.DiscoverSRV {
		return resolveSRV(ctx, r, u)
	}
	port := u.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
	}
	list, err := addressesOf(ctx, r, u.Hostname(), port)
	if err == nil && len(list) == 0 {
		err = fmt.Errorf("%w for %s", errNoAddress, u.Hostname())
	}
	return list, err
}

func addressesOf(ctx context.Context, r Resolver, host, port string) ([]string, error) {
	addrs, err := r.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, fmt.Errorf("look up %s: %w", host, err)
	}
	list := make([]string, 0, len(addrs))
	for _, a := range addrs {
		list = append(list, net.JoinHostPort(a.Unmap().String(), port))
	}
	return list, nil
}

// resolveSRV takes every target that has an address; one that has none doesn't
// stand for the others.
func resolveSRV(ctx context.Context, r Resolver, u *url.URL) ([]string, error) {
	host, service, proto := u.Hostname(), u.Scheme, "tcp"
	if strings.HasPrefix(host, "_") {
		service, proto = "", "" // the name is whole
	}
	_, records, err := r.LookupSRV(ctx, service, proto, host)
	if len(records) == 0 {
		return nil, fmt.Errorf("look up the SRV records of %s: %w", host, errors.Join(errNoAddress, err))
	}
	var list []string
	var failed []error
	for _, s := range records[:min(len(records), maxInstances)] {
		target := strings.TrimSuffix(s.Target, ".")
		if target == "" || s.Port == 0 {
			continue // RFC 2782: the service is decidedly not there
		}
		more, err := addressesOf(ctx, r, target, strconv.Itoa(int(s.Port)))
		if err != nil {
			failed = append(failed, err)
		}
		list = append(list, more...)
	}
	if len(list) == 0 {
		return nil, fmt.Errorf("SRV records of %s: %w", host, errors.Join(append(failed, errNoAddress)...))
	}
	return list, nil
}

// identity is the host that a discovered server must prove to be: the domain
// of the SRV records, whatever unproven DNS says the target is called.
func identity(host string) string {
	for strings.HasPrefix(host, "_") {
		_, rest, ok := strings.Cut(host, ".")
		if !ok {
			break
		}
		host = rest
	}
	return host
}

// lookUpAll asks for each origin once, several at a time.
func (p *Pipeline) lookUpAll(ctx context.Context, wanted map[string]*found) map[string]*found {
	next := make(map[string]*found, len(wanted))
	var mu sync.Mutex // guards next
	room := make(chan struct{}, lookUpsAtOnce)
	var all sync.WaitGroup
	for name, before := range wanted {
		room <- struct{}{}
		all.Go(func() {
			defer func() { <-room }()
			f := p.lookUp(ctx, before.of, before)
			mu.Lock()
			defer mu.Unlock()
			next[name] = f
		})
	}
	all.Wait()
	return next
}

// meet looks up what a configuration names for the first time, so that it is
// served from the moment on that it is in force.
func (p *Pipeline) meet(c *config.Config) {
	wanted := make(map[string]*found)
	p.mu.Lock()
	for name, def := range c.Upstreams {
		of := originOf(def)
		if f := p.found[name]; def.Site == p.site && of.discovers() && (f == nil || f.of != of) {
			wanted[name] = &found{of: of}
		}
	}
	p.mu.Unlock()
	if len(wanted) == 0 {
		return
	}
	next := p.lookUpAll(context.Background(), wanted) // each lookup has its own deadline
	p.mu.Lock()
	defer p.mu.Unlock()
	for name, f := range next {
		p.learned(name, wanted[name], f)
		p.found[name] = f
	}
}

// discover looks everything up again, and publishes what has changed.
func (p *Pipeline) discover(ctx context.Context) {
	wanted := make(map[string]*found)
	p.mu.Lock()
	for name, f := range p.found {
		wanted[name] = f
	}
	p.mu.Unlock()
	if len(wanted) == 0 {
		return
	}
	next := p.lookUpAll(ctx, wanted)
	if ctx.Err() != nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	changed := false
	for name, f := range next {
		before := wanted[name]
		if p.found[name] != before {
			continue // the configuration has changed meanwhile
		}
		p.learned(name, before, f)
		p.found[name] = f
		changed = changed || !slices.Equal(before.addresses, f.addresses) || (before.err == nil) != (f.err == nil)
	}
	if changed {
		_ = p.configure(p.conf) // what can't be used was told when it was applied, and is shown in the status
		p.probeSoon()
	}
}

// learned logs what is new, once.
func (p *Pipeline) learned(name string, before, now *found) {
	switch {
	case now.err != nil && before.err == nil:
		p.log.Warn("upstream can't be looked up, the addresses known so far stay", "upstream", name, "known", len(now.addresses), "error", now.err)
	case now.err == nil && before.err != nil:
		p.log.Info("upstream can be looked up again", "upstream", name)
	}
	if !slices.Equal(before.addresses, now.addresses) {
		p.log.Info("upstream's addresses", "upstream", name, "before", len(before.addresses), "addresses", now.addresses)
	}
	if now.dropped > 0 && before.dropped == 0 {
		p.log.Warn("upstream has more addresses than are used", "upstream", name, "used", maxInstances, "unused", now.dropped)
	}
}
