package node

import (
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"

	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/cluster/mesh"
)

// good is a minimal node.yaml, on lines 1 to 8.
const good = `version: 1
cluster: dev
name: a-1
site: a
gossip: {advertise: "10.0.0.5:7956", key_file: gossip.key}
rpc:
  {advertise: "10.0.0.5:7957", tls: {cert_file: node.pem, key_file: node.key, ca_file: ca.pem}}
operator_key: {file: operator.key}
`

func TestParseConfigFillsInDefaults(t *testing.T) {
	got, err := ParseConfig("node.yaml", []byte(good), "/etc/dsnode")
	if err != nil {
		t.Fatal(err)
	}
	want := Config{
		Version: 1, Cluster: "dev", Name: "a-1", Site: "a", DataDir: "/var/lib/dsnode",
		API:    APIConfig{Bind: "0.0.0.0:8080", Advertise: "10.0.0.5:8080"},
		Admin:  AdminConfig{Bind: "127.0.0.1:8081", Advertise: "127.0.0.1:8081"},
		Gossip: GossipConfig{Bind: "0.0.0.0:7956", Advertise: "10.0.0.5:7956", KeyFile: "/etc/dsnode/gossip.key"},
		RPC: RPCConfig{Bind: "0.0.0.0:7957", Advertise: "10.0.0.5:7957", TLS: PeerTLS{
			CertFile: "/etc/dsnode/node.pem", KeyFile: "/etc/dsnode/node.key", CAFile: "/etc/dsnode/ca.pem",
		}},
		OperatorKey: config.Secret{File: "/etc/dsnode/operator.key"},
		Shutdown:    ShutdownConfig{Grace: config.Duration(30 * time.Second)},
		Log:         LogConfig{Level: "info"},
	}
	if diff := cmp.Diff(want, *got, cmpopts.IgnoreUnexported(Config{})); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if got.Path("ca.pem") != "/etc/dsnode/ca.pem" || got.Path("/x/../ca.pem") != "/ca.pem" {
		t.Errorf("paths: %s, %s", got.Path("ca.pem"), got.Path("/x/../ca.pem"))
	}
}

func TestAdvertiseFollowsBind(t *testing.T) {
	const gossipAndRPC = `version: 1
cluster: dev
name: a-1
site: a
operator_key: {env: KEY}
gossip: {bind: "%s", advertise: "%s", key_file: k}
rpc: {bind: "%s", advertise: "%s", tls: {cert_file: c, key_file: k, ca_file: a}}
api: {bind: "%s", advertise: "%s"}
`
	for _, tc := range []struct {
		name                         string
		gossip, gossipAs, rpc, rpcAs string
		api, apiAs                   string
		wantGossip, wantRPC, wantAPI string
	}{
		{"concrete", "10.0.0.5:1", "", "n.example:2", "", "[2001:db8::1]:3", "", "10.0.0.5:1", "n.example:2", "[2001:db8::1]:3"},
		{"free ports", "127.0.0.1:0", "", "127.0.0.1:0", "", "127.0.0.1:0", "", "127.0.0.1:0", "127.0.0.1:0", "127.0.0.1:0"},
		{"configured", "0.0.0.0:1", "h:11", ":2", "h:22", "[::]:3", "g:33", "h:11", "h:22", "g:33"},
		{"configured without a port", "0.0.0.0:1", "h:0", ":2", "h:0", "[::]:3", "g:0", "h:1", "h:2", "g:3"},
		{"api on a wildcard takes rpc's host", "0.0.0.0:1", "h:11", "[::]:2", "[2001:db8::2]:22", ":0", "", "h:11", "[2001:db8::2]:22", "[2001:db8::2]:0"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, err := ParseConfig("f", fmt.Appendf(nil, gossipAndRPC, tc.gossip, tc.gossipAs, tc.rpc, tc.rpcAs, tc.api, tc.apiAs), "/")
			if err != nil {
				t.Fatal(err)
			}
			if c.Gossip.Advertise != tc.wantGossip || c.RPC.Advertise != tc.wantRPC || c.API.Advertise != tc.wantAPI {
				t.Errorf("gossip %s, rpc %s, api %s", c.Gossip.Advertise, c.RPC.Advertise, c.API.Advertise)
			}
		})
	}
}

