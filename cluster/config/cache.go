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

// Cache says which answers every node caches, and for how long.
type Cache struct {
	Enabled bool        `yaml:"enabled"` // true
	Store   StorePolicy `yaml:"store,omitempty"`
	// LocalBytes bounds the tier in a node's memory. Default 128 MiB.
	LocalBytes int64    `yaml:"local_bytes,omitempty"`
	LocalTTL   Duration `yaml:"local_ttl,omitempty"` // 10m
	// SharedBytes bounds the file of a node's embedded tier. Default 1 GiB. It
	// does not apply to Redis, which is bounded by its own settings.
	SharedBytes int64    `yaml:"shared_bytes,omitempty"`
	SharedTTL   Duration `yaml:"shared_ttl,omitempty"` // 1h
	// Stale is how long an expired answer is kept beyond its TTL, to be used when
	// no upstream can answer. Default 24h; 0s disables it.
	Stale Duration `yaml:"stale"`
	// EntryBytes bounds one answer; larger ones are not cached. Default 1 MiB.
	EntryBytes int64 `yaml:"entry_bytes,omitempty"`
	// Sites configures the shared tier of each site; a site that is not listed
	// uses the embedded one.
	Sites map[string]SiteCache `yaml:"sites,omitempty"`
}

// StorePolicy says which answers are cached when the client does not ask for it.
type StorePolicy string

// The policies.
const (
	StoreDeterministic StorePolicy = "deterministic" // embeddings, and requests with temperature 0
	StoreAll           StorePolicy = "all"
	StoreNone          StorePolicy = "none" // not even when the client asks for it
)

// SiteCache configures the shared tier of a site.
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

// Redis is a Redis or Valkey server. Entries are encrypted before they are sent
// to it.
type Redis struct {
	// URL is redis://[user@]host:port[/db] or rediss://…. Further addresses of a
	// cluster or of sentinels are added as ?addr=host:port&addr=….
	URL  string    `yaml:"url,omitempty"`
	Mode RedisMode `yaml:"mode,omitempty"`
	// Master is the master's name in the sentinels' configuration.
	Master   string `yaml:"master,omitempty"`
	Password Secret `yaml:"password,omitempty"`
	// SentinelUser and SentinelPassword authenticate to the sentinels, which
	// don't share the credentials of the servers that they monitor.
	SentinelUser     string      `yaml:"sentinel_user,omitempty"`
	SentinelPassword Secret      `yaml:"sentinel_password,omitempty"`
	TLS              UpstreamTLS `yaml:"tls,omitempty"` // for rediss; also for the sentinels
}

// RedisMode says what kind of server the URL leads to.
type RedisMode string

// The modes.
const (
	RedisSingle   RedisMode = "single"
	RedisCluster  RedisMode = "cluster"
	RedisSentinel RedisMode = "sentinel"
)

// Secure reports whether the server is reached over TLS.
func (r Redis) Secure() bool { return strings.HasPrefix(strings.ToLower(r.URL), "rediss:") }

// ModelCache overrides the cluster's cache settings for one model. Parse fills
// in the cluster's values for settings that the model does not have.
type ModelCache struct {
	Enabled   bool        `yaml:"enabled"`
	Store     StorePolicy `yaml:"store,omitempty"`
	LocalTTL  Duration    `yaml:"local_ttl,omitempty"`
	SharedTTL Duration    `yaml:"shared_ttl,omitempty"`
	Stale     Duration    `yaml:"stale"`
}

// DefaultCache is the cache configuration without a cache section.
func DefaultCache() Cache {
	return Cache{
		Enabled: true, Store: StoreDeterministic,
		LocalBytes: 128 << 20, LocalTTL: Duration(10 * time.Minute),
		SharedBytes: 1 << 30, SharedTTL: Duration(time.Hour), Stale: Duration(24 * time.Hour),
		EntryBytes: 1 << 20,
	}
}

// At returns the shared tier of a site.
func (c Cache) At(site string) SiteCache {
	if s, ok := c.Sites[site]; ok {
		return s
	}
	return SiteCache{Shared: SharedEmbedded}
}

