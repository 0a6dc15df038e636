package node

import (
	"context"
	"encoding/base64"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/mesh"
	"github.com/dsnode/dsnode/storage/keyring"
	"github.com/dsnode/dsnode/storage/keyring/keyringtest"
	"github.com/dsnode/dsnode/test/async"
)

// keyCluster is a cluster of real nodes in this process, on loopback.
type keyCluster struct {
	t         *testing.T
	dir       string
	cert, key []byte // of the CA
	log       *async.Buffer
	nodes     map[string]*Node
	stops     map[string]func() error
	seed      string
	edit      func(*Config) // of every node that boots; nil: none
}

const keyClusterConfig = `version: 1
sites:
  a: {city: x, priority: 1}
  b: {city: x, priority: 2}
  c: {city: y, priority: 3}
upstreams:
  m: {site: a, kind: openai, url: "http://127.0.0.1:9/v1"}
models:
  deepseek-chat: {serve: [{upstream: m, model: m}]}
`

func newKeyCluster(t *testing.T) *keyCluster {
	t.Helper()
	cert, key, err := mesh.NewCA("dev", 24*time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	log := &async.Buffer{}
	c := &keyCluster{
		t: t, dir: t.TempDir(), cert: cert, key: key, log: log,
		nodes: map[string]*Node{}, stops: map[string]func() error{},
	}
	c.write("ca.pem", cert)
	c.write("gossip.key", []byte(base64.StdEncoding.EncodeToString(make([]byte, 32))))
	return c
}

func (c *keyCluster) write(name string, b []byte) string {
	c.t.Helper()
	path := filepath.Join(c.dir, name)
	if err := os.WriteFile(path, b, 0o600); err != nil {
		c.t.Fatal(err)
	}
	return path
}

// boot runs a node in its data directory. ended has the result of its Run.
func (c *keyCluster) boot(name string, current, previous keyring.OperatorKey) (n *Node, ended <-chan error) {
	c.t.Helper()
	cert, key, err := mesh.Issue(c.cert, c.key, mesh.Identity{Cluster: "dev", Site: name[:1], Node: name}, []string{"127.0.0.1"}, time.Hour)
	if err != nil {
		c.t.Fatal(err)
	}
	cfg := DefaultConfig()
	cfg.Cluster, cfg.Name, cfg.Site, cfg.DataDir = "dev", name, name[:1], filepath.Join(c.dir, "data-"+name)
	cfg.API = APIConfig{Bind: "127.0.0.1:0", Advertise: "127.0.0.1:0"}
	cfg.Admin = AdminConfig{Bind: "127.0.0.1:0", Advertise: "127.0.0.1:0"}
	cfg.Gossip = GossipConfig{Bind: "127.0.0.1:0", Advertise: "127.0.0.1:0", KeyFile: filepath.Join(c.dir, "gossip.key")}
	cfg.RPC = RPCConfig{Bind: "127.0.0.1:0", Advertise: "127.0.0.1:0", TLS: PeerTLS{
		CertFile: c.write(name+".pem", cert), KeyFile: c.write(name+"-key.pem", key), CAFile: filepath.Join(c.dir, "ca.pem"),
	}}
	if c.seed != "" {
		cfg.Seeds = []string{c.seed}
	}
	cfg.OperatorKey.File = c.write(name+"-operator.key", []byte(current.Encode()))
	if previous != (keyring.OperatorKey{}) {
		cfg.OperatorKeyPrevious.File = c.write(name+"-operator-previous.key", []byte(previous.Encode()))
	}
	if c.edit != nil {
		c.edit(cfg)
	}
	log := slog.New(slog.NewJSONHandler(c.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	n, err = New(cfg, Options{Logger: log, Version: "test"})
	if err != nil {
		c.t.Fatal(err)
	}
	n.keys.PollInterval, n.keys.DropGrace = 50*time.Millisecond, 200*time.Millisecond
	ctx, cancel := context.WithCancel(context.Background())
	end := make(chan error, 1)
	done := make(chan struct{})
	var result error
	go func() {
		defer close(done)
		result = n.Run(ctx)
		end <- result
	}()
	stop := func() error { cancel(); <-done; return result }
	c.nodes[name], c.stops[name] = n, stop
	c.t.Cleanup(func() { _ = stop() }) // a test that expects an error has checked it
	return n, end
}

func (c *keyCluster) stop(name string) {
	c.t.Helper()
	if err := c.stops[name](); err != nil {
		c.t.Fatalf("%s: Run returned %v", name, err)
	}
	delete(c.nodes, name)
}

// sealing reports whether all running nodes seal with the same key, and that is not
// except.
func (c *keyCluster) sealing(except string) bool {
	var ids []string
	for _, n := range c.nodes {
		id, _ := n.keys.Ring.Current()
		if !n.keys.Ring.Ready() || id.String() == except {
			return false
		}
		ids = append(ids, id.String())
	}
	return len(slices.Compact(ids)) == 1
}

// secretsIn returns the keys kept in a data directory, and the operator keys.
func secretsIn(t *testing.T, dir string, operator ...keyring.OperatorKey) [][]byte {
	t.Helper()
	sealer, err := keyring.OpenNodeKey(dir, operator[0])
	if err != nil {
		t.Fatal(err)
	}
	kept, err := keyring.ReadKept(dir, sealer)
	if err != nil {
		t.Fatal(err)
	}
	return keyringtest.Secrets(t, kept, operator...)
}

func TestKeyringOfRealNodes(t *testing.T) {
	c := newKeyCluster(t)
	none := keyring.OperatorKey{}
	old, next := keyring.GenerateOperatorKey(), keyring.GenerateOperatorKey()
	a, _ := c.boot("a-1", old, none)
	c.seed = a.Addresses().RPC
	async.Await(t, "the first node bootstraps the cluster", func() bool {
		return a.operator.Bootstrap(t.Context(), []byte(keyClusterConfig), "me") == nil
	})
	async.Await(t, "it has a key", a.keys.Ring.Ready)
	c.boot("b-1", old, none)
	c.boot("c-1", old, none)
	async.Await(t, "three nodes share it", func() bool { return len(a.cluster.State().Nodes) == 3 && c.sealing("") })
	first, _ := a.keys.Ring.Current()

	// A follower is asked to rotate. The first key is dropped, because no record is sealed
	// with it.
	k, err := c.nodes["c-1"].operator.RotateKeyring(t.Context(), "ann")
	if err != nil {
		t.Fatal(err)
	}
	async.Await(t, "the new key is in use everywhere", func() bool { return c.sealing(first.String()) })
	var listed []string
	async.Await(t, "the first key is dropped", func() bool {
		r, err := c.nodes["b-1"].operator.Keyring(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		listed = nil
		for _, key := range r.Keys {
			listed = append(listed, key.Kind+" "+key.State)
			if key.Kind == "seal" && key.Records == nil {
				return false
			}
		}
		return len(r.Keys) == 2 && !c.nodes["b-1"].keys.Ring.Has(first)
	})
	if diff := cmp.Diff([]string{"mac active", "seal active"}, listed); diff != "" {
		t.Fatal(diff)
	}
	if got, _ := c.nodes["b-1"].keys.Ring.Current(); got.String() != k.ID {
		t.Fatalf("new records are sealed with %s, want %s", got, k.ID)
	}

	// A node with another operator key can't join, and its Run returns the reason.
	_, ended := c.boot("b-9", keyring.GenerateOperatorKey(), none)
	select {
	case err := <-ended:
		if !errors.Is(err, agreed.ErrOperatorKey) || !strings.Contains(err.Error(), old.Fingerprint()) || !strings.Contains(err.Error(), "give it the cluster's operator key") {
			t.Fatalf("Run returned %v", err)
		}
	case <-time.After(time.Minute):
		t.Fatal("a node with a wrong operator key still runs")
	}
	delete(c.nodes, "b-9")
	if _, member := a.cluster.State().Nodes["b-9"]; member {
		t.Fatal("the node has joined")
	}

	// The operator key changes, one node after the other.
	for _, name := range []string{"b-1", "c-1"} {
		c.stop(name)
		c.boot(name, next, old)
	}
	async.Await(t, "two nodes have registered the new operator key", func() bool {
		return cmp.Equal(c.nodes["b-1"].cluster.State().LackOperatorKey(next.Fingerprint()), []string{"a-1"})
	})
	async.Await(t, "the refusal names the node that lacks it", func() bool {
		_, err := c.nodes["b-1"].operator.RewrapKeyring(t.Context(), "ann")
		return errors.Is(err, agreed.ErrOperatorKeyMissing) && strings.HasSuffix(err.Error(), "is not that of a-1")
	})
	c.stop("a-1")
	c.seed = c.nodes["b-1"].Addresses().RPC
	a, _ = c.boot("a-1", next, old)
	if !a.keys.Ring.Ready() {
		t.Fatal("a restarted node can't open its records before it hears the others")
	}
	async.Await(t, "rewrapped", func() bool {
		_, err := a.operator.RewrapKeyring(t.Context(), "ann")
		return err == nil && a.cluster.State().OperatorKey() == next.Fingerprint()
	})
	async.Await(t, "all have confirmed the rewrapped keys", func() bool {
		s := a.cluster.State()
		return !slices.ContainsFunc(s.DataKeys, func(k agreed.DataKey) bool { return len(s.Unconfirmed(k)) > 0 })
	})
	c.boot("c-2", next, none)
	async.Await(t, "a new node with the new key alone is ready", func() bool { return len(a.cluster.State().Nodes) == 4 && c.sealing(first.String()) })

	secrets := secretsIn(t, filepath.Join(c.dir, "data-a-1"), next, old)
	state, err := a.cluster.State().Encode()
	if err != nil {
		t.Fatal(err)
	}
	for name := range c.nodes {
		c.stop(name)
	}
	keyringtest.NoneIn(t, secrets, "the agreed state", state)
	keyringtest.NoneIn(t, secrets, "a log", c.log.Bytes())
	files := 0
	err = filepath.WalkDir(c.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.Contains(path, "/data-") {
			return err
		}
		b, err := os.ReadFile(path)
		files++
		keyringtest.NoneIn(t, secrets, path, b)
		return err
	})
	if err != nil || files < 12 {
		t.Fatalf("%d files were searched: %v", files, err)
	}
}
