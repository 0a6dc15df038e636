//go:build linux

package main

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/dsnode/dsnode/cluster/mesh"
	"github.com/dsnode/dsnode/node"
	"github.com/dsnode/dsnode/node/admin"
	"github.com/dsnode/dsnode/storage/keyring"
)

const (
	clusterName = "bench"
	siteName    = "here"
	nodeName    = "here-1"
	keysValid   = 24 * time.Hour
)

// buildNode builds dsnode as users run it, without the race detector also when GOFLAGS
// enables it.
func (s *sandbox) buildNode(ctx context.Context) (string, error) {
	binary := filepath.Join(s.dir, "dsnode.built") // a node's directory is called dsnode
	cmd := exec.CommandContext(ctx, "go", "build", "-race=false", "-o", binary, "github.com/dsnode/dsnode/cmd/dsnode")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build dsnode: %w\n%s", err, out)
	}
	return binary, nil
}

// dsnode is a node in front of one upstream.
type dsnode struct {
	*process
	api   string // host:port
	rpc   string // likewise
	admin *admin.Client
	key   string // an API key
}

// startNode writes the files of a node, starts it and bootstraps a cluster with a
// cluster.yaml whose only site is siteName.
func (s *sandbox) startNode(ctx context.Context, name, binary, text string) (*dsnode, error) {
	common, err := newCommonFiles()
	if err != nil {
		return nil, fmt.Errorf("configure dsnode: %w", err)
	}
	return s.bootstrapNode(ctx, name, binary, text, common)
}

// startSite starts several nodes of the site, bootstraps the cluster at the first, and
// waits until all are members.
func (s *sandbox) startSite(ctx context.Context, binary, text string, count int) ([]*dsnode, error) {
	common, err := newCommonFiles()
	if err != nil {
		return nil, fmt.Errorf("configure dsnode: %w", err)
	}
	first, err := s.bootstrapNode(ctx, "dsnode", binary, text, common)
	if err != nil {
		return nil, err
	}
	nodes := []*dsnode{first}
	for i := 1; i < count; i++ {
		n, err := s.runNode(fmt.Sprintf("dsnode-%d", i+1), fmt.Sprintf("%s-%d", siteName, i+1), binary, common, first.rpc)
		if err != nil {
			return nil, err
		}
		nodes = append(nodes, n)
	}
	return nodes, first.until(ctx, func() error {
		status, err := first.admin.Status(ctx)
		if err != nil {
			return err
		}
		alive := 0
		for _, n := range status.Nodes {
			if n.State == "alive" {
				alive++
			}
		}
		if alive != count {
			return fmt.Errorf("%d of %d nodes are alive", alive, count)
		}
		return nil
	})
}

// runNode starts a node that joins the cluster of the seeds.
func (s *sandbox) runNode(name, node, binary string, common *commonFiles, seeds ...string) (*dsnode, error) {
	dir := filepath.Join(s.dir, name)
	conf, err := common.nodeFiles(dir, node, seeds)
	if err != nil {
		return nil, fmt.Errorf("configure dsnode: %w", err)
	}
	n := &dsnode{api: conf.API.Bind, rpc: conf.RPC.Bind}
	if n.process, err = s.start(name, exec.Command(binary, "run", "--config", filepath.Join(dir, "node.yaml"))); err != nil {
		return nil, err
	}
	n.admin, err = admin.NewClient([]string{"http://" + conf.Admin.Bind}, admin.ClientOptions{Author: "bench", Timeout: 20 * time.Second})
	return n, err
}

func (s *sandbox) bootstrapNode(ctx context.Context, name, binary, text string, common *commonFiles) (*dsnode, error) {
	n, err := s.runNode(name, nodeName, binary, common)
	if err != nil {
		return nil, err
	}
	if err := n.until(ctx, func() error { return n.admin.Bootstrap(ctx, []byte(text), "bench") }); err != nil {
		return nil, fmt.Errorf("bootstrap the cluster: %w", err)
	}
	// With an API key, as in production.
	key, err := n.admin.CreateAPIKey(ctx, admin.APIKeyRequest{Tenant: "bench", Note: "bench"})
	if err != nil {
		return nil, fmt.Errorf("make an API key: %w", err)
	}
	n.key = key.Secret
	return n, nil
}

// profile writes a profile of the node to a file.
func (n *dsnode) profile(ctx context.Context, kind string, d time.Duration, file string) error {
	url := fmt.Sprintf("%s/debug/pprof/%s?seconds=%d", n.admin.URLs()[0], kind, max(1, int(d.Seconds())))
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	return os.WriteFile(file, text, 0o644)
}

// until calls try until it returns no error, for 20 s at most.
func (p *process) until(ctx context.Context, try func() error) error {
	deadline := time.Now().Add(20 * time.Second)
	for {
		err := try()
		if err == nil {
			return nil
		}
		if gone := p.alive(); gone != nil {
			return gone
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%w\nend of the log of %s: %s", err, p.name, p.logTail())
		}
		if err := pause(ctx, 20*time.Millisecond); err != nil {
			return err
		}
	}
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(d):
		return nil
	}
}

// commonFiles are the files that all nodes of a cluster share.
type commonFiles struct {
	caCert, caKey, gossip, operator []byte
}

func newCommonFiles() (*commonFiles, error) {
	caCert, caKey, err := mesh.NewCA(clusterName, keysValid+time.Hour)
	if err != nil {
		return nil, err
	}
	gossip := make([]byte, 32)
	_, _ = rand.Read(gossip) // never fails; it ends the process instead
	return &commonFiles{
		caCert: caCert, caKey: caKey, gossip: []byte(base64.StdEncoding.EncodeToString(gossip)),
		operator: []byte(keyring.GenerateOperatorKey().Encode()),
	}, nil
}

// nodeFiles writes a node's certificate, keys and node.yaml to a directory.
func (f *commonFiles) nodeFiles(dir, name string, seeds []string) (*node.Config, error) {
	if err := os.MkdirAll(filepath.Join(dir, "data"), 0o700); err != nil {
		return nil, err
	}
	id := mesh.Identity{Cluster: clusterName, Site: siteName, Node: name}
	cert, key, err := mesh.Issue(f.caCert, f.caKey, id, []string{"127.0.0.1"}, keysValid)
	if err != nil {
		return nil, err
	}
	c := node.DefaultConfig()
	c.Cluster, c.Site, c.Name, c.DataDir, c.Seeds = clusterName, siteName, name, "data", seeds
	c.Gossip.KeyFile = "gossip.key"
	c.RPC.TLS = node.PeerTLS{CertFile: "cert.pem", KeyFile: "key.pem", CAFile: "ca.pem"}
	c.OperatorKey.File = "operator.key"
	for _, bind := range []*string{&c.API.Bind, &c.Admin.Bind, &c.Gossip.Bind, &c.RPC.Bind} {
		port, err := freePort()
		if err != nil {
			return nil, err
		}
		*bind = fmt.Sprintf("127.0.0.1:%d", port)
	}
	text, err := c.Encode()
	if err != nil {
		return nil, err
	}
	var failed []error
	for name, content := range map[string][]byte{
		"ca.pem": f.caCert, "cert.pem": cert, "key.pem": key, "node.yaml": text,
		"gossip.key": f.gossip, "operator.key": f.operator,
	} {
		failed = append(failed, os.WriteFile(filepath.Join(dir, name), content, 0o600))
	}
	return c, errors.Join(failed...)
}