// MaxAge is the longest time that any answer may stay in a cache.
func (c *Config) MaxAge() time.Duration {
	most := c.Cache.SharedTTL.D() + c.Cache.Stale.D()
	for _, m := range c.Models {
		most = max(most, m.Cache.SharedTTL.D()+m.Cache.Stale.D())
	}
	return most
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

// modelCache fills in the settings that the model does not have, and checks
// the result if the model has any.
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
		c.reject(at.At("store"), c.src.suggest(string(p), known, ""), "%s is not a store policy", quoted(string(p)))
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
			c.reject(at, c.src.suggest(name, sites, "add it under sites"), "there is no site %s", quoted(name))
			continue
		}
		kinds := []string{string(SharedEmbedded), string(SharedRedis), string(SharedOff)}
		switch {
		case !slices.Contains(kinds, string(s.Shared)):
			c.reject(at.At("shared"), c.src.suggest(string(s.Shared), kinds, ""), "%s is not a kind of shared tier", quoted(string(s.Shared)))
		case s.Shared == SharedRedis:
			c.redis(at.At("redis"), s.Redis)
		case c.src.Has(at.At("redis")) && c.src.Has(at.At("redis", "url")):
			c.reject(at.At("redis"), "write shared: redis, or remove redis", "redis is configured, but the shared tier is %s", s.Shared)
		}
	}
}

func (c *checker) redis(at Path, r Redis) {
	modes := []string{string(RedisSingle), string(RedisCluster), string(RedisSentinel)}
	if !slices.Contains(modes, string(r.Mode)) {
		c.reject(at.At("mode"), c.src.suggest(string(r.Mode), modes, ""), "%s is not a Redis mode", quoted(string(r.Mode)))
	}
	switch {
	case r.Mode == RedisSentinel && r.Master == "":
		c.missing(at.At("master"), "write the master's name in the sentinels' configuration, such as mymaster")
	case r.Mode != RedisSentinel && r.Master != "":
		c.reject(at.At("master"), "remove it, or write mode: sentinel", "master is used only with sentinels")
	}
	if c.src.Has(at.At("password")) {
		c.secret(at.At("password"), r.Password)
	}
	c.sentinels(at, r)
	c.upstreamTLS(at.At("tls"), r.TLS)
	if _, err := r.Addresses(); err != nil {
		const sample = "write a URL such as redis://cache:6379/0 or rediss://cache:6379?addr=cache-2:6379"
		if r.URL == "" {
			c.missing(at.At("url"), sample)
			return
		}
		c.reject(at.At("url"), sample, "%s", err.Error())
	}
}

// sentinels checks the credentials for sentinels.
func (c *checker) sentinels(at Path, r Redis) {
	user, password := at.At("sentinel_user"), at.At("sentinel_password")
	if c.src.Has(password) {
		c.secret(password, r.SentinelPassword)
	}
	switch {
	case r.Mode != RedisSentinel && r.SentinelUser != "":
		c.reject(user, "remove it, or write mode: sentinel", "sentinel_user is used only with sentinels")
	case r.Mode != RedisSentinel && c.src.Has(password):
		c.reject(password, "remove it, or write mode: sentinel", "sentinel_password is used only with sentinels")
	case r.SentinelUser != "" && !c.src.Has(password):
		c.missing(password, "write sentinel_password: {env: NAME}, or remove sentinel_user")
	}
}

// RedisAddresses are the parts of a Redis URL.
type RedisAddresses struct {
	User  string
	Hosts []string // host:port, at least one
	DB    int
}

// Addresses parses the URL. The error is for the user and never repeats the URL,
// which may contain a password.
func (r Redis) Addresses() (RedisAddresses, error) {
	var a RedisAddresses
	u, err := url.Parse(r.URL)
	switch {
	case err != nil || len(r.URL) > 2048:
		return a, errors.New("is not a URL")
	case u.Scheme != "redis" && u.Scheme != "rediss":
		return a, errors.New("the URL's scheme is not redis or rediss")
	case u.Hostname() == "":
		return a, errors.New("the URL has no host")
	case u.Fragment != "":
		return a, errors.New("the URL has a fragment")
	}
	if u.User != nil {
		if _, secret := u.User.Password(); secret {
			return a, errors.New("the URL contains a password: remove it and write password: {env: NAME}")
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
			return a, errors.New("the URL's path is not the number of a database")
		}
		if r.Mode == RedisCluster && a.DB != 0 {
			return a, errors.New("a Redis cluster has only database 0")
		}
	}
	q, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return a, errors.New("the URL's query can't be read")
	}
	for key, values := range q {
		if key != "addr" {
			return a, errors.New("the URL's query may contain only addr")
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
