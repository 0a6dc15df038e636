package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/dsnode/dsnode/cluster/config"
)

// devName is the cluster's name in certificates and in the status.
const devName = "dev"

// devSites are the sites of a cluster whose configuration dev writes itself.
var devSites = []devSite{
	{name: "shanghai-a", city: "shanghai"},
	{name: "shanghai-b", city: "shanghai"},
	{name: "beijing", city: "beijing"},
}

type devSite struct{ name, city string }

// devNode is one node and its ports on loopback.
type devNode struct {
	name, site              string
	api, admin, gossip, rpc int
}

// devSim is a site's simulated model server.
type devSim struct {
	site string
	port int
}

// devPlan is everything that dev will start. It is complete before anything starts.
type devPlan struct {
	dir       string // absolute; a temporary one is empty until it is made
	temporary bool
	record    devRecord
	sites     []devSite
	nodes     []devNode
	sims      []devSim
	text      string   // cluster.yaml of a new cluster
	models    []string // that clients may ask for
}

// devRecord is dev.json in the data directory. It has the flags that the cluster was
// started with, so that the same directory starts the same cluster.
type devRecord struct {
	Format       int       `json:"format"` // 1
	BasePort     int       `json:"base_port"`
	NodesPerSite int       `json:"nodes_per_site"`
	FoundedAt    time.Time `json:"founded_at,omitzero"`
}

const (
	devRecordFile   = "dev.json"
	devRecordFormat = 1
	devMaxNodes     = 9 // in a site; a tenth would get the port of the model server
)

// makeDevPlan makes the plan, or an error that says which flag to change.
func makeDevPlan(ctx context.Context, env *environment, f devFlags) (*devPlan, error) {
	if f.nodesPerSite < 1 || f.nodesPerSite > devMaxNodes {
		return nil, usage("for example --nodes-per-site 2", "--nodes-per-site must be 1 to %d, not %d", devMaxNodes, f.nodesPerSite)
	}
	if f.config != "" && len(f.upstreams) > 0 {
		return nil, usage("write the model servers into the file", "--config and --upstream can't be used together")
	}
	p := &devPlan{
		temporary: f.dataDir == "",
		record:    devRecord{Format: devRecordFormat, BasePort: f.basePort, NodesPerSite: f.nodesPerSite},
	}
	if err := p.checkRange(len(devSites)); err != nil { // before the generated cluster.yaml has such ports
		return nil, err
	}
	if err := p.openDir(f); err != nil {
		return nil, err
	}
	config, err := p.decideConfig(ctx, env, f)
	if err != nil {
		return nil, err
	}
	p.assignPorts(config)
	return p, p.checkRange(len(p.sites))
}

func (p *devPlan) checkRange(sites int) error {
	if last := devSimPort(p.record.BasePort, sites-1); p.record.BasePort < 1 || last > 65535 {
		return usage("try --base-port 8100", "--base-port %d needs ports up to %d", p.record.BasePort, last)
	}
	return nil
}

// openDir reads what an earlier run left in the data directory.
func (p *devPlan) openDir(f devFlags) error {
	if p.temporary {
		return nil
	}
	dir, err := filepath.Abs(f.dataDir)
	if err != nil {
		return fmt.Errorf("find %s: %w", f.dataDir, err)
	}
	p.dir = dir
	text, err := os.ReadFile(filepath.Join(dir, devRecordFile)) //nolint:gosec // the user's own folder
	if errors.Is(err, fs.ErrNotExist) {
		entries, err := os.ReadDir(dir)
		if err == nil && len(entries) > 0 {
			return failure("give an empty or a new folder", "%s contains files that are not of a dev cluster", dir)
		}
		return nil
	}
	if err != nil {
		return fmt.Errorf("read the record of the dev cluster: %w", err)
	}
	var old devRecord
	if err := json.Unmarshal(text, &old); err != nil || old.Format != devRecordFormat {
		return failure("give another folder, or remove this one", "this version can't read %s", filepath.Join(dir, devRecordFile))
	}
	switch {
	case old.FoundedAt.IsZero(): // it was never bootstrapped: the flags of this run count
		return nil
	case f.config != "" || len(f.upstreams) > 0:
		return failure("leave --config and --upstream out and use dsnode config apply, or give another folder",
			"the cluster in %s has a configuration already", dir)
	case old.BasePort != p.record.BasePort:
		return failure(fmt.Sprintf("start it with --base-port %d, or give another folder", old.BasePort),
			"the cluster in %s uses base port %d", dir, old.BasePort)
	case old.NodesPerSite > p.record.NodesPerSite:
		return failure(fmt.Sprintf("start it with --nodes-per-site %d, or give another folder", old.NodesPerSite),
			"the cluster in %s has %d nodes in each site", dir, old.NodesPerSite)
	}
	p.record.FoundedAt = old.FoundedAt
	return nil
}

