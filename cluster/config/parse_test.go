package config

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"go.yaml.in/yaml/v4"
	"pgregory.net/rapid"
)

const contractSample = `version: 1
sites:
  shanghai-a: {city: shanghai, priority: 1}
  shanghai-b: {city: shanghai, priority: 2}
  beijing:    {city: beijing,  priority: 3}
upstreams:
  a-vllm: {site: shanghai-a, kind: vllm, url: "http://vllm:8000/v1", api_key: {env: VLLM_KEY}, tls: {ca_file: ca.pem}, max_concurrency: 256, discover: dns}
models:
  deepseek-chat: {serve: [{upstream: a-vllm, model: deepseek-ai/DeepSeek-V3.2}], fallbacks: []}
timeouts: {connect: 2s, first_token: 120s, between_tokens: 30s, total: 30m}
`

func mustParse(t testing.TB, text string) *Config {
	t.Helper()
	c, err := Parse("cluster.yaml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestParseFillsInDefaults(t *testing.T) {
	got := mustParse(t, "version: 1\nsites: {a: {city: x, priority: 1}}\nupstreams: {u: {site: a, url: http://h/v1}, v: {site: a, url: http://h/v1, max_concurrency: 0}}\n")
	server := Upstream{Site: "a", Kind: KindOpenAI, URL: "http://h/v1", MaxConcurrency: 256, Discover: DiscoverOff}
	want := &Config{
		Version:   1,
		Sites:     map[string]Site{"a": {City: "x", Priority: 1, RPOTarget: Duration(time.Hour), RTOTarget: Duration(15 * time.Minute)}},
		Upstreams: map[string]Upstream{"u": server, "v": server},
		Timeouts: Timeouts{
			Connect: Duration(2 * time.Second), FirstToken: Duration(2 * time.Minute),
			BetweenTokens: Duration(30 * time.Second), Total: Duration(30 * time.Minute),
		},
		Limits: Limits{BodyBytes: 32 << 20, InFlight: 4096, Connections: 8192, HeaderBytes: 64 << 10, TenantShare: 50},
		Cache: Cache{
			Enabled: true, Store: StoreDeterministic, LocalBytes: 128 << 20, LocalTTL: Duration(10 * time.Minute),
			SharedBytes: 1 << 30, SharedTTL: Duration(time.Hour), Stale: Duration(24 * time.Hour), EntryBytes: 1 << 20,
		},
		Jobs: Jobs{
			Durability: "two-sites", Concurrency: 16, MaxQueued: 100_000, MaxQueuedBytes: 1 << 30, MaxAttempts: 5,
			Retention: Duration(24 * time.Hour), ExpiresIn: Duration(24 * time.Hour),
		},
		Timing: TimingConfig{Heartbeat: Duration(800 * time.Millisecond)},
	}
	if diff := cmp.Diff(*want, *got, cmpopts.IgnoreUnexported(Config{})); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestParseReadsEveryField(t *testing.T) {
	c := mustParse(t, `
version: 1
sites: {a: {city: 上海, priority: 7, rpo_target: 10m, rto_target: 90s}}
upstreams:
  u:
    site: a
    kind: sglang
    url: https://[2001:db8::1]:443/base/v1/
    api_key: {file: /run/key}
    tls: {ca_file: ca, server_name: s, cert_file: c, key_file: k}
    max_concurrency: 3
    timeouts: {connect: 1s}
models:
  deepseek-ai/DeepSeek-V3.2: {serve: [{upstream: u}], timeouts: {total: 1h}}
  1.10: {serve: [{upstream: u, model: 模型}], fallbacks: [deepseek-ai/DeepSeek-V3.2], revision: r1, cache: {enabled: false, store: all, stale: 0s}}
cache:
  local_ttl: 1m
  shared_ttl: 2h
  local_bytes: 8388608
  shared_bytes: 16777216
  entry_bytes: 1024
  store: none
  stale: 1h
  sites: {a: {shared: redis, redis: {url: "rediss://me@h/3", password: {env: P}, tls: {ca_file: ca}}}}
jobs: {durability: site, concurrency: 2, paused: true, max_queued: 3, max_queued_bytes: 1048576, retention: 1h, max_attempts: 4, expires_in: 5m}
limits: {body_bytes: 1024, in_flight: 1, connections: 2, header_bytes: 4096, tenant_share: 20}
access: {anonymous: true}
timing: {heartbeat: 100ms}
`)
	want := Upstream{
		Site: "a", Kind: KindSGLang, URL: "https://[2001:db8::1]:443/base/v1/", APIKey: Secret{File: "/run/key"},
		TLS: UpstreamTLS{CAFile: "ca", ServerName: "s", CertFile: "c", KeyFile: "k"}, MaxConcurrency: 3, Discover: DiscoverOff,
		Timeouts: Timeouts{Connect: Duration(time.Second)},
	}
	if got := c.Upstreams["u"]; got != want {
		t.Errorf("upstream: %+v", got)
	}
	if got, want := c.Sites["a"], (Site{City: "上海", Priority: 7, RPOTarget: Duration(10 * time.Minute), RTOTarget: Duration(90 * time.Second)}); got != want {
		t.Errorf("site: %+v", got)
	}
	if got, want := c.Models["1.10"], (Model{
		Serve: []Serve{{"u", "模型"}}, Fallbacks: []string{"deepseek-ai/DeepSeek-V3.2"}, Revision: "r1",
		Cache: ModelCache{Store: StoreAll, LocalTTL: Duration(time.Minute), SharedTTL: Duration(2 * time.Hour)},
	}); !cmp.Equal(got, want) {
		t.Errorf("model: %+v", got)
	}
	wantCache := Cache{
		Enabled: true, Store: StoreNone, LocalBytes: 8 << 20, LocalTTL: Duration(time.Minute), SharedBytes: 16 << 20,
		SharedTTL: Duration(2 * time.Hour), Stale: Duration(time.Hour), EntryBytes: 1 << 10,
		Sites: map[string]SiteCache{"a": {Shared: SharedRedis, Redis: Redis{
			URL: "rediss://me@h/3", Mode: RedisSingle, Password: Secret{Env: "P"}, TLS: UpstreamTLS{CAFile: "ca"},
		}}},
	}
	if diff := cmp.Diff(wantCache, c.Cache); diff != "" {
		t.Errorf("cache (-want +got):\n%s", diff)
	}
	if c.Cache.At("b").Shared != SharedEmbedded || c.MaxAge() != 3*time.Hour {
		t.Errorf("site b has %+v, MaxAge is %s", c.Cache.At("b"), c.MaxAge())
	}
	if want := (Jobs{"site", 2, true, 3, 1 << 20, Duration(time.Hour), 4, Duration(5 * time.Minute)}); c.Jobs != want || c.Jobs.Running() != 0 {
		t.Errorf("jobs %+v, want %+v", c.Jobs, want)
	}
	if c.Limits != (Limits{1024, 1, 2, 4096, 20}) || !c.Access.Anonymous || c.Timing.Heartbeat.D() != 100*time.Millisecond {
		t.Errorf("limits %+v, access %+v, timing %+v", c.Limits, c.Access, c.Timing)
	}
}

// Each invalid file in testdata/config has a .txt file with its error message.
// Users read these messages, so a change of them must show in a review.
func TestParseReportsAllProblemsAtOnce(t *testing.T) {
	files, err := filepath.Glob("testdata/config/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("no samples: %v", err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			golden := strings.TrimSuffix(file, ".yaml") + ".txt"
			_, err = Parse("cluster.yaml", text)
			got := fmt.Sprintln(err)
			if os.Getenv("DSNODE_UPDATE_GOLDEN") != "" {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(strings.Split(string(want), "\n"), strings.Split(got, "\n")); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

// One mistake in an otherwise valid file gives exactly this message.
func TestParseRefuses(t *testing.T) {
	const head = "version: 1\nsites:\n  a: {city: x, priority: 1}\n" // lines 1 to 3
	const up = head + "upstreams:\n  u: "                            // line 5
	const model = up + "{site: a, url: http://h/v1}\nmodels:\n"      // line 7
	for _, tc := range []struct{ name, text, want string }{
		{"empty file", "", `cluster.yaml: the file is empty; start from the commented sample in deploy/`},
		{"only comments", "# hello\n---\n", `cluster.yaml: the file is empty; start from the commented sample in deploy/`},
		{"a list", "- a\n", `cluster.yaml:1: must be keys with values, not a list; write key: value lines below it`},
		{"two documents", head + "---\nversion: 1\n", `cluster.yaml:4: a second document starts here; keep one document in a file`},
		{"broken second document", head + "---\n[", "cluster.yaml:6: is not valid YAML: did not find expected node content while parsing a flow node"},
		{"tabs", "version: 1\nsites:\n\ta: x\n", `cluster.yaml:3: is not valid YAML: found character that cannot start any token while scanning for the next token; indent with spaces, not tabs`},
		{"unquoted colon", "version: 1\nsites: a: b\n", `cluster.yaml:2: is not valid YAML: mapping values are not allowed in this context; quote values that contain a colon and a space`},
		{"control character", "version: 1\nsites: \x01\n", `cluster.yaml:2: the text contains the control character 0x01; save the file as plain UTF-8 text`},
		{"not UTF-8", "version: 1\n# caf\xe9\n", `cluster.yaml:2: the text is not valid UTF-8; save the file as plain UTF-8 text`},
		{"huge file", strings.Repeat("#", MaxBytes+1), `cluster.yaml: the file has 1048577 bytes, more than the limit of 1048576; remove everything but the configuration`},
		{"deep nesting", "sites: " + strings.Repeat("[", 100) + strings.Repeat("]", 100), `cluster.yaml:1: is not valid YAML: exceeded max depth of 64 while increasing flow level`},
		{
			"alias", "version: 1\nsites:\n  a: &x {city: x, priority: 1}\n  b: *x\n",
			"cluster.yaml:3: sites.a: anchors (&x) are not supported; write the value out where it is needed\n" +
				"cluster.yaml:4: sites.b: aliases (*x) are not supported; write the value out",
		},
		{"tag", "version: 1\nsites:\n  a: {city: !!str x, priority: 1}\n", `cluster.yaml:3: sites.a.city: the tag !!str is not supported; write the value without a tag`},
		{"merge key", "version: 1\nsites:\n  a: {city: x, priority: 1, <<: {city: y}}\n", `cluster.yaml:3: sites.a: merge keys (<<) are not supported; write the values out`},
		{"list as key", "version: 1\nsites:\n  a: {city: x, priority: 1, ? [b] : c}\n", `cluster.yaml:3: sites.a: has a key that is not a plain string; write key: value`},

		{"unknown key", head + "upstream: {}\n", `cluster.yaml:4: upstream: unknown key "upstream"; did you mean "upstreams"? (allowed here: version, sites, upstreams, models, timeouts, limits, access, cache, jobs, timing)`},
		{"unknown key far from any", head + "colour: red\n", `cluster.yaml:4: colour: unknown key "colour"; allowed here: version, sites, upstreams, models, timeouts, limits, access, cache, jobs, timing`},
		{"misspelt required key", "version: 1\nsites:\n  a: {ctiy: x, priority: 1}\n", `cluster.yaml:3: sites.a.ctiy: unknown key "ctiy"; did you mean "city"? (allowed here: city, priority, rpo_target, rto_target)`},
		{"duplicate key", head + "  a: {city: y, priority: 2}\n", `cluster.yaml:4: sites.a: the key "a" is already on line 3; keep one of them`},
		{"duplicate key at the top", head + "version: 1\n", `cluster.yaml:4: version: the key "version" is already on line 1; keep one of them`},

		{"no version", "sites: {a: {city: x, priority: 1}}\n", `cluster.yaml:1: version: is missing; write version: 1`},
		{"version 2", "version: 2\nsites: {a: {city: x, priority: 1}}\n", `cluster.yaml:1: version: version 2 is not supported; write version: 1`},
		{"version as text", "version: '1'\nsites: {a: {city: x, priority: 1}}\n", `cluster.yaml:1: version: must be a number, not text; write 1 without quotes`},
		{"no sites", "version: 1\n", `cluster.yaml:1: sites: is missing; write at least one, such as shanghai-a: {city: shanghai, priority: 1}`},
		{"empty sites", "version: 1\n\nsites:\n", `cluster.yaml:3: sites: is empty; write at least one, such as shanghai-a: {city: shanghai, priority: 1}`},
		{"sites is a word", "version: 1\nsites: a\n", `cluster.yaml:2: sites: must be keys with values, not "a"; write key: value lines below it`},
		{"site's name", "version: 1\nsites: {Shanghai_A: {city: x, priority: 1}}\n", `cluster.yaml:2: sites.Shanghai_A: "Shanghai_A" cannot be a site's name; write up to 63 lower-case letters, digits and dashes, no dash first or last`},
		{"no city", "version: 1\nsites:\n  a: {priority: 1}\n", `cluster.yaml:3: sites.a.city: is missing; write the city's name: a site is replaced first by one of the same city`},
		{"city without a value", "version: 1\nsites:\n  a:\n    priority: 1\n    city:\n", `cluster.yaml:5: sites.a.city: has no value; write one, or remove the key for the default`},
		{"empty city", "version: 1\nsites:\n  a:\n    priority: 1\n    city: ''\n", `cluster.yaml:5: sites.a.city: is empty; write the city's name: a site is replaced first by one of the same city`},
		{"city with a line break", "version: 1\nsites:\n  a: {city: \"x\\ny\", priority: 1}\n", `cluster.yaml:3: sites.a.city: "x\ny" cannot be a city; write a name of up to 64 printable characters`},
		{"no priority", "version: 1\nsites:\n  a: {city: x}\n", `cluster.yaml:3: sites.a.priority: is missing; write priority: 1 for the first choice as primary, then 2, 3 …`},
		{"priority 0", "version: 1\nsites:\n  a: {city: x, priority: 0}\n", `cluster.yaml:3: sites.a.priority: priority 0 is out of range; write a number from 1 (first) to 1000`},
		{"same priority", head + "  b:\n    city: y\n    priority: 1\n", `cluster.yaml:6: sites.b.priority: site a already has priority 1; give each site its own priority`},
		{"zero RPO target", "version: 1\nsites:\n  a: {city: x, priority: 1, rpo_target: 0s}\n", `cluster.yaml:3: sites.a.rpo_target: 0s is out of range; write a time from 1s to 720h`},

		{"upstream's name", head + "upstreams:\n  -u: {site: a, url: http://h}\n", `cluster.yaml:5: upstreams.-u: "-u" cannot be an upstream's name; write up to 63 lower-case letters, digits and dashes, no dash first or last`},
		{"no site", up + "{url: http://h}\n", `cluster.yaml:5: upstreams.u.site: is missing; write the site whose nodes reach it: one of a`},
		{
			"unknown site", "version: 1\nsites:\n  shanghai-a: {city: x, priority: 1}\n  beijing: {city: x, priority: 2}\nupstreams:\n  a-vllm:\n    site: shangai\n    url: http://h\n",
			`cluster.yaml:7: upstreams.a-vllm.site: there is no site "shangai"; did you mean "shanghai-a"?`,
		},
		{"unknown site, far", up + "{site: london, url: http://h}\n", `cluster.yaml:5: upstreams.u.site: there is no site "london"; write one of a`},
		{"kind", up + "{site: a, url: http://h, kind: vlm}\n", `cluster.yaml:5: upstreams.u.kind: unknown kind "vlm"; did you mean "vllm"?`},
		{"kind, far", up + "{site: a, url: http://h, kind: tgi}\n", `cluster.yaml:5: upstreams.u.kind: unknown kind "tgi"; write one of vllm, sglang, llamacpp, ollama, deepseek, openai`},
		{"no url", up + "{site: a}\n", `cluster.yaml:5: upstreams.u.url: is missing; write a URL such as http://vllm:8000/v1`},
		{"url without a scheme", up + "{site: a, url: 'vllm:8000/v1'}\n", `cluster.yaml:5: upstreams.u.url: the URL's scheme is not http or https; write a URL such as http://vllm:8000/v1`},
		{"url with a bad escape", up + "{site: a, url: 'http://h/%zz'}\n", `cluster.yaml:5: upstreams.u.url: is not a URL; write a URL such as http://vllm:8000/v1`},
		{"url without a host", up + "{site: a, url: 'http:///v1'}\n", `cluster.yaml:5: upstreams.u.url: the URL has no host; write a URL such as http://vllm:8000/v1`},
		{"url with a password", up + "{site: a, url: 'http://me:hunter2@h/v1'}\n", `cluster.yaml:5: upstreams.u.url: the URL contains a user or password; remove it and write api_key: {env: NAME}`},
		{"url with a query", up + "{site: a, url: 'http://h/v1?key=hunter2'}\n", `cluster.yaml:5: upstreams.u.url: the URL has a query; remove what follows the ?`},
		{"url with a fragment", up + "{site: a, url: 'http://h/v1#x'}\n", `cluster.yaml:5: upstreams.u.url: the URL has a fragment; remove what follows the #`},
		{"url with port 0", up + "{site: a, url: 'http://h:0/v1'}\n", `cluster.yaml:5: upstreams.u.url: the URL's port is invalid; write a port from 1 to 65535, or none`},
		{"url with port 70000", up + "{site: a, url: 'http://h:70000/v1'}\n", `cluster.yaml:5: upstreams.u.url: the URL's port is invalid; write a port from 1 to 65535, or none`},
		{"url with an empty port", up + "{site: a, url: 'http://h:/v1'}\n", `cluster.yaml:5: upstreams.u.url: the URL's port is invalid; write a port from 1 to 65535, or none`},
		{"url of an endpoint", up + "{site: a, url: 'http://h/v1/chat/completions'}\n", `cluster.yaml:5: upstreams.u.url: the URL is that of one endpoint, not the base URL of all endpoints; end it before /chat/completions, as OpenAI's clients do: http://vllm:8000/v1`},
		{"half a client certificate", up + "{site: a, url: 'https://h/v1', tls: {cert_file: x}}\n", `cluster.yaml:5: upstreams.u.tls: cert_file and key_file must be set together; write both, or none`},
		{
			"contradicting TLS verification", up + "{site: a, url: 'https://h/v1', tls: {ca_file: x, insecure_skip_verify: true}}\n",
			`cluster.yaml:5: upstreams.u.tls.insecure_skip_verify: contradicts ca_file and server_name: nothing would be verified; keep ca_file and server_name, and remove insecure_skip_verify`,
		},
		{"yes for true", up + "{site: a, url: 'https://h/v1', tls: {insecure_skip_verify: yes}}\n", `cluster.yaml:5: upstreams.u.tls.insecure_skip_verify: must be true or false, not "yes"; write it without quotes`},
		{"literal secret", up + "{site: a, url: http://h, api_key: sk-hunter2}\n", `cluster.yaml:5: upstreams.u.api_key: must be a reference to a secret; write {env: NAME} or {file: PATH}`},
		{"literal secret as a key", up + "{site: a, url: http://h, api_key: {sk-hunter2}}\n", `cluster.yaml:5: upstreams.u.api_key: must be a reference to a secret with the key env or file; write {env: NAME} or {file: PATH}`},
		{
			"literal secret as a variable", up + "{site: a, url: http://h, api_key: {env: sk-hunter2}}\n",
			`cluster.yaml:5: upstreams.u.api_key: env is not the name of an environment variable; write letters, digits and underscores, such as {env: VLLM_KEY}; do not write the secret itself here`,
		},
		{"secret without a value", up + "{site: a, url: http://h, api_key: }\n", `cluster.yaml:5: upstreams.u.api_key: has no value; write one, or remove the key for the default`},
		{"empty secret", up + "{site: a, url: http://h, api_key: {}}\n", `cluster.yaml:5: upstreams.u.api_key: has neither env nor file; write {env: NAME} or {file: PATH}`},
		{"two secrets", up + "{site: a, url: http://h, api_key: {env: A, file: b}}\n", `cluster.yaml:5: upstreams.u.api_key: has both env and file; write {env: NAME} or {file: PATH}, not both`},
		{"negative concurrency", up + "{site: a, url: http://h, max_concurrency: -1}\n", `cluster.yaml:5: upstreams.u.max_concurrency: -1 is out of range; write a number from 1 to 65536, or 0 for the default of 256`},
		{"concurrency in words", up + "{site: a, url: http://h, max_concurrency: 1k}\n", `cluster.yaml:5: upstreams.u.max_concurrency: must be a whole number, not "1k"; write only digits, without a unit or separators`},
		{"octal concurrency", up + "{site: a, url: http://h, max_concurrency: 010}\n", `cluster.yaml:5: upstreams.u.max_concurrency: must be a whole number, not "010"; write only digits, without a unit or separators`},
		{"enormous concurrency", up + "{site: a, url: http://h, max_concurrency: 99999999999999999999}\n", `cluster.yaml:5: upstreams.u.max_concurrency: "99999999999999999999" is too large`},
		{"discover srv with a port", up + "{site: a, url: 'http://h:8000', discover: srv}\n", `cluster.yaml:5: upstreams.u.url: the URL has a port, but with discover: srv the ports come from the SRV records; remove the port`},
		{"discover yes", up + "{site: a, url: http://h, discover: yes}\n", `cluster.yaml:5: upstreams.u.discover: "yes" is not a discovery mode; write one of off, dns, srv`},
		{"negative min_tokens_per_second", up + "{site: a, url: http://h, timeouts: {min_tokens_per_second: -1}}\n", `cluster.yaml:5: upstreams.u.timeouts.min_tokens_per_second: -1 is out of range; write a number from 1 to 10000, or remove the key`},

		{"model's name", model + "  '': {serve: [{upstream: u}]}\n", `cluster.yaml:7: models: has a key that is not a plain string; write key: value`},
		{"model's name with a line end", model + "  \"a\\nb\": {serve: [{upstream: u}]}\n", `cluster.yaml:7: models."a\nb": "a\nb" cannot be a model's name; write 1 to 256 printable characters`},
		{
			"model's long name", model + "  ? " + strings.Repeat("m", 257) + "\n  : {serve: [{upstream: u}]}\n",
			`cluster.yaml:7: models."` + strings.Repeat("m", 64) + `…": "` + strings.Repeat("m", 64) + `…" cannot be a model's name; write 1 to 256 printable characters`,
		},
		{"no serve", model + "  m: {}\n", `cluster.yaml:7: models.m.serve: is missing; write at least one, such as serve: [{upstream: u}]`},
		{"empty serve", model + "  m:\n    fallbacks: []\n    serve: []\n", `cluster.yaml:9: models.m.serve: is empty; write at least one, such as serve: [{upstream: u}]`},
		{"serve is no list", model + "  m: {serve: {upstream: u}}\n", `cluster.yaml:7: models.m.serve: must be a list, not keys with values; write - before each entry, or [a, b]`},
		{"serve is a word", model + "  m: {serve: [u]}\n", `cluster.yaml:7: models.m.serve[0]: must be keys with values, not "u"; write key: value lines below it`},
		{"serve without an upstream", model + "  m:\n    serve:\n      - {upstream: u}\n      - {model: x}\n", `cluster.yaml:10: models.m.serve[1].upstream: is missing; write one of u`},
		{"unknown upstream", model + "  gpt-4.1:\n    serve:\n      - upstream: v\n", `cluster.yaml:9: models."gpt-4.1".serve[0].upstream: there is no upstream "v"; write one of u`},
		{"no upstreams at all", head + "models: {m: {serve: [{upstream: v}]}}\n", `cluster.yaml:4: models.m.serve[0].upstream: there is no upstream "v"; add it under upstreams`},
		{"same serve twice", model + "  m: {serve: [{upstream: u}, {upstream: u}]}\n", `cluster.yaml:7: models.m.serve[1]: is listed twice; remove it`},
		{
			"unknown fallback", model + "  m: {serve: [{upstream: u}], fallbacks: [deepseek]}\n  deep-seek: {serve: [{upstream: u}]}\n",
			`cluster.yaml:7: models.m.fallbacks[0]: there is no model "deepseek"; did you mean "deep-seek"?`,
		},
		{"model as its own fallback", model + "  m: {serve: [{upstream: u}], fallbacks: [m]}\n", `cluster.yaml:7: models.m.fallbacks[0]: a model cannot be its own fallback; remove it`},
		{"fallback twice", model + "  m: {serve: [{upstream: u}], fallbacks: [n, n]}\n  n: {serve: [{upstream: u}]}\n", `cluster.yaml:7: models.m.fallbacks[1]: "n" is listed twice; remove it`},
		{"empty fallback", model + "  m: {serve: [{upstream: u}], fallbacks: [~]}\n", `cluster.yaml:7: models.m.fallbacks[0]: is an empty entry; write a value or remove it`},
		{
			"cycle of fallbacks", model + "  a: {serve: [{upstream: u}], fallbacks: [b]}\n  b: {serve: [{upstream: u}], fallbacks: [c]}\n  c: {serve: [{upstream: u}], fallbacks: [a]}\n",
			`cluster.yaml:9: models.c.fallbacks[0]: the fallbacks form a cycle: a → b → c → a; remove one of these fallbacks`,
		},

		{"duration without a unit", head + "timeouts: {connect: 2}\n", `cluster.yaml:4: timeouts.connect: not a duration: "2" has no unit; write 2s or 2ms`},
		{"duration in days", head + "timeouts: {total: 1d}\n", `cluster.yaml:4: timeouts.total: not a duration: "1d": there is no unit for days; write hours, such as 24h`},
		{"duration in words", head + "timeouts: {total: soon}\n", `cluster.yaml:4: timeouts.total: not a duration: "soon"; write a number with a unit, such as 800ms, 2s, 30m or 1h30m`},
		{"negative duration", head + "timeouts: {total: -1s}\n", `cluster.yaml:4: timeouts.total: not a duration: "-1s" is negative`},
		{"duration as a list", head + "timeouts: {total: [1s]}\n", `cluster.yaml:4: timeouts.total: must be one value, not a list`},
		{"zero timeout", head + "timeouts: {total: 0s}\n", `cluster.yaml:4: timeouts.total: must be more than zero; write a time, or remove the key to inherit one`},
		{"long timeout", head + "timeouts: {total: 25h}\n", `cluster.yaml:4: timeouts.total: 25h is out of range; write at most 24h`},
		{"total below the default first token", head + "timeouts: {total: 1m}\n", `cluster.yaml:4: timeouts.total: first_token (2m, not set here) must not exceed total (1m); lower first_token or raise total`},
		{"connect above first token", head + "timeouts: {connect: 3s, first_token: 2s}\n", `cluster.yaml:4: timeouts.connect: connect (3s) must not exceed first_token (2s); lower connect or raise first_token`},
		{"between above total", head + "timeouts: {first_token: 10s, total: 20s}\n", `cluster.yaml:4: timeouts.total: between_tokens (30s, not set here) must not exceed total (20s); lower between_tokens or raise total`},
		{"upstream's timeouts after inheritance", up + "\n    site: a\n    url: http://h\n    timeouts:\n      first_token: 1s\n", `cluster.yaml:9: upstreams.u.timeouts.first_token: connect (2s, not set here) must not exceed first_token (1s); lower connect or raise first_token`},
		{
			"model's timeouts after inheritance", up + "{site: a, url: http://h, timeouts: {between_tokens: 10m}}\nmodels:\n  m: {serve: [{upstream: u}], timeouts: {total: 5m}}\n",
			`cluster.yaml:7: models.m.timeouts.total: between_tokens (10m, not set here) must not exceed total (5m); lower between_tokens or raise total`,
		},
		{"model's zero timeout", model + "  m: {serve: [{upstream: u}], timeouts: {total: 0s}}\n", `cluster.yaml:7: models.m.timeouts.total: must be more than zero; write a time, or remove the key to inherit one`},

		{"zero body_bytes", head + "limits: {body_bytes: 0}\n", `cluster.yaml:4: limits.body_bytes: 0 is out of range; write a number from 1024 to 1073741824`},
		{"body in MiB", head + "limits: {body_bytes: 32MiB}\n", `cluster.yaml:4: limits.body_bytes: must be a whole number, not "32MiB"; write only digits, without a unit or separators`},
		{"zero in_flight", head + "limits: {in_flight: 0}\n", `cluster.yaml:4: limits.in_flight: 0 is out of range; write a number from 1 to 1048576`},
		{"zero connections", head + "limits: {connections: 0}\n", `cluster.yaml:4: limits.connections: 0 is out of range; write a number from 1 to 1048576`},
		{"no share for a tenant", head + "limits: {tenant_share: 0}\n", `cluster.yaml:4: limits.tenant_share: 0 is out of range; write a number from 1 to 100`},
		{"small headers", head + "limits: {header_bytes: 100}\n", `cluster.yaml:4: limits.header_bytes: 100 is out of range; write a number from 4096 to 1048576`},
		{"local_ttl above shared_ttl", head + "cache: {local_ttl: 2h}\n", `cluster.yaml:4: cache.local_ttl: local_ttl (2h) must not exceed shared_ttl (1h); lower local_ttl or raise shared_ttl`},
		{"job durability", head + "jobs: {durability: two-site}\n", `cluster.yaml:4: jobs.durability: "two-site" is not a durability; did you mean "two-sites"?`},
		{"stale_for shorter than an election", head + "access: {stale_for: 5s}\n", `cluster.yaml:4: access.stale_for: 5s is out of range; write a time from 10s to 720h, or 0s for no limit`},
		{"zero job concurrency", head + "jobs: {concurrency: 0}\n", `cluster.yaml:4: jobs.concurrency: 0 is out of range; write a number from 1 to 4096`},
		{"too many jobs", head + "jobs: {max_queued: 2000000}\n", `cluster.yaml:4: jobs.max_queued: 2000000 is out of range; write a number from 1 to 1000000`},
		{"small max_queued_bytes", head + "jobs: {max_queued_bytes: 1}\n", `cluster.yaml:4: jobs.max_queued_bytes: 1 is out of range; write a number from 1048576 to 1099511627776`},
		{"zero max_attempts", head + "jobs: {max_attempts: 0}\n", `cluster.yaml:4: jobs.max_attempts: 0 is out of range; write a number from 1 to 100`},
		{"short retention", head + "jobs: {retention: 1s}\n", `cluster.yaml:4: jobs.retention: 1s is out of range; write a time from 1m to 720h`},
		{"long expires_in", head + "jobs: {expires_in: 200h}\n", `cluster.yaml:4: jobs.expires_in: 200h is out of range; write a time from 1s to 168h`},
		{"unknown key of jobs", head + "jobs: {concurency: 4}\n", `cluster.yaml:4: jobs.concurency: unknown key "concurency"; did you mean "concurrency"? (allowed here: durability, concurrency, paused, max_queued, max_queued_bytes, retention, max_attempts, expires_in)`},
		{"cache policy", head + "cache: {store: determinstic}\n", `cluster.yaml:4: cache.store: "determinstic" is not a store policy; did you mean "deterministic"?`},
		{"small cache", head + "cache: {local_bytes: 1000}\n", `cluster.yaml:4: cache.local_bytes: 1000 is out of range; write a number of bytes from 1048576 to 1099511627776`},
		{"large entries", head + "cache: {local_bytes: 1048576}\n", `cluster.yaml:4: cache.entry_bytes: entry_bytes (1048576) must not exceed a quarter of local_bytes (1048576); lower entry_bytes or raise local_bytes`},
		{"long stale", head + "cache: {stale: 1000h}\n", `cluster.yaml:4: cache.stale: 1000h is out of range; write a time from 0s to 720h`},
		{"model's shared_ttl below the inherited local_ttl", model + "  m: {serve: [{upstream: u}], cache: {shared_ttl: 1m}}\n", `cluster.yaml:7: models.m.cache.shared_ttl: local_ttl (10m) must not exceed shared_ttl (1m); lower local_ttl or raise shared_ttl`},
		{"cache of an unknown site", head + "cache: {sites: {b: {}}}\n", `cluster.yaml:4: cache.sites.b: there is no site "b"; write one of a`},
		{"unknown shared tier", head + "cache: {sites: {a: {shared: reddis}}}\n", `cluster.yaml:4: cache.sites.a.shared: "reddis" is not a kind of shared tier; did you mean "redis"?`},
		{"redis without a url", head + "cache: {sites: {a: {shared: redis}}}\n", `cluster.yaml:4: cache.sites.a.redis.url: is missing; write a URL such as redis://cache:6379/0 or rediss://cache:6379?addr=cache-2:6379`},
		{"redis with a password", head + "cache: {sites: {a: {shared: redis, redis: {url: 'redis://:hunter2@h'}}}}\n", `cluster.yaml:4: cache.sites.a.redis.url: the URL contains a password: remove it and write password: {env: NAME}; write a URL such as redis://cache:6379/0 or rediss://cache:6379?addr=cache-2:6379`},
		{"redis by http", head + "cache: {sites: {a: {shared: redis, redis: {url: 'http://h'}}}}\n", `cluster.yaml:4: cache.sites.a.redis.url: the URL's scheme is not redis or rediss; write a URL such as redis://cache:6379/0 or rediss://cache:6379?addr=cache-2:6379`},
		{"several addresses for a single redis", head + "cache: {sites: {a: {shared: redis, redis: {url: 'redis://h?addr=g:1'}}}}\n", `cluster.yaml:4: cache.sites.a.redis.url: the URL names several addresses, which are for mode: cluster or mode: sentinel; write a URL such as redis://cache:6379/0 or rediss://cache:6379?addr=cache-2:6379`},
		{"sentinels without a master", head + "cache: {sites: {a: {shared: redis, redis: {url: 'redis://h', mode: sentinel}}}}\n", `cluster.yaml:4: cache.sites.a.redis.master: is missing; write the master's name in the sentinels' configuration, such as mymaster`},
		{"a sentinel's password without sentinels", head + "cache: {sites: {a: {shared: redis, redis: {url: 'redis://h', sentinel_password: {env: S}}}}}\n", `cluster.yaml:4: cache.sites.a.redis.sentinel_password: sentinel_password is used only with sentinels; remove it, or write mode: sentinel`},
		{"a sentinel's user without sentinels", head + "cache: {sites: {a: {shared: redis, redis: {url: 'redis://h', sentinel_user: u}}}}\n", `cluster.yaml:4: cache.sites.a.redis.sentinel_user: sentinel_user is used only with sentinels; remove it, or write mode: sentinel`},
		{"a sentinel's user without a password", head + "cache: {sites: {a: {shared: redis, redis: {url: 'redis://h', mode: sentinel, master: m, sentinel_user: u}}}}\n", `cluster.yaml:4: cache.sites.a.redis.sentinel_password: is missing; write sentinel_password: {env: NAME}, or remove sentinel_user`},
		{"a sentinel's password in clear", head + "cache: {sites: {a: {shared: redis, redis: {url: 'redis://h', mode: sentinel, master: m, sentinel_password: {env: 's3cret!'}}}}}\n", `cluster.yaml:4: cache.sites.a.redis.sentinel_password: env is not the name of an environment variable; write letters, digits and underscores, such as {env: VLLM_KEY}; do not write the secret itself here`},
		{"redis beside another tier", head + "cache: {sites: {a: {shared: embedded, redis: {url: 'redis://h'}}}}\n", `cluster.yaml:4: cache.sites.a.redis: redis is configured, but the shared tier is embedded; write shared: redis, or remove redis`},
		{"revision", model + "  m: {serve: [{upstream: u}], revision: \"a\\nb\"}\n", `cluster.yaml:7: models.m.revision: "a\nb" cannot be a revision; write up to 256 printable characters`},
		{"fast heartbeat", head + "timing: {heartbeat: 99ms}\n", `cluster.yaml:4: timing.heartbeat: 99ms is out of range; write a time from 100ms to 10s`},
		{"slow heartbeat", head + "timing: {heartbeat: 11s}\n", `cluster.yaml:4: timing.heartbeat: 11s is out of range; write a time from 100ms to 10s`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, err := Parse("cluster.yaml", []byte(tc.text))
			if err == nil {
				t.Fatalf("accepted: %+v", c)
			}
			if got := err.Error(); got != tc.want {
				t.Errorf("\n got %s\nwant %s", got, tc.want)
			}
			var ps Problems
			if !errors.As(err, &ps) || c != nil {
				t.Errorf("the error is a %T, the config %v", err, c)
			}
		})
	}
}

func TestParseBoundsTheNumberOfEntries(t *testing.T) {
	many := func(n int, format string) string {
		var b strings.Builder
		for i := range n {
			fmt.Fprintf(&b, format, i, i+1)
		}
		return b.String()
	}
	head := "version: 1\nsites: {a: {city: x, priority: 1}}\n"
	for _, tc := range []struct{ text, want string }{
		{"version: 1\nsites:\n" + many(17, "  s%d: {city: x, priority: %d}\n"), "sites: has 17 entries, more than the limit of 16"},
		{head + "upstreams:\n" + many(1025, "  u%d: {site: a, url: http://h%d}\n"), "upstreams: has 1025 entries, more than the limit of 1024"},
		{head + "upstreams: {u: {site: a, url: http://h}}\nmodels:\n" + many(1025, "  m%d: {serve: [{upstream: u, model: m%d}]}\n"), "models: has 1025 entries, more than the limit of 1024"},
		{head + "upstreams: {u: {site: a, url: http://h}}\nmodels:\n  m:\n    serve:\n" + many(65, "      - {upstream: u, model: m%d-%d}\n"), "models.m.serve: has 65 entries, more than the limit of 64"},
	} {
		_, err := Parse("", []byte(tc.text))
		if err == nil || !strings.Contains(err.Error(), tc.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("got %v, want %s", err, tc.want)
		}
	}

	_, err := Parse("f", []byte(head+many(150, "x%d: %d\n")))
	var ps Problems
	if !errors.As(err, &ps) || len(ps) != maxProblems+1 || ps[maxProblems].String() != "f: 50 more problems are not shown; correct these first" {
		t.Errorf("150 unknown keys: %d problems, the last is %v", len(ps), ps[len(ps)-1])
	}
}

// Every node parses the agreed text when it arrives. No text within MaxBytes may
// take long to parse.
func TestParseTimeIsBounded(t *testing.T) {
	// An eighth of MaxBytes, because the race detector slows parsing down.
	const size = MaxBytes / 8
	fill := func(head, format string) string {
		var b strings.Builder
		b.WriteString(head)
		for i := 0; ; i++ {
			line := fmt.Sprintf(format, i)
			if b.Len()+len(line) > size {
				return b.String()
			}
			b.WriteString(line)
		}
	}
	head := "version: 1\nsites: {a: {city: x, priority: 1}}\nupstreams: {u: {site: a, url: http://h}}\n"
	for name, text := range map[string]string{
		"unknown keys":      fill(head, "k%d: 1\n"),
		"duplicate keys":    fill(head, "version: %d\n"),
		"sites":             fill("version: 1\nsites:\n", "  s%d: {}\n"),
		"upstreams":         fill("version: 1\nupstreams:\n", "  u%d:\n"),
		"models":            fill(head+"models:\n", "  m%d:\n"),
		"serve":             fill(head+"models:\n  m:\n    serve:\n", "    - {upstream: %d}\n"),
		"unknown upstreams": fill(head+"models:\n", "  m%d: {serve: [{upstream: upstream-a}, {upstream: upstream-b}]}\n")[:size/4],
		"fallbacks":         fill(head+"models:\n  m:\n    serve: [{upstream: u}]\n    fallbacks:\n", "    - f%d\n"),
		"list":              fill("", "- %d\n"),
		"flow":              "sites: [" + fill("", "[%d],")[:size/2] + "]",
		"one word":          "version: " + strings.Repeat("1", size-100),
		"one key":           "? " + strings.Repeat("k", size-100) + "\n: 1\n",
		"spaces":            strings.Repeat(" ", size-100) + "a: 1",
		"line ends":         strings.Repeat("\n", size-100) + "a: 1",
		"opening":           strings.Repeat("[", size),
		"comments":          fill(head, "# %d\n"),
		"anchors":           fill(head+"models:\n", "  m%d: &x {}\n"),
	} {
		t.Run(name, func(t *testing.T) {
			start := time.Now()
			_, err := Parse("f", []byte(text))
			if d := time.Since(start); d > 5*time.Second {
				t.Errorf("took %s", d)
			}
			var ps Problems
			if err != nil && (!errors.As(err, &ps) || len(err.Error()) > 200_000) {
				t.Errorf("the error is a %T of %d bytes", err, len(err.Error()))
			}
		})
	}
}

// What users write in place of a secret's reference may be the secret itself.
func TestParseNeverRepeatsASecret(t *testing.T) {
	for _, value := range []string{"hunter2", "{hunter2}", "[hunter2]", "{env: hunter-2, hunter2: x}", "{env: 'hunter2 '}", "{hunter2: a, hunter2: b}", "{file: [hunter2]}", "|\n      hunter2\n", "&hunter2 x", "{env: &hunter2 x}", "!hunter2 x", "{env: *hunter2}", "!hunter2 {env: X}", "{env: !hunter2 X}", "{<<: hunter2}", "!!int hunter2", "!!timestamp hunter2", "*hunter2"} {
		text := "version: 1\nsites: {a: {city: x, priority: 1}}\nupstreams:\n  u:\n    site: a\n    url: http://h\n    api_key: " + value + "\n"
		_, err := Parse("c", []byte(text))
		if err == nil || strings.Contains(err.Error(), "hunter") {
			t.Errorf("%s: %v", value, err)
		}
	}
}

// sameConfig reports whether both have the same values, on whatever lines.
func sameConfig(a, b *Config) bool {
	return cmp.Equal(a, b, cmpopts.IgnoreUnexported(Config{}), cmpopts.EquateEmpty())
}

func TestParseReadsADumpedConfig(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		text := drawConfig(t)
		c, err := Parse("drawn", []byte(text))
		if err != nil {
			t.Fatalf("%v\n%s", err, text)
		}
		written, err := yaml.Dump(c)
		if err != nil {
			t.Fatal(err)
		}
		again, err := Parse("again", written)
		if err != nil {
			t.Fatalf("%v\n%s", err, written)
		}
		if !sameConfig(again, c) {
			t.Fatalf("parsed\n%s\nwritten as\n%s", text, written)
		}
	})
}

// drawConfig writes a valid cluster.yaml with a random choice of settings.
func drawConfig(t *rapid.T) string {
	var b strings.Builder
	maybe := func(label, format string, args ...any) {
		if rapid.Bool().Draw(t, label) {
			fmt.Fprintf(&b, format, args...)
		}
	}
	number := func(label string, from, to int) int { return rapid.IntRange(from, to).Draw(t, label) }
	b.WriteString("version: 1\nsites:\n")
	sites := number("sites", 1, MaxSites)
	for i := range sites {
		fmt.Fprintf(&b, "  s%d:\n    city: %q\n    priority: %d\n", i, rapid.SampledFrom([]string{"x", "北京", "a b", "yes", "12"}).Draw(t, "city"), i+1)
		maybe("rpo", "    rpo_target: %ds\n", number("rpo seconds", 1, 9999))
	}
	upstreams := number("upstreams", 1, 4)
	b.WriteString("upstreams:\n")
	for i := range upstreams {
		fmt.Fprintf(&b, "  u%d:\n    site: s%d\n    url: https://h%d:%d/v1\n", i, number("site", 0, sites-1), i, number("port", 1, 65535))
		maybe("kind", "    kind: %s\n", rapid.SampledFrom([]string{"vllm", "ollama", "openai"}).Draw(t, "kind"))
		maybe("key", "    api_key: {%s: NAME}\n", rapid.SampledFrom([]string{"env", "file"}).Draw(t, "ref"))
		maybe("tls", "    tls: {ca_file: %q}\n", rapid.SampledFrom([]string{"ca.pem", "null", "a: b", "~", "é"}).Draw(t, "ca"))
		maybe("concurrency", "    max_concurrency: %d\n", number("max", 0, 65536))
		maybe("discover", "    discover: %s\n", rapid.SampledFrom([]string{"off", "dns"}).Draw(t, "how"))
		maybe("timeouts", "    timeouts: {connect: %dms, total: 24h}\n", number("connect", 1, 9999))
	}
	b.WriteString("models:\n")
	models := number("models", 1, 4)
	for i := range models {
		fmt.Fprintf(&b, "  %q:\n    serve: [{upstream: u%d}]\n", fmt.Sprintf("org/m.%d", i), number("upstream", 0, upstreams-1))
		if i > 0 {
			maybe("fallbacks", "    fallbacks: [org/m.%d]\n", number("fallback", 0, i-1))
		}
		maybe("revision", "    revision: r%d\n", i)
		maybe("model cache", "    cache: {enabled: %t, stale: %dm}\n", rapid.Bool().Draw(t, "enabled"), number("stale", 0, 60))
		maybe("model timeouts", "    timeouts: {first_token: %dm}\n", number("first", 1, 30))
	}
	maybe("limits", "limits: {in_flight: %d}\n", number("in flight", 1, 9999))
	if rapid.Bool().Draw(t, "cache") {
		fmt.Fprintf(&b, "cache:\n  enabled: %t\n", rapid.Bool().Draw(t, "cache enabled"))
		maybe("ttl", "  shared_ttl: %dh\n", number("hours", 1, 100))
		maybe("no stale", "  stale: 0s\n")
		maybe("where", "  sites: {s0: {shared: %s}}\n", rapid.SampledFrom([]string{"off", "embedded", "redis, redis: {url: 'redis://h:1/2'}"}).Draw(t, "tier"))
	}
	maybe("access", "access: {anonymous: %t}\n", rapid.Bool().Draw(t, "anonymous"))
	maybe("timing", "timing: {heartbeat: %dms}\n", number("heartbeat", 100, 10000))
	return b.String()
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(contractSample))
	f.Add([]byte("version: 1\nsites: {a: &x {city: x, priority: 1}, b: *x}\n"))
	f.Add([]byte("? [a]\n: {b: c}\n---\n- 1\n"))
	f.Add([]byte("version: 1\nsites: {a: {city: x, priority: 1}}\nmodels: {m: {serve: [~], fallbacks: [m]}}\ntimeouts: {total: 1}\n"))
	files, err := filepath.Glob("testdata/config/*.yaml")
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		c, err := Parse("f", text)
		if err != nil {
			var ps Problems
			if !errors.As(err, &ps) {
				t.Fatalf("%T", err)
			}
			for _, p := range ps {
				if p.Message == "" || p.Line < 0 || p.Line > len(text)+1 || strings.Contains(p.String(), "\n") {
					t.Fatalf("%+v", p)
				}
			}
			return
		}
		written, err := yaml.Dump(c)
		if err != nil {
			t.Fatal(err)
		}
		if again, err := Parse("again", written); err != nil || !sameConfig(again, c) {
			t.Fatalf("%v\nparsed\n%s\nwritten as\n%s", err, text, written)
		}
	})
}
