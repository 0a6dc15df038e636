package upstream

import (
	"context"
	"errors"
	"fmt"
	"maps"
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
	// maxInstances bounds the addresses that one upstream may have.
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

// found is the result of the last lookups of an origin. A lookup that fails or
// finds nothing leaves the addresses as they were: a name server that is down must
// not take healthy servers away. It is immutable.
type found struct {
	of        origin
	addresses []string // host:port, sorted
	err       error    // of the newest lookup, nil when it went well
	dropped   int      // addresses beyond maxInstances
}

var errNoAddress = errors.New("no address was found")

// lookUp asks for an origin's addresses now. When that fails it keeps the old ones.
func (f *Fleet) lookUp(ctx context.Context, of origin, before *found) *found {
	ctx, cancel := context.WithTimeout(ctx, lookUpTimeout)
	defer cancel()
	next := &found{of: of}
	next.addresses, next.err = resolve(ctx, f.o.Resolver, of)
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

// resolveSRV takes every target that has an address. A target without one is no
// error while others have some.
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
			continue // RFC 2782: the service is not available
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

// identity is the host that a discovered server must have a certificate for: the
// domain of the SRV records. The target's name comes from DNS, which proves nothing.
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

// lookUpAll looks each origin up once, several at a time.
func (f *Fleet) lookUpAll(ctx context.Context, wanted map[string]*found) map[string]*found {
	next := make(map[string]*found, len(wanted))
	var mu sync.Mutex // guards next
	slots := make(chan struct{}, lookUpsAtOnce)
	var all sync.WaitGroup
	for name, before := range wanted {
		slots <- struct{}{}
		all.Go(func() {
			defer func() { <-slots }()
			now := f.lookUp(ctx, before.of, before)
			mu.Lock()
			defer mu.Unlock()
			next[name] = now
		})
	}
	all.Wait()
	return next
}

// discoverNew looks up what a configuration names for the first time, so that it can
// be asked as soon as the configuration is in force.
func (f *Fleet) discoverNew(c *config.Config) {
	wanted := make(map[string]*found)
	f.mu.Lock()
	for name, def := range c.Upstreams {
		of := originOf(def)
		if known := f.found[name]; def.Site == f.o.Site && of.discovers() && (known == nil || known.of != of) {
			wanted[name] = &found{of: of}
		}
	}
	f.mu.Unlock()
	if len(wanted) == 0 {
		return
	}
	next := f.lookUpAll(context.Background(), wanted) // each lookup has its own deadline
	f.mu.Lock()
	defer f.mu.Unlock()
	for name, now := range next {
		f.logFound(name, wanted[name], now)
		f.found[name] = now
	}
}

// discover looks everything up again, and makes the table anew if something changed.
func (f *Fleet) discover(ctx context.Context) {
	f.mu.Lock()
	wanted := maps.Clone(f.found)
	f.mu.Unlock()
	if len(wanted) == 0 {
		return
	}
	next := f.lookUpAll(ctx, wanted)
	if ctx.Err() != nil {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	changed := false
	for name, now := range next {
		before := wanted[name]
		if f.found[name] != before {
			continue // the configuration has changed meanwhile
		}
		f.logFound(name, before, now)
		f.found[name] = now
		changed = changed || !slices.Equal(before.addresses, now.addresses) || (before.err == nil) != (now.err == nil)
	}
	if changed {
		_ = f.configure(f.conf) // the error was returned by Configure, and is in the status
		f.probeSoon()
	}
}

// logFound logs what is new.
func (f *Fleet) logFound(name string, before, now *found) {
	switch {
	case now.err != nil && before.err == nil:
		f.log.Warn("could not look up upstream; its known addresses stay", "upstream", name, "known", len(now.addresses), "err", now.err)
	case now.err == nil && before.err != nil:
		f.log.Info("upstream can be looked up again", "upstream", name)
	}
	if !slices.Equal(before.addresses, now.addresses) {
		f.log.Info("upstream's addresses", "upstream", name, "before", len(before.addresses), "addresses", now.addresses)
	}
	if now.dropped > 0 && before.dropped == 0 {
		f.log.Warn("upstream has more addresses than are used", "upstream", name, "used", maxInstances, "unused", now.dropped)
	}
}
