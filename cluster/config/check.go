package config

import (
	"cmp"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
)

// Bounds of a cluster. They are far above any real use and keep the agreed
// state small.
const (
	MaxSites     = 16
	MaxUpstreams = 1024
	MaxModels    = 1024
	maxServe     = 64
	maxFallbacks = 16
)

// checker has the rules for cluster.yaml. Each rule checks the Config and
// reports problems at the line in the source.
type checker struct {
	*Config
	src *Source
}

func (c *checker) all() {
	c.version()
	c.sites()
	c.upstreams()
	c.models()
	if len(c.Upstreams) <= MaxUpstreams && len(c.Models) <= MaxModels {
		c.fallbackCycles()
		c.timeouts()
	}
	c.limits()
	c.cache()
	c.jobs()
	c.access()
	c.timing()
}

func (c *checker) reject(p Path, hint, format string, args ...any) {
	c.src.Reject(p, fmt.Sprintf(format, args...), hint)
}

// missing rejects a required value that is absent or empty.
func (c *checker) missing(p Path, hint string) {
	what := "is missing"
	if c.src.Has(p) {
		what = "is empty"
	}
	c.src.Reject(p, what, hint)
}

func (c *checker) version() {
	switch {
	case !c.src.Has(At("version")):
		c.missing(At("version"), "write version: 1")
	case c.Version != 1:
		c.reject(At("version"), "write version: 1", "version %d is not supported", c.Version)
	}
}

// tooMany rejects a list that is over its bound. The caller then skips its
// entries: there may be a hundred thousand.
func (c *checker) tooMany(p Path, n, most int) bool {
	if n > most {
		c.reject(p, "", "has %d entries, more than the limit of %d", n, most)
	}
	return n > most
}

func (c *checker) sites() {
	if len(c.Sites) == 0 {
		c.missing(At("sites"), "write at least one, such as shanghai-a: {city: shanghai, priority: 1}")
		return
	}
	if c.tooMany(At("sites"), len(c.Sites), MaxSites) {
		return
	}
	taken := map[int]string{}
	for _, name := range c.inFileOrder("sites", slices.Collect(maps.Keys(c.Sites))) {
		s, at := c.Sites[name], At("sites", name)
		if !ValidName(name) {
			c.reject(at, NameHint, "%s cannot be a site's name", quoted(name))
			continue
		}
		switch {
		case s.City == "":
			c.missing(at.At("city"), "write the city's name: a site is replaced first by one of the same city")
		case len(s.City) > 64 || !isPrintable(s.City):
			c.reject(at.At("city"), "write a name of up to 64 printable characters", "%s cannot be a city", quoted(s.City))
		}
		switch other, twice := taken[s.Priority]; {
		case !c.src.Has(at.At("priority")):
			c.missing(at.At("priority"), "write priority: 1 for the first choice as primary, then 2, 3 …")
		case s.Priority < 1 || s.Priority > 1000:
			c.reject(at.At("priority"), "write a number from 1 (first) to 1000", "priority %d is out of range", s.Priority)
		case twice:
			c.reject(at.At("priority"), "give each site its own priority", "site %[2]s already has priority %[1]d", s.Priority, other)
		default:
			taken[s.Priority] = name
		}
		c.within(at.At("rpo_target"), s.RPOTarget, time.Second, 30*24*time.Hour)
		c.within(at.At("rto_target"), s.RTOTarget, time.Second, 30*24*time.Hour)
	}
}

// inFileOrder sorts names by their lines in the file, so that of two entries
// that conflict the later one is rejected.
func (c *checker) inFileOrder(parent string, names []string) []string {
	slices.SortFunc(names, func(a, b string) int {
		return cmp.Or(c.src.Line(At(parent, a))-c.src.Line(At(parent, b)), strings.Compare(a, b))
	})
	return names
}

// between rejects a number that is out of range.
func (c *checker) between(p Path, v, least, most int64) {
	if v < least || v > most {
		c.reject(p, fmt.Sprintf("write a number from %d to %d", least, most), "%d is out of range", v)
	}
}

func (c *checker) within(p Path, d Duration, least, most time.Duration) {
	if d.D() < least || d.D() > most {
		c.reject(p, fmt.Sprintf("write a time from %s to %s", Duration(least), Duration(most)), "%s is out of range", d)
	}
}

func (c *checker) upstreams() {
	if c.tooMany(At("upstreams"), len(c.Upstreams), MaxUpstreams) {
		return
	}
	for _, name := range c.inFileOrder("upstreams", slices.Collect(maps.Keys(c.Upstreams))) {
		at := At("upstreams", name)
		if !ValidName(name) {
			c.reject(at, NameHint, "%s cannot be an upstream's name", quoted(name))
			continue
		}
		c.upstream(at, c.Upstreams[name])
	}
	for name, u := range c.Upstreams {
		if u.MaxConcurrency == 0 {
			u.MaxConcurrency = DefaultMaxConcurrency
			c.Upstreams[name] = u
		}
	}
}

