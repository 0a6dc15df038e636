package cache

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/storage/keyring"
)

const (
	// maxSkew is how far ahead of this node's clock an answer may be dated. An answer
	// from further ahead would be kept for too long.
	maxSkew = 5 * time.Minute
	// maxAnswer is the largest entry_bytes that the configuration allows.
	maxAnswer = 16 << 20
	// maxOverhead bounds what an entry has beyond the body: header, content type, ends.
	maxOverhead = 4 << 20
	sweepEvery  = time.Minute
	// reopenEvery is how often a tier that can't be opened, or a Redis that fails, is
	// opened again.
	reopenEvery = 10 * time.Second
)

// Options configure a Cache. Dir, Site and Ring are required.
type Options struct {
	Dir  string // of the embedded tier's files
	Site string // name of this node's site in the configuration
	Ring *keyring.Ring
	// Purges gives the agreed purges. It must not block. nil: there are none.
	Purges func() *agreed.CachePurges
	// OutboundBytes bounds the entries that wait to be sent to peers; see Outbound.
	// 0: none are sent.
	OutboundBytes int
	Files         Files // reads the files and variables that the configuration names
	Logger        *slog.Logger
	Registerer    prometheus.Registerer
	// Now is time.Now by default.
	Now func() time.Time
}

// Cache keeps answers. The shared tier is used once Configure was called and Run
// runs. No question has a key until the ring has a MAC key. A Cache is safe for
// concurrent use.
type Cache struct {
	o      Options
	log    *slog.Logger
	now    func() time.Time
	sealer keyring.Scoped
	packer *packer
	counts counts
	local  *local
	shared atomic.Pointer[shared] // nil: not open, or off
	// tierError is why the shared tier is not used, as last logged; nil: it is used.
	tierError atomic.Pointer[string]
	writes    *Queue[pendingWrite]
	out       *Queue[Entry] // nil: nothing is sent to peers

	macKey atomic.Pointer[keyring.MAC]
	conf   atomic.Pointer[settings]

	mu        sync.Mutex // guards wanted
	wanted    tierSpec
	changed   chan struct{} // holds a token when wanted has changed
	tierTried chan struct{} // closed once the first tier is open, or can't be opened
}

// settings are the parts of the configuration that requests need.
type settings struct {
	entryBytes int
	maxAge     time.Duration
}

// tierSpec is what the configuration says about the shared tier.
type tierSpec struct {
	site   config.SiteCache
	bytes  int64
	maxAge time.Duration
}

// New makes a cache. It starts nothing.
func New(o Options) (*Cache, error) {
	o.Logger = cmp.Or(o.Logger, slog.New(slog.DiscardHandler))
	o.Registerer = cmp.Or[prometheus.Registerer](o.Registerer, prometheus.NewRegistry())
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Purges == nil {
		var none agreed.CachePurges
		o.Purges = func() *agreed.CachePurges { return &none }
	}
	c := &Cache{o: o, log: o.Logger, now: o.Now, sealer: o.Ring.Scope(sealPurpose), changed: make(chan struct{}, 1), tierTried: make(chan struct{})}
	var err error
	if c.packer, err = newPacker(maxAnswer); err != nil {
		return nil, err
	}
	def := config.DefaultCache()
	if c.local, err = newLocal(def.LocalBytes); err != nil {
		return nil, err
	}
	c.conf.Store(&settings{entryBytes: int(def.EntryBytes), maxAge: def.SharedTTL.D() + def.Stale.D()})
	c.writes = newWrites(&c.counts)
	if o.OutboundBytes > 0 {
		c.out = NewQueue(maxWrites, o.OutboundBytes, Entry.Size, func(n int) { c.counts.dropped[dropOutboundFull].Add(uint64(n)) }) //nolint:gosec // not negative
	}
	c.register(o.Registerer)
	return c, nil
}

