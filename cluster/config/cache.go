package config

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Cache is what every node keeps of answers, and for how long.
type Cache struct {
	Enabled bool        `yaml:"enabled"` // true
	Store   StorePolicy `yaml:"store,omitempty"`
	// LocalBytes bounds the tier in a node's memory, 128 MiB.
	LocalBytes int64    `yaml:"local_bytes,omitempty"`
	LocalTTL   Duration `yaml:"local_ttl,omitempty"` // 10m
	// SharedBytes bounds the file of a node's embedded tier, 1 GiB. A Redis has
	// a bound of its own.
	SharedBytes int64    `yaml:"shared_bytes,omitempty"`
	SharedTTL   Duration `yaml:"shared_ttl,omitempty"` // 1h
	// Stale is how much longer an expired answer is kept for when no upstream
	// can answer. 24h; 0s: not at all.
	Stale Duration `yaml:"stale"`
	// EntryBytes bounds one answer, 1 MiB: larger ones are not kept.
	EntryBytes int64 `yaml:"entry_bytes,omitempty"`
	// Sites says where the shared tier of a site is; a site that is not named
	// has the embedded one.
	Sites map[string]SiteCache `yaml:"sites,omitempty"`
}

// StorePolicy says which answers are kept without being asked to.
type StorePolicy string

// The policies.
const (
	StoreDeterministic StorePolicy = "deterministic" // embeddings, and what was asked with temperature 0
	StoreAll           StorePolicy = "all"
	StoreNone          StorePolicy = "none" // and none that is asked for either
)

// SiteCache is where a site keeps its shared tier.
type SiteCache struct {
	Shared SharedTier `yaml:"shared,omitempty"`
	Redis  Redis      `yaml:"redis,omitempty"`
}

// SharedTier names a kind of shared tier.
type SharedTier string

// The kinds.
const (
	SharedEmbedded SharedTier = "embedded" // a file of each node
	SharedRedis    SharedTier = "redis"    // the site's Redis or Valkey
	SharedOff      SharedTier = "off"
)

// Redis is a Redis or Valkey. What it gets is sealed.
type Redis struct {
	// URL is redis://[user@]host:port[/db] or rediss://…; further addresses of a
	// cluster or of sentinels follow as ?addr=host:port&addr=….
	URL  string    `yaml:"url,omitempty"`
	Mode RedisMode `yaml:"mode,omitempty"`
	// Master is the name that sentinels know the server by.
	Master   string `yaml:"master,omitempty"`
	Password Secret `yaml:"password,omitempty"`
	// SentinelUser and SentinelPassword are for the sentinels, which know
	// nothing of those of the servers that they watch.
	SentinelUser     string      `yaml:"sentinel_user,omitempty"`
	SentinelPassword Secret      `yaml:"sentinel_password,omitempty"`
	TLS              UpstreamTLS `yaml:"tls,omitempty"` // of rediss; of sentinels too
}

// RedisMode says what stands at the URL.
type RedisMode string

// The modes.
const (
	RedisSingle   RedisMode = "single"
	RedisCluster  RedisMode = "cluster"
	RedisSentinel RedisMode = "sentinel"
)

// Secure reports whether the server is reached over TLS.
func (r Redis) Secure() bool { return strings.HasPrefix(strings.ToLower(r.URL), "rediss:") }

// ModelCache is what a model has of its own; after Parse it is complete,
// with the cluster's values where the model says nothing.
type ModelCache struct {
	Enabled   bool        `yaml:"enabled"`
	Store     StorePolicy `yaml:"store,omitempty"`
	LocalTTL  Duration    `yaml:"local_ttl,omitempty"`
	SharedTTL Duration    `yaml:"shared_ttl,omitempty"`
	Stale     Duration    `yaml:"stale"`
}

// DefaultCache is the cache that nobody has configured.
func DefaultCache() Cache {
	return Cache{
		Enabled: true, Store: StoreDeterministic,
		LocalBytes: 128 << 20, LocalTTL: Duration(10 * time.Minute),
		SharedBytes: 1 << 30, SharedTTL: Duration(time.Hour), Stale: Duration(24 * time.Hour),
		EntryBytes: 1 << 20,
	}
}

// At is the shared tier of a site.
func (c Cache) At(site string) SiteCache {
	if s, ok := c.Sites[site]; ok {
		return s
	}
	return SiteCache{Shared: SharedEmbedded}
}

// MaxAge is the longest time that any answer may be kept.
func (c *Config) MaxAge() time.Duration {
	most := c.Cache.SharedTTL.D() + c.Cache.Stale.D()
	for _, m := range c.Models {
		most = max(most, m.Cache.SharedTTL.D()+m.Cache.Stale.D())
	}
	return most
}

