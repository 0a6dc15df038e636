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

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/storage/keyring"
)

// A dev cluster that somebody keeps for a year still has a year then.
const (
	devCAValid   = 5 * 365 * 24 * time.Hour
	devCertValid = 2 * 365 * 24 * time.Hour
)

// writeFiles makes everything that nodes read at their start. What an earlier
// run made stays; node.yaml files are written anew, as a later version of this
// program would write them.
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
		cert, key, err := cluster.NewCA(devName, devCAValid)
		return map[string][]byte{p.path("ca.pem"): cert, p.path("ca-key.pem"): key}, err
	}, p.path("ca.pem"), p.path("ca-key.pem"))
	if err != nil {
		return err
	}
	err = once(func() (map[string][]byte, error) {
		gossip := make([]byte, 32)
		_, _ = rand.Read(gossip) // never fails; it ends the process instead
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
		id := cluster.Identity{Cluster: devName, Site: n.site, Node: n.name}
		cert, key, err := cluster.Issue(caCert, caKey, id, []string{"127.0.0.1", "localhost"}, devCertValid)
		return map[string][]byte{p.path(n.name, "cert.pem"): cert, p.path(n.name, "key.pem"): key}, err
	}, p.path(n.name, "cert.pem"), p.path(n.name, "key.pem"))
	if err != nil {
		return err
	}
	if err := os.WriteFile(p.path(n.name, "node.yaml"), []byte(p.nodeYAML(n)), 0o600); err != nil {
		return fmt.Errorf("write node.yaml of %s: %w", n.name, err)
	}
	return nil
}

// nodeYAML is a node.yaml as a person would write it.
func (p *devPlan) nodeYAML(n devNode) string {
	var seeds []string
	for _, other := range p.nodes {
		if other.name == other.site+"-1" && other.name != n.name {
			seeds = append(seeds, loopback(other.gossip))
		}
	}
	list, err := json.Marshal(seeds)
	if err != nil || seeds == nil {
		list = []byte("[]") // strings always encode
	}
	return fmt.Sprintf(`# Written by dsnode dev at each start.
version: 1
cluster: %s
name: %s
site: %s
data_dir: %s
api: {bind: %s}
admin: {bind: %s}
gossip: {bind: %s, key_file: %s}
rpc: {bind: %s, ca_file: %s, cert_file: %s, key_file: %s}
seeds: %s
operator_key: {file: %s}
shutdown: {delay: 0s, grace: 5s}
`, devName, n.name, n.site, quoted(p.path(n.name, "data")),
		quoted(loopback(n.api)), quoted(loopback(n.admin)), quoted(loopback(n.gossip)), quoted(p.path("gossip.key")),
		quoted(loopback(n.rpc)), quoted(p.path("ca.pem")), quoted(p.path(n.name, "cert.pem")), quoted(p.path(n.name, "key.pem")),
		list, quoted(p.path("operator.key")))
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

// once writes files that belong together unless all of them are there.
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