// Configure applies the agreed configuration. Run opens the shared tier.
func (c *Cache) Configure(conf *config.Config) {
	k := conf.Cache
	c.conf.Store(&settings{entryBytes: int(k.EntryBytes), maxAge: conf.MaxAge()})
	c.local.resize(k.LocalBytes)
	want := tierSpec{site: k.At(c.o.Site), bytes: k.SharedBytes, maxAge: conf.MaxAge()}
	if !k.Enabled {
		want.site = config.SiteCache{Shared: config.SharedOff}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.wanted == want {
		return
	}
	c.wanted = want
	select {
	case c.changed <- struct{}{}:
	default:
	}
}

func (c *Cache) want() tierSpec {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.wanted
}

// mac gives the MAC that makes keys, nil until the cluster has agreed on its secret.
func (c *Cache) mac() *keyring.MAC {
	if m := c.macKey.Load(); m != nil {
		return m
	}
	m, err := c.o.Ring.MAC(keyPurpose)
	if err != nil {
		return nil
	}
	c.macKey.Store(m)
	return m
}

// Life is how long answers of a model are used.
type Life struct{ Local, Shared, Stale time.Duration }

// LifeOf reads a model's Life from the configuration.
func LifeOf(m config.ModelCache) Life {
	return Life{Local: m.LocalTTL.D(), Shared: m.SharedTTL.D(), Stale: m.Stale.D()}
}

// Found is a cached answer.
type Found struct {
	Answer *Answer
	// Fresh: it may be given without asking an upstream. A stale answer may be given
	// only when no upstream can answer.
	Fresh bool
	Age   time.Duration // since it was stored
	Left  time.Duration // until it expires, negative once it has expired
}

// EntryBytes is the size of the largest body that is kept.
func (c *Cache) EntryBytes() int { return c.conf.Load().entryBytes }

// Purges is the number of purges agreed on so far. For Answer.Purge it must be read
// before the upstream is asked.
func (c *Cache) Purges() uint64 { return c.o.Purges().Count }

// Local looks an answer up in the node's memory.
func (c *Cache) Local(k Key, model string, life Life) (Found, bool) {
	r, ok := c.local.get(k)
	if !ok {
		c.Note(LocalMiss)
		return Found{}, false
	}
	now := c.now()
	f, ok := c.usable(k, model, r.answer, life, now)
	switch {
	case !ok:
		c.local.drop(k)
		c.Note(LocalMiss)
		return Found{}, false
	case now.Sub(r.arrived) > life.Local:
		f.Fresh = false
	}
	if f.Fresh {
		c.Note(LocalHit)
	} else {
		c.Note(LocalStale)
	}
	return f, true
}

// usable reports whether an answer may be given, and whether it is fresh.
func (c *Cache) usable(k Key, model string, a *Answer, life Life, now time.Time) (Found, bool) {
	age := now.Sub(a.StoredAt)
	if age < -maxSkew || age > life.Shared+life.Stale || a.Purge < c.o.Purges().Least(model, k.String) {
		return Found{}, false
	}
	return Found{Answer: a, Age: max(age, 0), Left: life.Shared - age, Fresh: age <= life.Shared}, true
}

// Shared looks an answer up in the shared tier, for at most 50 ms, and not at all
// while the tier's breaker is open. It puts what it finds into the node's memory.
func (c *Cache) Shared(ctx context.Context, k Key, model string, life Life) (Found, bool) {
	s := c.shared.Load()
	if s == nil {
		return Found{}, false
	}
	value, err := s.get(ctx, k)
	switch {
	case errors.Is(err, errOpen), errors.Is(err, errBusy):
		c.Note(SharedSkipped)
		return Found{}, false
	case err != nil:
		if ctx.Err() == nil {
			c.Note(SharedError)
		}
		return Found{}, false
	case value == nil:
		c.Note(SharedMiss)
		return Found{}, false
	}
	e, err := parseEntry(k, value)
	var a *Answer
	if err == nil {
		a, err = c.open(e)
	}
	if err != nil {
		// The bytes are foreign, the entry belongs to another key, or its data key was
		// dropped. It must go: dated later than now, it would keep out good ones.
		c.Note(SharedDamaged)
		c.writes.Offer(pendingWrite{key: k})
		c.log.Warn("dropped an entry of the shared cache that can't be opened", "key", k.String(), "err", err)
		return Found{}, false
	}
	now := c.now()
	f, ok := c.usable(k, model, a, life, now)
	switch {
	case !ok:
		c.Note(SharedMiss)
		return Found{}, false
	case f.Fresh:
		c.Note(SharedHit)
	default:
		c.Note(SharedStale)
	}
	c.local.put(k, model, a, now)
	return f, true
}

// Keep stores an answer in memory and queues it for the shared tier and the peers. It
// never waits. It sets StoredAt.
func (c *Cache) Keep(k Key, model string, a *Answer) {
	if len(a.Body) > c.EntryBytes() || len(a.ContentType) > maxType {
		c.counts.dropped[dropTooLarge].Add(1)
		return
	}
	now := c.now()
	a.StoredAt = now.Truncate(time.Millisecond)
	c.local.put(k, model, a, now)
	c.counts.kept.Add(1)
	if c.shared.Load() != nil || c.out != nil {
		c.writes.Offer(pendingWrite{key: k, answer: a})
	}
}

// Outbound is the queue of sealed answers to send to peers. It drops the oldest when it
// is full. nil without OutboundBytes.
func (c *Cache) Outbound() *Queue[Entry] { return c.out }

// ErrRefused means that a peer's entry is too old, from the future, or of a wrong size.
var ErrRefused = errors.New("entry refused")

// Absorb queues an entry of a peer for the shared tier. It never waits, and it does
// not send the entry on to other peers.
func (c *Cache) Absorb(e Entry) error {
	switch age := c.now().Sub(e.StoredAt); {
	case age > c.conf.Load().maxAge:
		return fmt.Errorf("%w: it is %s old", ErrRefused, age)
	case age < -maxSkew:
		return fmt.Errorf("%w: it is from the future, by %s", ErrRefused, -age)
	case len(e.Sealed) < keyring.Overhead || len(e.Sealed) > maxAnswer+maxOverhead:
		return fmt.Errorf("%w: it has %d bytes", ErrRefused, len(e.Sealed))
	}
	c.counts.absorbed.Add(1)
	if c.want().site.Shared != config.SharedOff { // it may not be open yet
		e.StoredAt = e.StoredAt.Truncate(time.Millisecond)
		c.writes.Offer(pendingWrite{entry: &e})
	}
	return nil
}

// Run opens the shared tier, writes to it and sweeps both tiers, until ctx ends. Then
// it writes what is queued, for at most a second, and closes the tier.
func (c *Cache) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return c.runTier(ctx) })
	g.Go(func() error { return c.runWriter(ctx) })
	err := g.Wait()
	last, cancel := context.WithTimeout(context.WithoutCancel(ctx), batchTime)
	defer cancel()
	c.writeAll(last)
	return errors.Join(err, c.closeTier())
}