// decideConfig chooses the cluster.yaml to start with, and parses it.
func (p *devPlan) decideConfig(ctx context.Context, env *environment, f devFlags) (*config.Config, error) {
	name := "the generated cluster.yaml"
	switch {
	case p.founded():
		name = filepath.Join(p.dir, "cluster.yaml")
		fallthrough
	case f.config != "":
		name = cmp.Or(f.config, name)
		text, err := os.ReadFile(name)
		if err != nil {
			return nil, fmt.Errorf("read the cluster's configuration: %w", err)
		}
		p.text = string(text)
	case len(f.upstreams) > 0:
		found, err := discoverUpstreams(ctx, env, f.upstreams)
		if err != nil {
			return nil, err
		}
		p.text = devClusterYAML(found)
	default:
		p.text = devClusterYAML(simulatedUpstreams(f.basePort))
	}
	return config.Parse(name, []byte(p.text))
}

// assignPorts gives every node its ports: node n of site s at P+100·s+10·(n−1).
func (p *devPlan) assignPorts(cfg *config.Config) {
	for _, name := range slices.SortedFunc(maps.Keys(cfg.Sites), func(a, b string) int {
		return cmp.Or(cmp.Compare(cfg.Sites[a].Priority, cfg.Sites[b].Priority), cmp.Compare(a, b))
	}) {
		p.sites = append(p.sites, devSite{name, cfg.Sites[name].City})
	}
	p.models = slices.Sorted(maps.Keys(cfg.Models))
	for s, site := range p.sites {
		base := p.record.BasePort + 100*s
		for n := range p.record.NodesPerSite {
			at := base + 10*n
			p.nodes = append(p.nodes, devNode{
				name: fmt.Sprintf("%s-%d", site.name, n+1), site: site.name,
				api: at + 1, admin: at + 2, gossip: at + 3, rpc: at + 4,
			})
		}
		// A site has a simulated model server if the configuration names it.
		if sim := devSimPort(p.record.BasePort, s); slices.ContainsFunc(slices.Collect(maps.Values(cfg.Upstreams)), func(u config.Upstream) bool {
			at, err := url.Parse(u.URL)
			return err == nil && at.Host == loopback(sim)
		}) {
			p.sims = append(p.sims, devSim{site.name, sim})
		}
	}
}

func devSimPort(basePort, site int) int { return basePort + 100*site + 90 }

func loopback(port int) string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(port)) }

// checkPorts names all ports that are in use, before anything starts.
func (p *devPlan) checkPorts() error {
	var taken []string
	try := func(port int, what string, udp bool) {
		l, err := net.Listen("tcp", loopback(port))
		if err == nil {
			err = l.Close()
		}
		if err == nil && udp {
			var c net.PacketConn
			if c, err = net.ListenPacket("udp", loopback(port)); err == nil {
				err = c.Close()
			}
		}
		if err != nil {
			taken = append(taken, fmt.Sprintf("%d (%s)", port, what))
		}
	}
	for _, n := range p.nodes {
		try(n.api, "api of "+n.name, false)
		try(n.admin, "admin of "+n.name, false)
		try(n.gossip, "gossip of "+n.name, true)
		try(n.rpc, "rpc of "+n.name, false)
	}
	for _, s := range p.sims {
		try(s.port, "simulated model server of "+s.site, false)
	}
	if len(taken) == 0 {
		return nil
	}
	ports := "port " + taken[0] + " is"
	if len(taken) > 1 {
		ports = "ports " + strings.Join(taken, ", ") + " are"
	}
	return failure("is another dsnode dev running? end it, or choose other ports with --base-port", "%s in use", ports)
}

func (p *devPlan) founded() bool { return !p.record.FoundedAt.IsZero() }

func (p *devPlan) setFounded() error {
	p.record.FoundedAt = time.Now().UTC()
	return p.writeRecord()
}

// firstModel is the model of the examples: deepseek-chat if there is one.
func (p *devPlan) firstModel() string {
	if slices.Contains(p.models, devDefaultModel) || len(p.models) == 0 {
		return devDefaultModel
	}
	return p.models[0]
}

func (p *devPlan) adminURLs() []string {
	var urls []string
	for _, n := range p.nodes {
		urls = append(urls, "http://"+loopback(n.admin))
	}
	return urls
}