// One mistake in a good file gives one problem, with this text.
func TestParseConfigRefuses(t *testing.T) {
	swap := func(old, new string) string {
		if !strings.Contains(good, old) {
			t.Fatalf("the sample has no %q", old)
		}
		return strings.Replace(good, old, new, 1)
	}
	const server = "{cert_file: c, key_file: k}"
	for _, tc := range []struct{ name, text, want string }{
		{"empty", "", `node.yaml: the file is empty; start from the commented sample in deploy/`},
		{"unknown key", good + "operatorkey: {}\n", `node.yaml:9: operatorkey: unknown key "operatorkey"; did you mean "operator_key"? (allowed here: version, cluster, name, site, data_dir, api, admin, metrics, gossip, rpc, seeds, operator_key, operator_key_previous, feature_level, shutdown, log)`},
		{"unknown key inside", good + "api: {listen: ':8080'}\n", `node.yaml:9: api.listen: unknown key "listen"; allowed here: bind, advertise, tls`},
		{"duplicate key", good + "site: b\n", `node.yaml:9: site: the key "site" is already on line 4; keep one of them`},
		{"no version", swap("version: 1\n", ""), `node.yaml:1: version: is missing; write version: 1`},
		{"version", swap("version: 1", "version: 2"), `node.yaml:1: version: version 2 is not supported; write version: 1`},
		{"no cluster", swap("cluster: dev\n", ""), `node.yaml:1: cluster: is missing; write the name that the certificates were issued for`},
		{"no name", swap("name: a-1\n", ""), `node.yaml:1: name: is missing; write a name that no other node has, such as shanghai-a-1`},
		{"empty name", swap("name: a-1", "name: ''"), `node.yaml:3: name: is empty; write a name that no other node has, such as shanghai-a-1`},
		{"no site", swap("site: a\n", ""), `node.yaml:1: site: is missing; write the site's name in cluster.yaml`},
		{"name", swap("name: a-1", "name: A_1"), `node.yaml:3: name: "A_1" cannot be a name; write up to 63 lower-case letters, digits and dashes, no dash first or last`},
		{"no data directory", good + "data_dir: ''\n", `node.yaml:9: data_dir: is empty; write the directory for the node's files`},
		{"gossip on a wildcard", swap(`advertise: "10.0.0.5:7956", `, ""), `node.yaml:5: gossip.advertise: is missing, and other nodes can't dial bind 0.0.0.0:7956; write the address under which other nodes reach this one, such as advertise: 10.0.0.5:7956`},
		{"rpc on a wildcard", swap(`advertise: "10.0.0.5:7957"`, `bind: ":7957"`), `node.yaml:6: rpc.advertise: is missing, and other nodes can't dial bind :7957; write the address under which other nodes reach this one, such as advertise: 10.0.0.5:7957`},
		{"advertised wildcard", swap("10.0.0.5:7957", "[::]:7957"), `node.yaml:7: rpc.advertise: other nodes can't dial "[::]:7957"; write a host that other nodes can dial`},
		{"advertise without a port", swap("10.0.0.5:7957", "10.0.0.5"), `node.yaml:7: rpc.advertise: "10.0.0.5" is not an address; write host:port, such as 10.0.0.5:8080 or node1.example.org:8080`},
		{"bind without a port", good + "api: {bind: 0.0.0.0}\n", `node.yaml:9: api.bind: "0.0.0.0" is not an address; write host:port, such as 0.0.0.0:8080 or [::1]:8080`},
		{"bind is a port", good + "api: {bind: 8080}\n", `node.yaml:9: api.bind: "8080" is not an address; write host:port, such as 0.0.0.0:8080 or [::1]:8080`},
		{"bind to port 70000", good + "metrics: {bind: ':70000'}\n", `node.yaml:9: metrics.bind: ":70000" is not an address; write host:port, such as 0.0.0.0:8080 or [::1]:8080`},
		{"bind to a URL", good + "api: {bind: 'http://h:80'}\n", `node.yaml:9: api.bind: "http://h:80" is not an address; write host:port, such as 0.0.0.0:8080 or [::1]:8080`},
		{"bind to nothing", good + "api: {bind: ''}\n", `node.yaml:9: api.bind: is empty; write host:port, such as 127.0.0.1:8080, or remove the key for the default`},
		{"bind without a value", good + "api: {bind: }\n", `node.yaml:9: api.bind: has no value; write one, or remove the key for the default`},
		{"half of api's TLS", good + "api: {tls: {cert_file: x}}\n", `node.yaml:9: api.tls: cert_file and key_file go together; write both, or none for plain HTTP`},
		{"admin without token and TLS", good + "admin: {bind: ':8081'}\n", `node.yaml:9: admin.bind: other machines can reach :8081, and there is no token_file and no tls; write token_file and tls: {cert_file, key_file}, or bind it to 127.0.0.1`},
		{"admin without TLS", good + "admin: {bind: '10.0.0.5:8081', token_file: t}\n", `node.yaml:9: admin.bind: other machines can reach 10.0.0.5:8081, and there is no tls; write token_file and tls: {cert_file, key_file}, or bind it to 127.0.0.1`},
		{"admin without a token", good + "admin: {bind: 'localhost.example:8081', tls: " + server + "}\n", `node.yaml:9: admin.bind: other machines can reach localhost.example:8081, and there is no token_file; write token_file and tls: {cert_file, key_file}, or bind it to 127.0.0.1`},
		{"no gossip key", swap(", key_file: gossip.key", ""), `node.yaml:5: gossip.key_file: is missing; write a file with 32 random bytes in base64, the same on all nodes, as head -c 32 /dev/urandom | base64 prints them`},
		{"no rpc certificate", swap("cert_file: node.pem, ", ""), `node.yaml:7: rpc.tls.cert_file: is missing; write the files that dsnode tls issue has made for this node`},
		{"no rpc key", swap("key_file: node.key, ", ""), `node.yaml:7: rpc.tls.key_file: is missing; write the files that dsnode tls issue has made for this node`},
		{"no rpc CA", swap(", ca_file: ca.pem", ""), `node.yaml:7: rpc.tls.ca_file: is missing; write the certificate that dsnode tls ca has made`},
		{"same port", good + "metrics: {bind: '127.0.0.1:8080'}\n", `node.yaml:9: metrics.bind: port 8080 is already used by api.bind; choose another port`},
		{"seed with a scheme", good + "seeds: ['https://10.0.0.6:7957']\n", `node.yaml:9: seeds[0]: "https://10.0.0.6:7957" is not an address; write the rpc address of another node, such as 10.0.0.6:7957`},
		{"seed without a port", good + "seeds:\n  - 10.0.0.6:7957\n  - 10.0.0.7\n", `node.yaml:11: seeds[1]: "10.0.0.7" is not an address; write the rpc address of another node, such as 10.0.0.6:7957`},
		{"seed twice", good + "seeds: ['h:1', 'h:1']\n", `node.yaml:9: seeds[1]: "h:1" is listed twice; remove it`},
		{"seeds in a row", good + "seeds: h:1,g:1\n", `node.yaml:9: seeds: must be a list, not "h:1,g:1"; write - before each entry, or [a, b]`},
		{"too many seeds", good + "seeds: [" + strings.Repeat("h:1,", 65) + "]\n", `node.yaml:9: seeds: has 65 entries, more than the limit of 64; name a few nodes of each site`},
		{"no operator key", swap("operator_key: {file: operator.key}\n", ""), `node.yaml:1: operator_key: is missing; write {file: PATH} or {env: NAME}; the key has 32 random bytes in base64, as head -c 32 /dev/urandom | base64 prints them`},
		{"literal operator key", swap("{file: operator.key}", "aHVudGVyMg=="), `node.yaml:8: operator_key: must be a reference to a secret; write {env: NAME} or {file: PATH}`},
		{"two operator keys", swap("{file: operator.key}", "{file: a, env: B}"), `node.yaml:8: operator_key: has both env and file; write {file: PATH} or {env: NAME}, not both`},
		{"no previous operator key", good + "operator_key_previous: {}\n", `node.yaml:9: operator_key_previous: is empty; write {file: PATH} or {env: NAME}, or remove it`},
		{"two previous operator keys", good + "operator_key_previous: {file: a, env: B}\n", `node.yaml:9: operator_key_previous: has both env and file; write {file: PATH} or {env: NAME}, not both`},
		{"the same operator key twice", good + "operator_key_previous: {file: operator.key}\n", `node.yaml:9: operator_key_previous: is the same as operator_key; write the key that operator_key replaces, or remove it`},
		{"no such feature level", good + "feature_level: 99\n", `node.yaml:9: feature_level: this version has no feature level 99; write a level from 1 to 3, or remove it for the newest one`},
		{"feature level 0", good + "feature_level: 0\n", `node.yaml:9: feature_level: this version has no feature level 0; write a level from 1 to 3, or remove it for the newest one`},
		{"delay", good + "shutdown: {delay: 11m}\n", `node.yaml:9: shutdown.delay: 11m is out of range; write a time from 0s to 10m`},
		{"grace", good + "shutdown: {grace: 61m}\n", `node.yaml:9: shutdown.grace: 1h1m is out of range; write a time from 0s to 1h`},
		{"grace without a unit", good + "shutdown: {grace: 30}\n", `node.yaml:9: shutdown.grace: not a duration: "30" has no unit; write 30s or 30ms`},
		{"level", good + "log: {level: warning}\n", `node.yaml:9: log.level: "warning" is not a level; write one of debug, info, warn, error`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, err := ParseConfig("node.yaml", []byte(tc.text), "/")
			if err == nil {
				t.Fatalf("accepted: %+v", c)
			}
			if got := err.Error(); got != tc.want {
				t.Errorf("\n got %s\nwant %s", got, tc.want)
			}
			var ps config.Problems
			if !errors.As(err, &ps) || c != nil {
				t.Errorf("the error is a %T, the config %v", err, c)
			}
		})
	}
}