// equal compares all of it.
func (c Cache) equal(o Cache) bool {
	return maps.Equal(c.Sites, o.Sites) && c.Enabled == o.Enabled && c.Store == o.Store && c.LocalBytes == o.LocalBytes && c.LocalTTL == o.LocalTTL &&
		c.SharedBytes == o.SharedBytes && c.SharedTTL == o.SharedTTL && c.Stale == o.Stale && c.EntryBytes == o.EntryBytes
}

func (s *SiteCache) setDefaults() { s.Shared, s.Redis.Mode = SharedEmbedded, RedisSingle }

// Bounds of the cache's times.
const (
	maxCacheTTL   = 7 * 24 * time.Hour
	maxCacheStale = 30 * 24 * time.Hour
)

func (c *checker) cache() {
	at, k := At("cache"), &c.Cache
	c.storePolicy(at, k.Store)
	c.cacheTimes(at, k.LocalTTL, k.SharedTTL, k.Stale)
	bound := func(key string, v, least, most int64) bool {
		if v < least || v > most {
			c.reject(at.At(key), fmt.Sprintf("write a number of bytes from %d to %d", least, most), "%d is out of range", v)
			return false
		}
		return true
	}
	local := bound("local_bytes", k.LocalBytes, 1<<20, 1<<40)
	shared := bound("shared_bytes", k.SharedBytes, 16<<20, 1<<42)
	if bound("entry_bytes", k.EntryBytes, 1<<10, 16<<20) {
		switch {
		case local && k.EntryBytes > k.LocalBytes/4:
			c.reject(at.At("entry_bytes"), "lower entry_bytes or raise local_bytes", "entry_bytes (%d) must not exceed a quarter of local_bytes (%d)", k.EntryBytes, k.LocalBytes)
		case shared && k.EntryBytes > k.SharedBytes/8:
			c.reject(at.At("entry_bytes"), "lower entry_bytes or raise shared_bytes", "entry_bytes (%d) must not exceed an eighth of shared_bytes (%d)", k.EntryBytes, k.SharedBytes)
		}
	}
	c.cacheSites(at.At("sites"))
	if len(c.Models) > MaxModels {
		return
	}
	for name, m := range c.Models {
		m.Cache = c.modelCache(At("models", name, "cache"), m.Cache)
		c.Models[name] = m
	}
}

// modelCache fills in what the model does not say.
func (c *checker) modelCache(at Path, own ModelCache) ModelCache {
	if !c.src.Has(at.At("enabled")) {
		own.Enabled = c.Cache.Enabled
	}
	if !c.src.Has(at.At("store")) {
		own.Store = c.Cache.Store
	}
	for _, d := range []struct {
		key       string
		own       *Duration
		inherited Duration
	}{{"local_ttl", &own.LocalTTL, c.Cache.LocalTTL}, {"shared_ttl", &own.SharedTTL, c.Cache.SharedTTL}, {"stale", &own.Stale, c.Cache.Stale}} {
		if !c.src.Has(at.At(d.key)) {
			*d.own = d.inherited
		}
	}
	if c.src.Has(at) {
		c.storePolicy(at, own.Store)
		c.cacheTimes(at, own.LocalTTL, own.SharedTTL, own.Stale)
	}
	return own
}

func (c *checker) storePolicy(at Path, p StorePolicy) {
	known := []string{string(StoreDeterministic), string(StoreAll), string(StoreNone)}
	if !slices.Contains(known, string(p)) {
		c.reject(at.At("store"), c.src.suggest(string(p), known, ""), "%s is no policy for what to keep", quoted(string(p)))
	}
}

func (c *checker) cacheTimes(at Path, local, shared, stale Duration) {
	c.within(at.At("local_ttl"), local, time.Second, maxCacheTTL)
	c.within(at.At("shared_ttl"), shared, time.Second, maxCacheTTL)
	c.within(at.At("stale"), stale, 0, maxCacheStale)
	if local > shared && !c.src.Broken(at.At("local_ttl")) && !c.src.Broken(at.At("shared_ttl")) {
		blame := "local_ttl"
		if !c.src.Has(at.At(blame)) {
			blame = "shared_ttl"
		}
		c.reject(at.At(blame), "lower local_ttl or raise shared_ttl", "local_ttl (%s) must not exceed shared_ttl (%s)", local, shared)
	}
}

