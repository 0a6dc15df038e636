// Package config is cluster.yaml: its types, how it is parsed, checked and compared,
// where its secrets come from, and the timing that follows from its heartbeat. It is
// a leaf: no connection, no Raft. Start at Parse.
package config

import (
	"strings"
	"time"
)

// Config is what the whole cluster agrees on: the parsed form of cluster.yaml.
// It is immutable once published; replace it, never change it. Parse is
// the only maker outside tests, so a Config that exists is a valid one.
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

// Site is a data centre.
type Site struct {
	City string `yaml:"city"`
	// Priority orders the sites as candidates for primary: 1 comes first.
	Priority int `yaml:"priority"`
	// RPOTarget and RTOTarget are what this site promises its users; the
	// status compares with them. Defaults: 1 h and 15 min.
	RPOTarget Duration `yaml:"rpo_target,omitempty"`
	RTOTarget Duration `yaml:"rto_target,omitempty"`
}

// UpstreamKind names a family of model servers, which differ in health
// endpoints, error habits and how a broken stream is continued.
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
	// URL is the base that "/chat/completions" is appended to, as users of
	// OpenAI's clients write it: "http://vllm:8000/v1".
	URL    string      `yaml:"url"`
	APIKey Secret      `yaml:"api_key,omitempty"`
	TLS    UpstreamTLS `yaml:"tls,omitempty"`
	// MaxConcurrency is for each node, and for each instance that Discover
	// finds. 0: 256.
	MaxConcurrency int          `yaml:"max_concurrency,omitempty"`
	Discover       DiscoverMode `yaml:"discover,omitempty"` // "": off
	// Timeouts override the cluster's for this upstream; zero means inherit.
	Timeouts Timeouts `yaml:"timeouts,omitempty"`
}

// Secure reports whether the upstream is reached over TLS. Else its TLS
// settings are unused.
func (u Upstream) Secure() bool { return strings.HasPrefix(strings.ToLower(u.URL), "https:") }

// DiscoverMode says how an upstream's URL becomes addresses. Each address found
// is an instance of the upstream with its own health.
type DiscoverMode string

const (
	// DiscoverOff asks the URL as it is written.
	DiscoverOff DiscoverMode = "off"
	// DiscoverDNS asks every A and AAAA address of the URL's host, at the URL's port.
	DiscoverDNS DiscoverMode = "dns"
	// DiscoverSRV asks every target of the SRV records of the URL's host, or of
	// _http._tcp.HOST or _https._tcp.HOST when the host names no service itself.
	// Priorities and weights are not used: health and load decide.
	DiscoverSRV DiscoverMode = "srv"
)

// UpstreamTLS is how an https upstream is verified. Files are read on the
// owning site's nodes.
type UpstreamTLS struct {
	CAFile             string `yaml:"ca_file,omitempty"`
	ServerName         string `yaml:"server_name,omitempty"`
	CertFile           string `yaml:"cert_file,omitempty"`
	KeyFile            string `yaml:"key_file,omitempty"`
	InsecureSkipVerify bool   `yaml:"insecure_skip_verify,omitempty"`
}

// Secret is a reference, never a value: {env: NAME} or {file: PATH}.
type Secret struct {
	Env  string `yaml:"env,omitempty"`
	File string `yaml:"file,omitempty"`
}

// IsZero reports whether there is no reference at all.
func (s Secret) IsZero() bool { return s == Secret{} }

// Model is a name that clients ask for.
type Model struct {
	Serve []Serve `yaml:"serve,omitempty"`
	// Fallbacks are names of other models, tried in order when no upstream
	// that serves this one can answer.
	Fallbacks []string `yaml:"fallbacks,omitempty"`
	Timeouts  Timeouts `yaml:"timeouts,omitempty"`
	// Revision names the weights. Answers that were kept under another are not
	// used.
	Revision string     `yaml:"revision,omitempty"`
	Cache    ModelCache `yaml:"cache,omitempty"`
}

// Serve says that an upstream serves a model, under a name of its own.
type Serve struct {
	Upstream string `yaml:"upstream"`
	Model    string `yaml:"model,omitempty"` // "": the same name
}

// Timeouts are the four timers of one request and the least pace of a stream.
// Zero means inherit (model from upstream from cluster from defaults).
type Timeouts struct {
	Connect       Duration `yaml:"connect,omitempty"`        // 2s
	FirstToken    Duration `yaml:"first_token,omitempty"`    // 120s
	BetweenTokens Duration `yaml:"between_tokens,omitempty"` // 30s
	Total         Duration `yaml:"total,omitempty"`          // 30m
	// MinTokensPerSecond ends a stream whose pace, once it has begun, stays
	// below this for ten seconds. 0: none.
	MinTokensPerSecond int `yaml:"min_tokens_per_second,omitempty"`
}

// Limits bound what one node takes in.
type Limits struct {
	BodyBytes   int64 `yaml:"body_bytes,omitempty"`   // 32 MiB
	InFlight    int   `yaml:"in_flight,omitempty"`    // 4096 requests
	Connections int   `yaml:"connections,omitempty"`  // 8192 on the api port
	HeaderBytes int   `yaml:"header_bytes,omitempty"` // 64 KiB
}

// Access says who may use the api port while no API key exists.
type Access struct {
	// Anonymous true serves everybody without a key. False, the default:
	// without any key only connections over loopback are served; with one,
	// every request needs one.
	Anonymous bool `yaml:"anonymous,omitempty"`
}

// TimingConfig is the one setting that all failure-detection times derive from.
type TimingConfig struct {
	// Heartbeat is raft's heartbeat, election and leader-lease timeout.
	// Default 800ms, made for up to 60 ms round trip.
	Heartbeat Duration `yaml:"heartbeat"`
}

// Duration is a time.Duration that reads and writes "800ms", "2s", "1h".
type Duration time.Duration

// D is the time.Duration.
func (d Duration) D() time.Duration { return time.Duration(d) }