func TestAdminMayBeReachedFromOutsideWithTokenAndTLS(t *testing.T) {
	for _, admin := range []string{"{bind: ':8081', token_file: t, tls: {cert_file: c, key_file: k}}", "{bind: 'localhost:8081'}", "{bind: '[::1]:0'}", "{bind: '127.8.8.8:1', token_file: t}"} {
		if _, err := ParseConfig("f", []byte(good+"admin: "+admin+"\n"), "/"); err != nil {
			t.Errorf("%s: %v", admin, err)
		}
	}
}

// writeNode writes a node.yaml and all files that it names into a new directory.
func writeNode(t testing.TB, text string) (dir, path string) {
	t.Helper()
	dir = t.TempDir()
	caCert, caKey, err := mesh.NewCA("dev", 2*time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	cert, key, err := mesh.Issue(caCert, caKey, mesh.Identity{Cluster: "dev", Site: "a", Node: "a-1"}, []string{"localhost"}, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	secret := []byte(base64.StdEncoding.EncodeToString(make([]byte, 32)) + "\n")
	for name, data := range map[string][]byte{
		"node.pem": cert, "node.key": key, "ca.pem": caCert, "ca.key": caKey,
		"gossip.key": secret, "operator.key": secret, "token": []byte("t0ken\n"), "empty": nil, "words": []byte("hello"),
		"node.yaml": []byte(text),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir, filepath.Join(dir, "node.yaml")
}

func TestLoadConfigReadsWhatTheFileNames(t *testing.T) {
	dir, path := writeNode(t, good+"admin: {token_file: token, tls: {cert_file: node.pem, key_file: node.key}}\ndata_dir: data\n")
	t.Chdir(filepath.Dir(dir)) // relative paths start from the file, not from here
	c, err := LoadConfig(filepath.Join(filepath.Base(dir), "node.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	if c.DataDir != filepath.Join(dir, "data") || c.RPC.TLS.CertFile != filepath.Join(dir, "node.pem") {
		t.Errorf("data_dir %s, cert_file %s, want them in %s", c.DataDir, c.RPC.TLS.CertFile, dir)
	}

	t.Setenv("OPERATOR_KEY", strings.Repeat("ab", 32))
	if err := os.WriteFile(path, []byte(strings.Replace(good, "{file: operator.key}", "{env: OPERATOR_KEY}", 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadConfig(path); err != nil {
		t.Errorf("operator key from the environment: %v", err)
	}
	if err := os.WriteFile(path, []byte(good+"operator_key_previous: {file: words}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadConfig(path); err == nil || !strings.Contains(err.Error(), "node.yaml:9: operator_key_previous: file ") {
		t.Errorf("a file that is not a previous operator key: %v", err)
	}
}

func TestLoadConfigReportsAllMistakes(t *testing.T) {
	dir, path := writeNode(t, `version: 1
cluster: dev
name: A
site: a
api:
  tls: {cert_file: words, key_file: node.key}
admin:
  token_file: empty
  tls: {cert_file: none.pem, key_file: empty}
gossip:
  bind: 127.0.0.1:0
  key_file: words
rpc:
  bind: 127.0.0.1:0
  tls:
    cert_file: node.pem
    key_file: ca.key
    ca_file: .
operator_key: {env: DSNODE_TEST_NO_SUCH_KEY}
log: {level: loud}
`)
	_, err := LoadConfig(path)
	if err == nil {
		t.Fatal("accepted")
	}
	got := strings.Split(strings.ReplaceAll(err.Error(), dir, "DIR"), "\n")
	want := []string{
		`DIR/node.yaml:3: name: "A" cannot be a name; write up to 63 lower-case letters, digits and dashes, no dash first or last`,
		`DIR/node.yaml:6: api.tls.cert_file: the files DIR/words and DIR/node.key are not a certificate and its key (failed to find any PEM data in certificate input); create both together with dsnode tls issue`,
		`DIR/node.yaml:8: admin.token_file: secret cannot be read: the file DIR/empty is empty; put the secret there`,
		`DIR/node.yaml:9: admin.tls.cert_file: the file DIR/none.pem does not exist; create it or correct the path`,
		`DIR/node.yaml:9: admin.tls.key_file: the file DIR/empty is empty; fill it or correct the path`,
		`DIR/node.yaml:12: gossip.key_file: the file DIR/words is not a gossip key; write a file with 32 random bytes in base64, the same on all nodes, as head -c 32 /dev/urandom | base64 prints them`,
		`DIR/node.yaml:16: rpc.tls.cert_file: the files DIR/node.pem and DIR/ca.key are not a certificate and its key (private key does not match public key); create both together with dsnode tls issue`,
		`DIR/node.yaml:18: rpc.tls.ca_file: the file DIR cannot be read: is a directory`,
		`DIR/node.yaml:19: operator_key: no operator key: environment variable DSNODE_TEST_NO_SUCH_KEY is not set`,
		`DIR/node.yaml:20: log.level: "loud" is not a level; write one of debug, info, warn, error`,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestLoadConfigComparesNamesWithTheCertificate(t *testing.T) {
	dir, path := writeNode(t, strings.Replace(good, "name: a-1", "name: a-2", 1))
	_, err := LoadConfig(path)
	want := `DIR/node.yaml:7: rpc.tls.cert_file: the certificate is for spiffe://dev/site/a/node/a-1, not for spiffe://dev/site/a/node/a-2; issue one for this node with dsnode tls issue, or correct cluster, site and name`
	if err == nil || strings.ReplaceAll(err.Error(), dir, "DIR") != want {
		t.Errorf("another name: %v", err)
	}
	_, path = writeNode(t, strings.NewReplacer("node.pem", "ca.pem", "node.key", "ca.key").Replace(good))
	if _, err := LoadConfig(path); err == nil || !strings.Contains(err.Error(), ":7: rpc.tls.cert_file: "+mesh.ErrNoIdentity.Error()) {
		t.Errorf("a certificate without an identity: %v", err)
	}
}

func TestLoadConfigOfMissingOrHugeFile(t *testing.T) {
	_, err := LoadConfig(filepath.Join(t.TempDir(), "none.yaml"))
	if !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the error of a missing file: %v", err)
	}
	big := filepath.Join(t.TempDir(), "big.yaml")
	if err := os.WriteFile(big, make([]byte, config.MaxBytes+1), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadConfig(big); !errors.Is(err, errTooLarge) {
		t.Errorf("a huge file: %v", err)
	}
}

func TestEncodedConfigIsReadBackIdentically(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := DefaultConfig()
		c.Cluster, c.Name, c.Site = "dev", "a-1", "a"
		port := func(label string) int { return rapid.IntRange(0, 9999).Draw(t, label) }
		maybe := func(label string) bool { return rapid.Bool().Draw(t, label) }
		c.RPC = RPCConfig{Bind: fmt.Sprintf("127.0.0.1:%d", port("rpc")), TLS: PeerTLS{"c", "k", "a: # b"}}
		c.Gossip = GossipConfig{Bind: fmt.Sprintf("[::]:%d", 10000+port("gossip")), Advertise: "h:1", KeyFile: "~"}
		c.API.Bind = fmt.Sprintf(":%d", 20000+port("api"))
		if maybe("admin") {
			c.Admin = AdminConfig{Bind: "0.0.0.0:8081", TokenFile: "/t", TLS: ServerTLS{"c", "k"}}
		}
		if maybe("metrics") {
			c.Metrics.Bind = ":9090"
		}
		if maybe("seeds") {
			c.Seeds = []string{"h:1", "[::1]:2"}
		}
		c.OperatorKey = rapid.SampledFrom([]config.Secret{{Env: "KEY"}, {File: "key"}}).Draw(t, "key")
		c.Shutdown.Delay = config.Duration(rapid.Int64Range(0, int64(10*time.Minute)).Draw(t, "delay"))
		c.Shutdown.Grace = config.Duration(rapid.Int64Range(0, int64(time.Hour)).Draw(t, "grace"))
		c.Log.Level = rapid.SampledFrom([]string{"debug", "info", "warn", "error"}).Draw(t, "level")

		first := encodeAndParse(t, c)
		second := encodeAndParse(t, first)
		if diff := cmp.Diff(*first, *second, cmpopts.IgnoreUnexported(Config{})); diff != "" {
			t.Fatal(diff)
		}
		if first.Log != c.Log || first.Shutdown != c.Shutdown || first.API.Bind != c.API.Bind || first.RPC.Advertise != c.RPC.Bind {
			t.Fatalf("%+v became %+v", c, first)
		}
	})
}

func encodeAndParse(t *rapid.T, c *Config) *Config {
	text, err := c.Encode()
	if err != nil {
		t.Fatal(err)
	}
	got, err := ParseConfig("encoded", text, "/etc")
	if err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	return got
}

func TestLoadedConfigIsReadBackFromAnywhere(t *testing.T) {
	_, path := writeNode(t, good)
	first, err := LoadConfig(path)
	if err != nil {
		t.Fatal(err)
	}
	text, err := first.Encode()
	if err != nil {
		t.Fatal(err)
	}
	elsewhere := filepath.Join(t.TempDir(), "other.yaml")
	if err := os.WriteFile(elsewhere, text, 0o600); err != nil {
		t.Fatal(err)
	}
	second, err := LoadConfig(elsewhere)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(*first, *second, cmpopts.IgnoreUnexported(Config{})); diff != "" {
		t.Error(diff)
	}
}

func TestParseGossipKey(t *testing.T) {
	key := []byte(strings.Repeat("k", 32))
	got, err := ParseGossipKey([]byte("\n " + base64.StdEncoding.EncodeToString(key) + "\r\n"))
	if err != nil || string(got) != string(key) {
		t.Errorf("%q, %v", got, err)
	}
	for _, bad := range []string{"", "x", string(key), base64.StdEncoding.EncodeToString(key[:31]), base64.StdEncoding.EncodeToString(append(key, 'x'))} {
		if _, err := ParseGossipKey([]byte(bad)); !errors.Is(err, ErrGossipKey) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func FuzzParseConfig(f *testing.F) {
	f.Add([]byte(good))
	f.Add([]byte(good + "admin: {bind: ':1', token_file: t, tls: {cert_file: c, key_file: k}}\nseeds: ['h:1']\nmetrics: {bind: ':0'}\nshutdown: {delay: 1s, grace: 0s}\nlog: {level: warn}\n"))
	f.Add([]byte("version: 2\nname: [x]\nseeds: {a: b}\nrpc: {bind: '::1', tls: ~}\noperator_key: {env: }\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		c, err := ParseConfig("f", text, "/etc")
		if err != nil {
			var ps config.Problems
			if !errors.As(err, &ps) {
				t.Fatalf("%T", err)
			}
			return
		}
		written, err := c.Encode()
		if err != nil {
			t.Fatal(err)
		}
		again, err := ParseConfig("again", written, "/")
		if err != nil {
			t.Fatalf("%v\nfrom\n%s\nto\n%s", err, text, written)
		}
		if diff := cmp.Diff(*c, *again, cmpopts.IgnoreUnexported(Config{}), cmpopts.EquateEmpty()); diff != "" {
			t.Fatal(diff)
		}
	})
}