func (c *checker) cacheSites(at Path) {
	if c.tooMany(at, len(c.Cache.Sites), MaxSites) {
		return
	}
	sites := slices.Sorted(maps.Keys(c.Sites))
	for _, name := range slices.Sorted(maps.Keys(c.Cache.Sites)) {
		s, at := c.Cache.Sites[name], at.At(name)
		if _, known := c.Sites[name]; !known && !c.src.Broken(At("sites")) {
			c.reject(at, c.src.suggest(name, sites, "add it there"), "site %s is not under sites", quoted(name))
			continue
		}
		kinds := []string{string(SharedEmbedded), string(SharedRedis), string(SharedOff)}
		switch {
		case !slices.Contains(kinds, string(s.Shared)):
			c.reject(at.At("shared"), c.src.suggest(string(s.Shared), kinds, ""), "%s is no kind of shared tier", quoted(string(s.Shared)))
		case s.Shared == SharedRedis:
			c.redis(at.At("redis"), s.Redis)
		case c.src.Has(at.At("redis")) && c.src.Has(at.At("redis", "url")):
			c.reject(at.At("redis"), "write shared: redis, or remove redis", "there is a redis, but the shared tier is %s", s.Shared)
		}
	}
}

func (c *checker) redis(at Path, r Redis) {
	modes := []string{string(RedisSingle), string(RedisCluster), string(RedisSentinel)}
	if !slices.Contains(modes, string(r.Mode)) {
		c.reject(at.At("mode"), c.src.suggest(string(r.Mode), modes, ""), "%s is no mode", quoted(string(r.Mode)))
	}
	switch {
	case r.Mode == RedisSentinel && r.Master == "":
		c.missing(at.At("master"), "write the name that the sentinels know the server by, such as mymaster")
	case r.Mode != RedisSentinel && r.Master != "":
		c.reject(at.At("master"), "remove it, or write mode: sentinel", "only sentinels know a master")
	}
	if c.src.Has(at.At("password")) {
		c.secret(at.At("password"), r.Password)
	}
	c.sentinels(at, r)
	c.upstreamTLS(at.At("tls"), r.TLS)
	if _, err := r.Addresses(); err != nil {
		const sample = "write it like redis://cache:6379/0 or rediss://cache:6379?addr=cache-2:6379"
		if r.URL == "" {
			c.missing(at.At("url"), sample)
			return
		}
		c.reject(at.At("url"), sample, "%s", err.Error())
	}
}

// sentinels checks what is for them alone.
func (c *checker) sentinels(at Path, r Redis) {
	user, password := at.At("sentinel_user"), at.At("sentinel_password")
	if c.src.Has(password) {
		c.secret(password, r.SentinelPassword)
	}
	switch {
	case r.Mode != RedisSentinel && r.SentinelUser != "":
		c.reject(user, "remove it, or write mode: sentinel", "there are no sentinels")
	case r.Mode != RedisSentinel && c.src.Has(password):
		c.reject(password, "remove it, or write mode: sentinel", "there are no sentinels")
	case r.SentinelUser != "" && !c.src.Has(password):
		c.missing(password, "write sentinel_password: {env: NAME}, or remove sentinel_user")
	}
}

// RedisAddresses is what a Redis URL says.
type RedisAddresses struct {
	User  string
	Hosts []string // host:port, at least one
	DB    int
}

// Addresses reads the URL. The error is in a user's words and never repeats it:
// it may hold a password.
func (r Redis) Addresses() (RedisAddresses, error) {
	var a RedisAddresses
	u, err := url.Parse(r.URL)
	switch {
	case err != nil || len(r.URL) > 2048:
		return a, errors.New("is not a URL")
	case u.Scheme != "redis" && u.Scheme != "rediss":
		return a, errors.New("the URL is not one of redis or rediss")
	case u.Hostname() == "":
		return a, errors.New("the URL has no host")
	case u.Fragment != "":
		return a, errors.New("the URL has a fragment")
	}
	if u.User != nil {
		if _, secret := u.User.Password(); secret {
			return a, errors.New("the URL holds a password: remove it and write password: {env: NAME}")
		}
		a.User = u.User.Username()
	}
	port := u.Port()
	if port == "" {
		port = "6379"
	}
	a.Hosts = []string{net.JoinHostPort(u.Hostname(), port)}
	if path := strings.Trim(u.Path, "/"); path != "" {
		if a.DB, err = strconv.Atoi(path); err != nil || a.DB < 0 || a.DB > 1<<16 {
			return a, errors.New("what follows the host is not the number of a database")
		}
		if r.Mode == RedisCluster && a.DB != 0 {
			return a, errors.New("a cluster has no databases")
		}
	}
	q, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return a, errors.New("the URL's query can't be read")
	}
	for key, values := range q {
		if key != "addr" {
			return a, errors.New("the URL's query may hold addr alone")
		}
		for _, v := range values {
			if _, _, err := net.SplitHostPort(v); err != nil {
				return a, errors.New("an addr in the URL's query is not host:port")
			}
			a.Hosts = append(a.Hosts, v)
		}
	}
	switch {
	case len(a.Hosts) > 64:
		return a, errors.New("the URL names more than 64 addresses")
	case len(a.Hosts) > 1 && r.Mode == RedisSingle:
		return a, errors.New("the URL names several addresses, which are for mode: cluster or mode: sentinel")
	}
	return a, nil
}
