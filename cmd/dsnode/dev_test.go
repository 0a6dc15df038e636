package main

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/node"
)

func devEnvironment(t *testing.T) *environment {
	t.Helper()
	cache := t.TempDir()
	return &environment{
		stdin: strings.NewReader(""), stdout: &bytes.Buffer{}, stderr: &bytes.Buffer{},
		getenv:   func(string) string { return "" },
		version:  "test",
		cacheDir: func() (string, error) { return cache, nil },
	}
}

func plan(t *testing.T, f devFlags) *devPlan {
	t.Helper()
	p, err := makeDevPlan(t.Context(), devEnvironment(t), f)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// TestDevPorts: node/API.md documents the ports.
func TestDevPorts(t *testing.T) {
	p := plan(t, devFlags{nodesPerSite: 2, basePort: 8100})
	want := []devNode{
		{"shanghai-a-1", "shanghai-a", 8101, 8102, 8103, 8104},
		{"shanghai-a-2", "shanghai-a", 8111, 8112, 8113, 8114},
		{"shanghai-b-1", "shanghai-b", 8201, 8202, 8203, 8204},
		{"shanghai-b-2", "shanghai-b", 8211, 8212, 8213, 8214},
		{"beijing-1", "beijing", 8301, 8302, 8303, 8304},
		{"beijing-2", "beijing", 8311, 8312, 8313, 8314},
	}
	if !slices.Equal(p.nodes, want) {
		t.Errorf("nodes:\n got %v\nwant %v", p.nodes, want)
	}
	if sims := []devSim{{"shanghai-a", 8190}, {"shanghai-b", 8290}, {"beijing", 8390}}; !slices.Equal(p.sims, sims) {
		t.Errorf("simulators: got %v, want %v", p.sims, sims)
	}
	if p.firstModel() != "deepseek-chat" || !slices.Contains(p.models, "deepseek-reasoner") {
		t.Errorf("models: %v", p.models)
	}
}

// TestDevFilesAreValid: a node accepts the files that dev writes.
func TestDevFilesAreValid(t *testing.T) {
	p := plan(t, devFlags{nodesPerSite: 1, basePort: 8100, dataDir: filepath.Join(t.TempDir(), "made by dev")})
	if err := p.writeFiles(); err != nil {
		t.Fatal(err)
	}
	ca, err := os.ReadFile(p.path("ca.pem"))
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range p.nodes {
		c, err := node.LoadConfig(p.path(n.name, "node.yaml"))
		if err != nil {
			t.Fatalf("%s: %v", n.name, err)
		}
		if c.DataDir != p.path(n.name, "data") || len(c.Seeds) != 2 {
			t.Errorf("%s: data_dir %s, seeds %v", n.name, c.DataDir, c.Seeds)
		}
	}
	if err := p.writeFiles(); err != nil {
		t.Fatal(err)
	}
	if again, err := os.ReadFile(p.path("ca.pem")); err != nil || !bytes.Equal(ca, again) {
		t.Errorf("a second start made a new CA (%v)", err)
	}
	if info, err := os.Stat(p.path("ca-key.pem")); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the CA's key: %v, %v", info.Mode(), err)
	}
}

