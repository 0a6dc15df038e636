// Package config is about cluster.yaml: its types, parser, checks and diff, the
// secrets that it refers to, and the timing derived from its heartbeat. It imports
// no other package of dsnode, no Raft and no gRPC. Start at Parse.
package config

import (
	"strings"
	"time"
)

// Config is the parsed cluster.yaml, which the whole cluster agrees on. It is
// immutable once published: replace it, never change it. Outside tests only Parse
// makes one, so it is always valid.
type Config struct {
	Version   int                 `yaml:"version"`
	Sites     map[string]Site     `yaml:"sites"`
	Upstreams map[string]Upstream `yaml:"upstreams,omitempty"`
	Models    map[string]Model    `yaml:"models,omitempty"`
	Timeouts  Timeouts            `yaml:"timeouts,omitempty"`
	Limits    Limits              `yaml:"limits,omitempty"`
	Access    Access              `yaml:"access,omitempty"`
	Cache     Cache               `yaml:"cache,omitempty"`
	Jobs      Jobs                `yaml:"jobs,omitempty"`
	Timing    TimingConfig        `yaml:"timing,omitempty"`

	source *Source // nil in a Config that was not parsed
}

// FeatureLevel is the feature level that all nodes need to read this configuration, and the
// key because of which they do; "" at level 1. Older versions refuse unknown keys.
func (c *Config) FeatureLevel() (level int, key string) {
	if at := At("limits", "tenant_share"); c.source.Has(at) {
		return 3, at.String()
	}
	if at := At("access", "join"); c.source.Has(at) {
		return 3, at.String()
	}
	if at := At("access", "stale_for"); c.source.Has(at) {
		return 2, at.String()
	}
	return 1, ""
}

// Site is a data centre.
type Site struct {
	City string `yaml:"city"`
	// Priority orders the sites as candidates for primary: 1 comes first.
	Priority int `yaml:"priority"`
	// RPOTarget and RTOTarget are the site's objectives; the status compares
	// measured values with them. Defaults: 1 h and 15 min.
	RPOTarget Duration `yaml:"rpo_target,omitempty"`
	RTOTarget Duration `yaml:"rto_target,omitempty"`
}

// UpstreamKind names a kind of model server. Kinds differ in health endpoints,
// error responses and how a broken stream is continued.
type UpstreamKind string

const (
	KindVLLM     UpstreamKind = "vllm"
	KindSGLang   UpstreamKind = "sglang"
	KindLlamaCPP UpstreamKind = "llamacpp"
	KindOllama   UpstreamKind = "ollama"
	KindDeepSeek UpstreamKind = "deepseek"
	KindOpenAI   UpstreamKind = "openai"
)

// Upstream is one OpenAI-compatible model server, owned by a site.
type Upstream struct {
	Site string       `yaml:"site"`
	Kind UpstreamKind `yaml:"kind,omitempty"`
	// URL is the base URL that "/chat/completions" is appended to, as in OpenAI's
	// clients: "http://vllm:8000/v1".
	URL    string      `yaml:"url"`
	APIKey Secret      `yaml:"api_key,omitempty"`
	TLS    UpstreamTLS `yaml:"tls,omitempty"`
	// MaxConcurrency bounds the requests that one node sends at once to one
	// instance found by Discover. 0: 256.
	MaxConcurrency int          `yaml:"max_concurrency,omitempty"`
	Discover       DiscoverMode `yaml:"discover,omitempty"` // "": off
	// Timeouts override the cluster's for this upstream; zero means inherit.
	Timeouts Timeouts `yaml:"timeouts,omitempty"`
}

// Secure reports whether the upstream is reached over TLS. If not, its TLS
// settings are unused.
func (u Upstream) Secure() bool { return strings.HasPrefix(strings.ToLower(u.URL), "https:") }

// DiscoverMode says how an upstream's URL is resolved to addresses. Each address
// found is an instance of the upstream with its own health.
type DiscoverMode string

const (
	// DiscoverOff uses the URL as written.
	DiscoverOff DiscoverMode = "off"
	// DiscoverDNS uses every A and AAAA address of the URL's host, at the URL's port.
	DiscoverDNS DiscoverMode = "dns"
	// DiscoverSRV uses every target of the SRV records of the URL's host, or of
	// _http._tcp.HOST or _https._tcp.HOST when the host is not itself the name of
	// a service. Priorities and weights are ignored: health and load decide.
	DiscoverSRV DiscoverMode = "srv"
)

// UpstreamTLS says how an https upstream is verified. The files are read on the
// nodes of the upstream's site.
type UpstreamTLS struct {
	CAFile             string `yaml:"ca_file,omitempty"`
	ServerName         string `yaml:"server_name,omitempty"`
	CertFile           string `yaml:"cert_file,omitempty"`
	KeyFile            string `yaml:"key_file,omitempty"`
	InsecureSkipVerify bool   `yaml:"insecure_skip_verify,omitempty"`
}