func (c *checker) upstream(at Path, u Upstream) {
	sites := slices.Sorted(maps.Keys(c.Sites))
	_, known := c.Sites[u.Site]
	switch {
	case u.Site == "":
		c.missing(at.At("site"), "write the site whose nodes reach it: "+wordChoices(sites))
	case !known && !c.src.Broken(At("sites")):
		c.reject(at.At("site"), c.src.suggest(u.Site, sites, "add it under sites"), "there is no site %s", quoted(u.Site))
	}
	kinds := []string{string(KindVLLM), string(KindSGLang), string(KindLlamaCPP), string(KindOllama), string(KindDeepSeek), string(KindOpenAI)}
	if !slices.Contains(kinds, string(u.Kind)) {
		c.reject(at.At("kind"), c.src.suggest(string(u.Kind), kinds, ""), "unknown kind %s", quoted(string(u.Kind)))
	}
	c.upstreamURL(at.At("url"), u.URL)
	c.upstreamTLS(at.At("tls"), u.TLS)
	c.secret(at.At("api_key"), u.APIKey)
	if u.MaxConcurrency < 0 || u.MaxConcurrency > 65536 {
		c.reject(at.At("max_concurrency"), "write a number from 1 to 65536, or 0 for the default of 256", "%d is out of range", u.MaxConcurrency)
	}
	switch u.Discover {
	case DiscoverOff, DiscoverDNS:
	case DiscoverSRV:
		if to, err := url.Parse(u.URL); err == nil && to.Port() != "" {
			c.reject(at.At("url"), "remove the port", "the URL has a port, but with discover: srv the ports come from the SRV records")
		}
	default:
		modes := []string{string(DiscoverOff), string(DiscoverDNS), string(DiscoverSRV)}
		c.reject(at.At("discover"), c.src.suggest(string(u.Discover), modes, ""), "%s is not a discovery mode", quoted(string(u.Discover)))
	}
}

func (c *checker) upstreamURL(at Path, raw string) {
	const sample = "write a URL such as http://vllm:8000/v1"
	if raw == "" {
		c.missing(at, sample)
		return
	}
	u, err := url.Parse(raw)
	if err != nil {
		// The text may contain a password, so the message does not repeat it.
		c.reject(at, sample, "is not a URL")
		return
	}
	if len(raw) > 2048 {
		c.reject(at, sample, "the URL has more than 2048 characters")
	}
	if u.Scheme != "http" && u.Scheme != "https" {
		c.reject(at, sample, "the URL's scheme is not http or https")
		return
	}
	port, err := strconv.Atoi(u.Port())
	switch {
	case u.User != nil:
		c.reject(at, "remove it and write api_key: {env: NAME}", "the URL contains a user or password")
	case u.Hostname() == "":
		c.reject(at, sample, "the URL has no host")
	case u.Port() != "" && (err != nil || port < 1 || port > 65535), strings.HasSuffix(u.Host, ":"):
		c.reject(at, "write a port from 1 to 65535, or none", "the URL's port is invalid")
	case u.RawQuery != "" || u.ForceQuery:
		c.reject(at, "remove what follows the ?", "the URL has a query")
	case u.Fragment != "" || strings.Contains(raw, "#"):
		c.reject(at, "remove what follows the #", "the URL has a fragment")
	case strings.HasSuffix(strings.TrimSuffix(u.Path, "/"), "/completions"):
		c.reject(at, "end it before /chat/completions, as OpenAI's clients do: "+sample[len("write a URL such as "):], "the URL is that of one endpoint, not the base URL of all endpoints")
	}
}

// upstreamTLS checks the TLS settings against each other. With an http URL they
// are unused but allowed: the URL may be about to change.
func (c *checker) upstreamTLS(at Path, t UpstreamTLS) {
	if (t.CertFile == "") != (t.KeyFile == "") {
		c.reject(at, "write both, or none", "cert_file and key_file must be set together")
	}
	if t.InsecureSkipVerify && (t.CAFile != "" || t.ServerName != "") {
		c.reject(at.At("insecure_skip_verify"), "keep ca_file and server_name, and remove insecure_skip_verify", "contradicts ca_file and server_name: nothing would be verified")
	}
}

func (c *checker) secret(at Path, s Secret) {
	message, hint := s.check()
	if message != "" && (c.src.Has(at) || !s.IsZero()) {
		c.reject(at, hint, "%s", message)
	}
}

func (c *checker) limits() {
	l, at := c.Limits, At("limits")
	c.between(at.At("body_bytes"), l.BodyBytes, 1<<10, 1<<30)
	c.between(at.At("in_flight"), int64(l.InFlight), 1, 1<<20)
	c.between(at.At("connections"), int64(l.Connections), 1, 1<<20)
	c.between(at.At("header_bytes"), int64(l.HeaderBytes), 4<<10, 1<<20)
	c.between(at.At("tenant_share"), int64(l.TenantShare), 1, 100)
}

// access: a limit must outlast a change of the raft leader on a bad link, or each would
// refuse all clients of some nodes.
func (c *checker) access() {
	const least, most = Duration(10 * time.Second), Duration(30 * 24 * time.Hour)
	if m := c.Access.Join; m != "" && m != JoinOpen && m != JoinApprove {
		c.reject(At("access", "join"), fmt.Sprintf("write %s or %s", JoinOpen, JoinApprove), "%q is no way to join", m)
	}
	if d := c.Access.StaleFor; d != 0 && (d < least || d > most) {
		c.reject(At("access", "stale_for"), fmt.Sprintf("write a time from %s to %s, or 0s for no limit", least, most), "%s is out of range", d)
	}
}

func (c *checker) timing() {
	c.within(At("timing", "heartbeat"), c.Timing.Heartbeat, 100*time.Millisecond, 10*time.Second)
}

// isPrintable reports whether s has no control characters, no line breaks and no
// white space at either end.
func isPrintable(s string) bool {
	return strings.TrimSpace(s) == s && !strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) })
}
