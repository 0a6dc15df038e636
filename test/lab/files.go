//go:build linux

package lab

import (
	"crypto/rand"
	"encoding/base64"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/cluster/mesh"
	"github.com/dsnode/dsnode/node"
	"github.com/dsnode/dsnode/storage/keyring"
)

const (
	clusterName = "lab"
	validFor    = 24 * time.Hour
)

// Models of the generated cluster.yaml.
const (
	FastModel = "deepseek-chat" // answers at once
	// SlowModel streams 60 tokens in about three seconds.
	SlowModel = "deepseek-slow"
)

// writeFiles writes certificates, keys, cluster.yaml and every node.yaml.
func (l *Lab) writeFiles() {
	l.t.Helper()
	l.text = l.ConfigFor(l.Sites...)
	if l.top.Alone {
		l.text = l.ConfigFor(l.Sites[0])
	}
	if l.top.Cluster != nil {
		l.text = l.top.Cluster(l.text)
	}
	caCert, caKey, err := mesh.NewCA(clusterName, validFor+time.Hour)
	if err != nil {
		l.t.Fatal(err)
	}
	gossip := make([]byte, 32)
	_, _ = rand.Read(gossip) // never fails; it ends the process instead
	l.write("ca.pem", caCert)
	l.write("ca-key.pem", caKey)
	l.write("gossip.key", []byte(base64.StdEncoding.EncodeToString(gossip)))
	l.write("operator.key", []byte(keyring.GenerateOperatorKey().Encode()))
	l.write("cluster.yaml", []byte(l.text))
	for _, n := range l.Nodes() {
		id := mesh.Identity{Cluster: clusterName, Site: n.Site.Name, Node: n.Name}
		cert, key, err := mesh.Issue(caCert, caKey, id, []string{l.Net.Addr(n.Site.Index)}, validFor)
		if err != nil {
			l.t.Fatal(err)
		}
		l.write(filepath.Join(n.Name, "cert.pem"), cert)
		l.write(filepath.Join(n.Name, "key.pem"), key)
		n.writeConfig()
	}
}

func (l *Lab) write(name string, content []byte) {
	l.t.Helper()
	path := filepath.Join(l.dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		l.t.Fatal(err)
	}
	if err := os.WriteFile(path, content, 0o600); err != nil {
		l.t.Fatal(err)
	}
}

// ConfigFor returns a cluster.yaml for these sites, each with its model server.
func (l *Lab) ConfigFor(sites ...*Site) string {
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	line("version: 1")
	line("access: {anonymous: true} # only the test is in these networks")
	line("sites:")
	for _, s := range sites {
		line("  %s: {city: %s, priority: %d}", s.Name, s.City, s.Index+1)
	}
	line("upstreams:")
	for _, s := range sites {
		// A pause of the machine for a second must not look like overload.
		line("  %s: {site: %s, url: %q, max_concurrency: 4000}", s.Model.name(), s.Name, s.Model.url())
	}
	line("models:")
	for name, upstream := range map[string]string{FastModel: "m", SlowModel: "m@first=20ms,rate=20,tokens=60"} {
		line("  %s:", name)
		line("    serve:")
		for _, s := range sites {
			line("      - {upstream: %s, model: %q}", s.Model.name(), upstream)
		}
	}
	return b.String()
}

// writeConfig writes node.yaml with the node's current ports.
func (n *Node) writeConfig() {
	l := n.lab
	l.t.Helper()
	at := func(port int) string { return fmt.Sprintf("%s:%d", l.Net.Addr(n.Site.Index), port) }
	c := node.DefaultConfig()
	c.Cluster, c.Site, c.Name, c.DataDir = clusterName, n.Site.Name, n.Name, "data"
	c.API.Bind = at(n.ports.api)
	c.Admin.Bind = fmt.Sprintf("127.0.0.1:%d", n.ports.admin)
	c.Gossip = node.GossipConfig{Bind: at(n.ports.gossip), KeyFile: "../gossip.key"}
	c.RPC = node.RPCConfig{Bind: at(n.ports.rpc), TLS: node.PeerTLS{CertFile: "cert.pem", KeyFile: "key.pem", CAFile: "../ca.pem"}}
	c.OperatorKey.File = "../operator.key"
	c.Shutdown = node.ShutdownConfig{Grace: config.Duration(10 * time.Second)}
	for _, s := range l.Sites { // the first node of each site
		if first := s.Nodes[0]; first != n {
			c.Seeds = append(c.Seeds, fmt.Sprintf("%s:%d", l.Net.Addr(s.Index), first.ports.rpc))
		}
	}
	if l.top.Node != nil {
		l.top.Node(c)
	}
	if n.edit != nil {
		n.edit(c)
	}
	text, err := c.Encode()
	if err != nil {
		l.t.Fatal(err)
	}
	l.write(filepath.Join(n.Name, "node.yaml"), text)
	if err := os.MkdirAll(n.DataDir(), 0o700); err != nil {
		l.t.Fatal(err)
	}
}