// Secret is a reference to a secret, never its value: {env: NAME} or {file: PATH}.
type Secret struct {
	Env  string `yaml:"env,omitempty"`
	File string `yaml:"file,omitempty"`
}

// IsZero reports whether neither field is set.
func (s Secret) IsZero() bool { return s == Secret{} }

// Model is a model name that clients may request.
type Model struct {
	Serve []Serve `yaml:"serve,omitempty"`
	// Fallbacks are names of other models, tried in order when no upstream
	// that serves this one can answer.
	Fallbacks []string `yaml:"fallbacks,omitempty"`
	Timeouts  Timeouts `yaml:"timeouts,omitempty"`
	// Revision identifies the weights. Answers cached under another revision are
	// not used.
	Revision string     `yaml:"revision,omitempty"`
	Cache    ModelCache `yaml:"cache,omitempty"`
}

// Serve says that an upstream serves a model, and under which name.
type Serve struct {
	Upstream string `yaml:"upstream"`
	Model    string `yaml:"model,omitempty"` // "": the same name
}

// Timeouts are the four timers of one request and the minimum rate of a stream.
// Zero means inherit: a model inherits from the upstream, an upstream from the
// cluster, the cluster from the defaults.
type Timeouts struct {
	Connect       Duration `yaml:"connect,omitempty"`        // 2s
	FirstToken    Duration `yaml:"first_token,omitempty"`    // 120s
	BetweenTokens Duration `yaml:"between_tokens,omitempty"` // 30s
	Total         Duration `yaml:"total,omitempty"`          // 30m
	// MinTokensPerSecond ends a stream whose rate, after its first token, stays
	// below this for ten seconds. 0: no minimum.
	MinTokensPerSecond int `yaml:"min_tokens_per_second,omitempty"`
}

// Limits bound the client requests of one node.
type Limits struct {
	BodyBytes   int64 `yaml:"body_bytes,omitempty"`   // 32 MiB
	InFlight    int   `yaml:"in_flight,omitempty"`    // 4096 requests
	Connections int   `yaml:"connections,omitempty"`  // 8192 on the api port
	HeaderBytes int   `yaml:"header_bytes,omitempty"` // 64 KiB
	// TenantShare is how many percent of InFlight, of the memory for bodies, and of
	// Jobs.MaxQueued and MaxQueuedBytes one tenant may use. 100: all. Default 50. 0 only in
	// a Config that was not parsed: all.
	TenantShare int `yaml:"tenant_share,omitempty"`
}

// ShareOf is the percent of the bounds that a tenant may use; 0: it has no share, and may use
// all. Clients without a key have one only with Access.Anonymous: else there are no keys
// yet, and nobody to share with.
func (c *Config) ShareOf(keyID, tenant string) int {
	if keyID == "" && tenant == "" && !c.Access.Anonymous {
		return 0
	}
	return c.Limits.TenantShare
}

// Access says who may use the api port.
type Access struct {
	// Anonymous allows requests without a key from any address. If false (the
	// default), every request needs a key once one exists; until then only
	// connections over loopback are served.
	Anonymous bool `yaml:"anonymous,omitempty"`
	// StaleFor is how long a node that is cut off from the cluster still accepts API keys. 0,
	// the default: without limit, so a key that is revoked meanwhile is accepted there
	// until the node is back.
	StaleFor Duration `yaml:"stale_for"`
	// Join says whether a node that is no member may join by itself.
	Join JoinMode `yaml:"join,omitempty"`
}

// JoinMode says who may join the cluster, of those with a certificate of its CA.
type JoinMode string

const (
	// JoinOpen: every node that was not removed.
	JoinOpen JoinMode = "open"
	// JoinApprove: a node that an operator admits.
	JoinApprove JoinMode = "approve"
)

// Stale reports whether API keys can't be checked against a copy of the agreed state that
// may be so old. An age that is not known is too old for any limit.
func (a Access) Stale(age time.Duration, known bool) bool {
	return a.StaleFor > 0 && (!known || age > a.StaleFor.D())
}

// TimingConfig has the one setting from which all failure-detection times are
// derived; see Timing.
type TimingConfig struct {
	// Heartbeat is raft's heartbeat, election and leader-lease timeout.
	// Default 800ms, for round trips of up to 60 ms.
	Heartbeat Duration `yaml:"heartbeat"`
}

// Duration is a time.Duration whose text form is "800ms", "2s", "1h".
type Duration time.Duration

// D returns it as a time.Duration.
func (d Duration) D() time.Duration { return time.Duration(d) }
