package node

import (
	"path/filepath"
	"testing"
	"time"

	"github.com/dsnode/dsnode/cluster/mesh"
	"github.com/dsnode/dsnode/storage/keyring"
	"github.com/dsnode/dsnode/test/async"
)

// The page THREATS.md changes the CA of a running cluster in three steps: both CAs on all
// nodes, new certificates, the old CA taken out. Between any two of them every node reaches
// every other one over new connections, and no node restarts.
func TestCAIsReplacedWhileTheClusterRuns(t *testing.T) {
	c := newKeyCluster(t)
	key, none := keyring.GenerateOperatorKey(), keyring.OperatorKey{}
	a, _ := c.boot("a-1", key, none)
	c.seed = a.Addresses().RPC
	async.Await(t, "the first node bootstraps the cluster", func() bool {
		return a.operator.Bootstrap(t.Context(), []byte(keyClusterConfig), "me") == nil
	})
	b, _ := c.boot("b-1", key, none)
	async.Await(t, "both nodes are members", func() bool { return len(a.cluster.State().Nodes) == 2 && len(b.cluster.State().Nodes) == 2 })
	nodes := []*Node{a, b}
	reload := func() {
		t.Helper()
		for _, n := range nodes {
			if err := n.Reload(); err != nil {
				t.Fatalf("%s: %v", n.cfg.Name, err)
			}
		}
	}
	reachable := func(after string) {
		t.Helper()
		for _, n := range nodes {
			for _, other := range nodes {
				if other == n {
					continue
				}
				conn, err := n.cluster.Mesh().Dial(t.Context(), mesh.KindHTTP, other.cfg.Name)
				if err != nil {
					t.Fatalf("%s: %s does not reach %s: %v", after, n.cfg.Name, other.cfg.Name, err)
				}
				_ = conn.Close() // it was only to be made
			}
		}
	}
	reachable("before")
	newCert, newKey, err := mesh.NewCA("dev", 24*time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	c.write("ca.pem", append(append([]byte{}, c.cert...), newCert...))
	reload()
	reachable("with both CAs")
	for _, n := range nodes {
		name := n.cfg.Name
		cert, certKey, err := mesh.Issue(newCert, newKey, mesh.Identity{Cluster: "dev", Site: n.cfg.Site, Node: name}, []string{"127.0.0.1"}, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		c.write(name+".pem", cert)
		c.write(name+"-key.pem", certKey)
		if err := n.Reload(); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		reachable("with new certificates of " + name)
	}
	c.write("ca.pem", newCert)
	reload()
	reachable("without the old CA")
	// A certificate of the old CA is not taken any more.
	old, oldKey, err := mesh.Issue(c.cert, c.key, mesh.Identity{Cluster: "dev", Site: "b", Node: "b-1"}, []string{"127.0.0.1"}, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := mesh.LoadCredentials(c.write("old.pem", old), c.write("old-key.pem", oldKey), filepath.Join(c.dir, "ca.pem"), a.log, nil); err == nil {
		t.Error("a certificate of the old CA fits the new one")
	}
}
