package config

import "time"

// Defaults of cluster.yaml.
const (
	DefaultRPOTarget      = Duration(time.Hour)
	DefaultRTOTarget      = Duration(15 * time.Minute)
	DefaultMaxConcurrency = 256
)

// DefaultLimits are the limits without a limits section.
func DefaultLimits() Limits {
	return Limits{BodyBytes: 32 << 20, InFlight: 4096, Connections: 8192, HeaderBytes: 64 << 10, TenantShare: 50}
}

func (s *Site) setDefaults() { s.RPOTarget, s.RTOTarget = DefaultRPOTarget, DefaultRTOTarget }

func (u *Upstream) setDefaults() {
	u.Kind, u.Discover, u.MaxConcurrency = KindOpenAI, DiscoverOff, DefaultMaxConcurrency
}

// Parse reads a cluster.yaml, fills in the defaults and checks all of it. The
// error is a Problems with everything that is wrong; name is the file's name in
// it.
func Parse(name string, text []byte) (*Config, error) {
	c := &Config{
		Timeouts: DefaultTimeouts(),
		Limits:   DefaultLimits(),
		Cache:    DefaultCache(),
		Jobs:     DefaultJobs(),
		Timing:   TimingConfig{Heartbeat: Duration(DefaultHeartbeat)},
	}
	src := Decode(name, text, c)
	if !src.Broken(nil) { // otherwise there is nothing to check
		v := &checker{Config: c, src: src}
		v.all()
	}
	if err := src.Err(); err != nil {
		return nil, err
	}
	c.source = src
	return c, nil
}
