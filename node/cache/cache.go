package cache

import (
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
	// maxSkew is how far ahead of ours the clock may have been that dated an
	// answer. One from further ahead would be kept for too long.
	maxSkew = 5 * time.Minute
	// maxAnswer is what the configuration allows an answer to have at most.
	maxAnswer = 16 << 20
	// sealed adds to an answer: header, types, ends that compress badly.
	maxOverhead = 4 << 20
	sweepEvery  = time.Minute
	reopenEvery = 10 * time.Second
)

// Options are what a Cache is made of. Dir, Site and Ring are required.
type Options struct {
	Dir  string // of the embedded tier's file
	Site string // the own site's name in the configuration
	Ring *keyring.Ring
	// Purges gives the agreed purges; it must not block. nil: there are none.
	Purges func() *agreed.CachePurges
	// OutboundBytes bounds the entries that wait to be passed on to peers; see
	// Outbound. 0: none are.
	OutboundBytes int
	Files         Files // of what the configuration points at
	Logger        *slog.Logger
	Registerer    prometheus.Registerer
	// Now is the process's own by default.
	Now func() time.Time
}

// Cache keeps answers. Configure it, run it; until then it has the tier in
// memory alone, and without a MAC key in the ring nothing at all. It is safe for
// many goroutines.
type Cache struct {
	o      Options
	log    *slog.Logger
	now    func() time.Time
	sealer keyring.Scoped
	packer *packer
	counts counts
	local  *local
	shared atomic.Pointer[shared] // nil: not open, or off
	// trouble is why the shared tier is not used, as last logged.
	trouble atomic.Pointer[string]
	writes  *Queue[write1]
	out     *Queue[Entry] // nil: nothing is passed on

	macKey atomic.Pointer[keyring.MAC]
	conf   atomic.Pointer[settings]

	mu      sync.Mutex // guards wanted
	wanted  tierSpec
	changed chan struct{} // holds a token when wanted has changed
	begun   chan struct{} // closed once the first tier is open, or can't be opened
}

// settings are the configuration as lookups see it.
type settings struct {
	entryBytes int
	maxAge     time.Duration
}

// tierSpec is which shared tier the configuration wants.
type tierSpec struct {
	site   config.SiteCache
	bytes  int64
	maxAge time.Duration
}

// New makes a cache and starts nothing.
func New(o Options) (*Cache, error) {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Registerer == nil {
		o.Registerer = prometheus.NewRegistry()
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Purges == nil {
		var none agreed.CachePurges
		o.Purges = func() *agreed.CachePurges { return &none }
	}
	c := &Cache{o: o, log: o.Logger, now: o.Now, sealer: o.Ring.Scope(sealPurpose), changed: make(chan struct{}, 1), begun: make(chan struct{})}
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
		c.out = NewQueue(maxWrites, o.OutboundBytes, Entry.Size, func(n int) { c.counts.lost[lostOutbound].Add(uint64(n)) }) //nolint:gosec // not negative
	}
	c.register(o.Registerer)
	return c, nil
}

// Configure takes over the agreed configuration. What has to be opened for it is
// opened by Run.
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

// mac gives the MAC for keys, nil until the cluster has agreed on its key.
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

// Key gives a question's key; false while it can have none: its body is no JSON
// object, or the cluster has agreed on no keys yet.
func (c *Cache) Key(q *Question) (Key, bool) { return c.key(q) }

// Life is how long answers of a model are good.
type Life struct{ Local, Shared, Stale time.Duration }

// LifeOf reads it from the configuration.
func LifeOf(m config.ModelCache) Life {
	return Life{Local: m.LocalTTL.D(), Shared: m.SharedTTL.D(), Stale: m.Stale.D()}
}

// Found is an answer that was kept.
type Found struct {
	Answer *Answer
	// Fresh: it may be given without asking anybody. Else only when nobody can
	// answer.
	Fresh bool
	Age   time.Duration // since it was stored
	Left  time.Duration // until it expires, negative when it has
}

// EntryBytes bounds the body of an answer that is kept.
func (c *Cache) EntryBytes() int { return c.conf.Load().entryBytes }

// Purges is the number of purges agreed on so far: take it before an upstream
// is asked, for Answer.Purge.
func (c *Cache) Purges() uint64 { return c.o.Purges().Count }

// Local looks into the node's memory.
func (c *Cache) Local(k Key, model string, life Life) (Found, bool) {
	r, ok := c.local.get(k)
	if !ok {
		c.Note(LocalMiss)
		return Found{}, false
	}
	now := c.now()
	f, ok := c.judge(k, model, r.answer, life, now)
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

// judge says whether an answer is still of use.
func (c *Cache) judge(k Key, model string, a *Answer, life Life, now time.Time) (Found, bool) {
	age := now.Sub(a.StoredAt)
	if age < -maxSkew || age > life.Shared+life.Stale || a.Purge < c.o.Purges().Least(model, k.String) {
		return Found{}, false
	}
	return Found{Answer: a, Age: max(age, 0), Left: life.Shared - age, Fresh: age <= life.Shared}, true
}

// Shared looks into the shared tier, for at most 50 ms and not at all while it
// rests. What is found is in the node's memory from then on.
func (c *Cache) Shared(ctx context.Context, k Key, model string, life Life) (Found, bool) {
	s := c.shared.Load()
	if s == nil {
		return Found{}, false
	}
	value, err := s.get(ctx, k)
	switch {
	case errors.Is(err, errResting), errors.Is(err, errBusy):
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
		// Somebody else's bytes, an entry under another's key, or a data key that
		// is gone: worth nothing, and dated later than now it would keep good ones away.
		c.Note(SharedDamaged)
		c.writes.Offer(write1{key: k})
		c.log.Warn("an entry of the shared cache does not open and is not used", "key", k.String(), "err", err)
		return Found{}, false
	}
	now := c.now()
	f, ok := c.judge(k, model, a, life, now)
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

// Keep stores an answer: in memory at once, in the shared tier and for the peers
// soon. It never waits. StoredAt is set here.
func (c *Cache) Keep(k Key, model string, a *Answer) {
	if len(a.Body) > c.EntryBytes() || len(a.ContentType) > maxType {
		c.counts.lost[lostLarge].Add(1)
		return
	}
	now := c.now()
	a.StoredAt = now.Truncate(time.Millisecond)
	c.local.put(k, model, a, now)
	c.counts.kept.Add(1)
	if c.shared.Load() != nil || c.out != nil {
		c.writes.Offer(write1{key: k, answer: a})
	}
}

// Outbound gives every answer that is kept here, sealed, to be passed on to peers;
// when nobody takes them the oldest go. nil without OutboundBytes.
func (c *Cache) Outbound() *Queue[Entry] { return c.out }

// ErrRefused says that an entry of a peer can't be taken.
var ErrRefused = errors.New("entry refused")

// Absorb takes an entry that a peer has kept, for the shared tier. It never waits
// for the write, and offers it to no peer again.
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
	if c.want().site.Shared != config.SharedOff { // open, or to be opened
		e.StoredAt = e.StoredAt.Truncate(time.Millisecond)
		c.writes.Offer(write1{entry: &e})
	}
	return nil
}

// Run keeps the shared tier open, writes to it and sweeps, until ctx ends. Then
// it writes what waits, for a second at most, and closes.
func (c *Cache) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return c.keepTier(ctx) })
	g.Go(func() error { return c.keepWriting(ctx) })
	err := g.Wait()
	last, cancel := context.WithTimeout(context.WithoutCancel(ctx), batchTime)
	defer cancel()
	c.writeAll(last)
	return errors.Join(err, c.closeTier())
}
