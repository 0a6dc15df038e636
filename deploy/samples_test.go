// Package deploy has the samples for operators. Its tests check them.
package deploy

import (
	"bytes"
	"encoding/base64"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"go.yaml.in/yaml/v4"

	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/cluster/mesh"
	"github.com/dsnode/dsnode/node"
)

func TestClusterSampleLoadsAndShowsEveryKey(t *testing.T) {
	text, err := os.ReadFile("cluster.yaml")
	if err != nil {
		t.Fatal(err)
	}
	c, err := config.Parse("cluster.yaml", text)
	if err != nil {
		t.Fatal(err)
	}
	if c.Timeouts != config.DefaultTimeouts() || c.Limits != config.DefaultLimits() || c.Timing.Heartbeat.D() != config.DefaultHeartbeat || c.Access.Anonymous {
		t.Errorf("the sample does not have the defaults: %+v, %+v, %+v, %+v", c.Timeouts, c.Limits, c.Timing, c.Access)
	}
	if c.Sites["shanghai-a"] != (config.Site{City: "shanghai", Priority: 1, RPOTarget: config.DefaultRPOTarget, RTOTarget: config.DefaultRTOTarget}) {
		t.Errorf("site: %+v", c.Sites["shanghai-a"])
	}
	if u := c.Upstreams["a-vllm"]; u.MaxConcurrency != config.DefaultMaxConcurrency || u.Discover != config.DiscoverOff {
		t.Errorf("upstream: %+v", u)
	}
	wantEveryKey(t, text, reflect.TypeFor[config.Config]())
}

func TestNodeSampleLoadsAndShowsEveryKey(t *testing.T) {
	text, err := os.ReadFile("node.yaml")
	if err != nil {
		t.Fatal(err)
	}
	// These keys are commented out, because they are used only while the operator's key
	// changes, and during an upgrade.
	shown := text
	for _, key := range []string{"operator_key_previous:", "feature_level:"} {
		shown = bytes.Replace(shown, []byte("\n# "+key), []byte("\n"+key), 1)
	}
	wantEveryKey(t, shown, reflect.TypeFor[node.Config]())

	dir := t.TempDir()
	write := func(name string, data []byte) {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	caCert, caKey, err := mesh.NewCA("dev", 2*time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	write("ca.pem", caCert)
	for _, name := range []string{"node", "api", "admin"} {
		cert, key, err := mesh.Issue(caCert, caKey, mesh.Identity{Cluster: "dev", Site: "shanghai-a", Node: "shanghai-a-1"}, []string{"10.0.0.5"}, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		write(name+".pem", cert)
		write(name+".key", key)
	}
	key := []byte(base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{7}, 32)))
	write("gossip.key", key)
	write("operator.key", key)
	write("admin.token", []byte("token\n"))
	write("node.yaml", text)
	c, err := node.LoadConfig(filepath.Join(dir, "node.yaml"))
	if err != nil {
		t.Fatal(err)
	}

	// A key that is left out has the default that the sample shows.
	short, err := node.ParseConfig("short", []byte(`
version: 1
cluster: dev
name: shanghai-a-1
site: shanghai-a
api: {tls: {cert_file: api.pem, key_file: api.key}}
admin: {token_file: admin.token, tls: {cert_file: admin.pem, key_file: admin.key}}
metrics: {bind: "10.0.0.5:9090"}
gossip: {advertise: "10.0.0.5:7956", key_file: gossip.key}
rpc: {advertise: "10.0.0.5:7957", tls: {cert_file: node.pem, key_file: node.key, ca_file: ca.pem}}
seeds: ["10.0.0.6:7957", "10.1.0.5:7957", "10.2.0.5:7957"]
operator_key: {file: operator.key}
`), dir)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(*short, *c, cmpopts.IgnoreUnexported(node.Config{})); diff != "" {
		t.Errorf("-defaults +sample:\n%s", diff)
	}
}

// wantEveryKey checks that a sample has each key of its type, at the right place.
func wantEveryKey(t *testing.T, text []byte, typ reflect.Type) {
	t.Helper()
	var tree any
	if err := yaml.Load(text, &tree); err != nil {
		t.Fatal(err)
	}
	shown := map[string]bool{}
	collect("", tree, typ, shown)
	wanted := map[string]bool{}
	keys("", typ, wanted)
	for key := range wanted {
		// A secret has only one of its two forms.
		if !shown[key] && !strings.HasSuffix(key, ".env") && !strings.HasSuffix(key, ".file") {
			t.Errorf("the sample lacks %s", key)
		}
	}
	if len(wanted) < 20 {
		t.Errorf("found only %d keys in %s", len(wanted), typ)
	}
}

// keys lists the keys of a type; entries of maps and lists are "*".
func keys(at string, typ reflect.Type, out map[string]bool) {
	switch typ.Kind() {
	case reflect.Map, reflect.Slice:
		keys(at+".*", typ.Elem(), out)
	case reflect.Struct:
		if typ == reflect.TypeFor[config.Timeouts]() && at != ".timeouts" {
			return // the same keys everywhere; the sample has all of them once
		}
		for i := range typ.NumField() {
			f := typ.Field(i)
			name, _, _ := strings.Cut(f.Tag.Get("yaml"), ",")
			if !f.IsExported() || name == "-" {
				continue
			}
			out[at+"."+name] = true
			keys(at+"."+name, f.Type, out)
		}
	default:
	}
}

// collect lists the keys of a file, in the format of keys.
func collect(at string, value any, typ reflect.Type, out map[string]bool) {
	switch value := value.(type) {
	case map[string]any:
		for k, v := range value {
			step, next := k, reflect.Type(nil)
			switch typ.Kind() {
			case reflect.Map:
				step, next = "*", typ.Elem()
			default:
				for i := range typ.NumField() {
					if name, _, _ := strings.Cut(typ.Field(i).Tag.Get("yaml"), ","); name == k {
						next = typ.Field(i).Type
					}
				}
			}
			out[at+"."+step] = true
			collect(at+"."+step, v, next, out)
		}
	case []any:
		for _, v := range value {
			collect(at+".*", v, typ.Elem(), out)
		}
	}
}
