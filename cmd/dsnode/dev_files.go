package main

import (
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/cluster/mesh"
	"github.com/dsnode/dsnode/node"
	"github.com/dsnode/dsnode/storage/keyring"
)

// Certificates of a dev cluster that is kept for a year are good for another year.
const (
	devCAValid   = 5 * 365 * 24 * time.Hour
	devCertValid = 2 * 365 * 24 * time.Hour
	// devGrace is how long running requests may take to finish after Ctrl-C. It is shorter
	// than devStopWithin.
	devGrace = 5 * time.Second
)

// writeFiles writes all files that nodes read at their start. Files of an earlier run
// stay, except node.yaml, which is rewritten so that it fits this version of the
// program.
//
//	dev.json cluster.yaml ca.pem ca-key.pem gossip.key operator.key
//	NODE/node.yaml NODE/cert.pem NODE/key.pem NODE/node.log NODE/data/
func (p *devPlan) writeFiles() error {
	if err := os.MkdirAll(p.dir, 0o700); err != nil {
		return fmt.Errorf("make the data folder: %w", err)
	}
	if err := p.writeRecord(); err != nil {
		return err
	}
	if !p.founded() {
		if err := os.WriteFile(filepath.Join(p.dir, "cluster.yaml"), []byte(p.text), 0o600); err != nil {
			return fmt.Errorf("write cluster.yaml: %w", err)
		}
	}
	err := once(func() (map[string][]byte, error) {
		cert, key, err := mesh.NewCA(devName, devCAValid)
		return map[string][]byte{p.path("ca.pem"): cert, p.path("ca-key.pem"): key}, err
	}, p.path("ca.pem"), p.path("ca-key.pem"))
	if err != nil {
		return err
	}
	err = once(func() (map[string][]byte, error) {
		gossip := make([]byte, 32)
		_, _ = rand.Read(gossip) // it never returns an error
		return map[string][]byte{
			p.path("gossip.key"):   []byte(base64.StdEncoding.EncodeToString(gossip) + "\n"),
			p.path("operator.key"): []byte(keyring.GenerateOperatorKey().Encode() + "\n"),
		}, nil
	}, p.path("gossip.key"), p.path("operator.key"))
	if err != nil {
		return err
	}
	for _, n := range p.nodes {
		if err := p.writeNode(n); err != nil {
			return err
		}
	}
	return nil
}

func (p *devPlan) path(parts ...string) string {
	return filepath.Join(append([]string{p.dir}, parts...)...)
}

func (p *devPlan) writeNode(n devNode) error {
	if err := os.MkdirAll(p.path(n.name, "data"), 0o700); err != nil {
		return fmt.Errorf("make the folder of %s: %w", n.name, err)
	}
	err := once(func() (map[string][]byte, error) {
		caCert, err := os.ReadFile(p.path("ca.pem"))
		if err != nil {
			return nil, err
		}
		caKey, err := os.ReadFile(p.path("ca-key.pem"))
		if err != nil {
			return nil, err
		}
		id := mesh.Identity{Cluster: devName, Site: n.site, Node: n.name}
		cert, key, err := mesh.Issue(caCert, caKey, id, []string{"127.0.0.1", "localhost"}, devCertValid)
		return map[string][]byte{p.path(n.name, "cert.pem"): cert, p.path(n.name, "key.pem"): key}, err
	}, p.path(n.name, "cert.pem"), p.path(n.name, "key.pem"))
	if err != nil {
		return err
	}
	text, err := p.nodeConfig(n).Encode()
	if err != nil {
		return err
	}
	text = append([]byte("# Written by dsnode dev at each start.\n"), text...)
	if err := os.WriteFile(p.path(n.name, "node.yaml"), text, 0o600); err != nil {
		return fmt.Errorf("write node.yaml of %s: %w", n.name, err)
	}
	return nil
}

// nodeConfig uses relative paths, so that the folder can be moved.
func (p *devPlan) nodeConfig(n devNode) *node.Config {
	c := node.DefaultConfig()
	c.Cluster, c.Name, c.Site, c.DataDir = devName, n.name, n.site, "data"
	c.API.Bind = loopback(n.api)
	c.Admin.Bind = loopback(n.admin)
	c.Gossip = node.GossipConfig{Bind: loopback(n.gossip), KeyFile: "../gossip.key"}
	c.RPC = node.RPCConfig{
		Bind: loopback(n.rpc),
		TLS:  node.PeerTLS{CertFile: "cert.pem", KeyFile: "key.pem", CAFile: "../ca.pem"},
	}
	for _, other := range p.nodes {
		if other.name == other.site+"-1" && other.name != n.name {
			c.Seeds = append(c.Seeds, loopback(other.rpc))
		}
	}
	c.OperatorKey.File = "../operator.key"
	c.Shutdown = node.ShutdownConfig{Grace: config.Duration(devGrace)}
	return c
}

func (p *devPlan) writeRecord() error {
	text, err := json.MarshalIndent(p.record, "", "  ")
	if err != nil {
		return fmt.Errorf("encode the record of the dev cluster: %w", err)
	}
	if err := os.WriteFile(p.path(devRecordFile), append(text, '\n'), 0o600); err != nil {
		return fmt.Errorf("record the dev cluster: %w", err)
	}
	return nil
}

// once writes files that belong together, unless all of them exist.
func once(make func() (map[string][]byte, error), paths ...string) error {
	missing := false
	for _, path := range paths {
		_, err := os.Stat(path)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		missing = missing || err != nil
	}
	if !missing {
		return nil
	}
	files, err := make()
	if err != nil {
		return err
	}
	for path, content := range files {
		if err := os.WriteFile(path, content, 0o600); err != nil {
			return err
		}
	}
	return nil
}