func TestDevStartsTheSameClusterAgain(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "cluster")
	first := plan(t, devFlags{nodesPerSite: 2, basePort: 8100, dataDir: dir})
	if err := first.writeFiles(); err != nil {
		t.Fatal(err)
	}
	if err := first.setFounded(); err != nil {
		t.Fatal(err)
	}
	if again := plan(t, devFlags{nodesPerSite: 3, basePort: 8100, dataDir: dir}); !again.founded() || len(again.nodes) != 9 {
		t.Errorf("a third node in each site: founded %v, nodes %v", again.founded(), again.nodes)
	}
	for name, c := range map[string]struct {
		flags devFlags
		want  string
	}{
		"other ports":     {devFlags{nodesPerSite: 2, basePort: 9100, dataDir: dir}, "uses base port 8100"},
		"fewer nodes":     {devFlags{nodesPerSite: 1, basePort: 8100, dataDir: dir}, "has 2 nodes in each site"},
		"other upstreams": {devFlags{nodesPerSite: 2, basePort: 8100, dataDir: dir, upstreams: []string{"http://x/v1"}}, "has a configuration already"},
		"no dev cluster":  {devFlags{nodesPerSite: 1, basePort: 8100, dataDir: filepath.Dir(dir)}, "files that are not of a dev cluster"},
		"no nodes":        {devFlags{nodesPerSite: 0, basePort: 8100}, "must be 1 to 9"},
		"too many nodes":  {devFlags{nodesPerSite: 10, basePort: 8100}, "must be 1 to 9"},
		"high ports":      {devFlags{nodesPerSite: 1, basePort: 65400}, "needs ports up to 65690"},
		"both sources":    {devFlags{nodesPerSite: 1, basePort: 8100, config: "f", upstreams: []string{"http://x/v1"}}, "can't be used together"},
	} {
		_, err := makeDevPlan(t.Context(), devEnvironment(t), c.flags)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want it to contain %q", name, err, c.want)
		}
	}
}

func TestDevNamesThePortsInUse(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = taken.Close() }()
	port := taken.Addr().(*net.TCPAddr).Port
	p := &devPlan{nodes: []devNode{{name: "beijing-1", api: port, admin: port, gossip: 0, rpc: 0}}}
	err = p.checkPorts()
	for _, want := range []string{fmt.Sprintf("%d (api of beijing-1)", port), fmt.Sprintf("%d (admin of beijing-1)", port)} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want it to contain %q", err, want)
		}
	}
}

func TestDevDiscoversModels(t *testing.T) {
	server := func(body string, status int) string {
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path != "/v1/models" {
				status = http.StatusNotFound
			}
			w.WriteHeader(status)
			_, _ = w.Write([]byte(body))
		}))
		t.Cleanup(s.Close)
		return s.URL + "/v1"
	}
	big := server(`{"data":[{"id":"org/Big: \"1\""},{"id":"small"},{"id":"small"}]}`, 200)
	small := server(`{"data":[{"id":"small"}]}`, 200)

	found, err := discoverUpstreams(t.Context(), devEnvironment(t), []string{"beijing=" + big + ",kind=vllm", small + "/,kind=ollama"})
	if err != nil {
		t.Fatal(err)
	}
	text := devClusterYAML(found)
	c, err := config.Parse("cluster.yaml", []byte(text))
	if err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	if len(c.Upstreams) != 4 || c.Upstreams["beijing-vllm-1"].Kind != config.KindVLLM || c.Upstreams["shanghai-b-ollama-2"].URL != small {
		t.Errorf("upstreams: %+v", c.Upstreams)
	}
	chat := c.Models["deepseek-chat"].Serve
	if len(chat) != 1 || chat[0] != (config.Serve{Upstream: "beijing-vllm-1", Model: `org/Big: "1"`}) {
		t.Errorf("deepseek-chat is served by %+v, want the first model found", chat)
	}
	if n := len(c.Models["small"].Serve); n != 4 {
		t.Errorf("small is served by %d upstreams, want all 4", n)
	}

	for name, c := range map[string]struct{ value, want string }{
		"no list":      {server("hello", 200), "did not return a list of models"},
		"no models":    {server(`{"data":[]}`, 200), "lists no models"},
		"a refusal":    {server("", 401), "401"},
		"unknown kind": {small + ",kind=gpt", `no kind "gpt"`},
		"unknown site": {"paris=" + small, `no site "paris"`},
		"no scheme":    {"localhost:8000/v1", "must begin with http"},
		"no key":       {small + ",key-env=NOT_SET", "NOT_SET is empty"},
		"other option": {small + ",speed=9", "unknown option"},
		"no server":    {"http://127.0.0.1:1/v1", "can't list the models"},
	} {
		_, err := discoverUpstreams(context.Background(), devEnvironment(t), []string{c.value})
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want it to contain %q", name, err, c.want)
		}
	}
}
