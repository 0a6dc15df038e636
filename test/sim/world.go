package sim

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing/synctest"
	"time"

	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/cluster/mesh"
	"github.com/dsnode/dsnode/node"
	"github.com/dsnode/dsnode/node/admin"
	"github.com/dsnode/dsnode/node/modelsim"
	"github.com/dsnode/dsnode/storage/keyring"
)

const (
	clusterName = "sim"
	modelName   = "deepseek-chat"
	streamModel = "deepseek-stream" // two seconds for an answer
	slowModel   = "deepseek-slow"   // eight minutes
	adminToken  = "simulated-operator"
	validFor    = 1000 * time.Hour
)

var siteNames = []struct{ name, city string }{
	{"shanghai-a", "shanghai"}, {"shanghai-b", "shanghai"}, {"beijing", "beijing"},
}

// World is a cluster in a bubble.
type World struct {
	dir      string
	random   *rand.Rand
	net      *Network
	logs     *logs
	began    time.Time
	machines []*Machine
	config   string
	ca       struct{ cert, key []byte }
	images   int

	processes sync.WaitGroup
	servers   sync.WaitGroup
	ctx       context.Context
	stop      context.CancelFunc
	clients   map[string]*http.Client // by site

	models map[string]*modelsim.Server // by site
	oracle *modelsim.Server            // answers as they do, without their faults
	// modelFault is the site whose model server has a fault, or had one until lately.
	modelFault atomic.Pointer[string]
}

// newWorld makes a cluster with these nodes a site. Nothing runs yet.
func newWorld(dir string, nodes []int, random *rand.Rand, l *logs) (*World, error) {
	w := &World{dir: dir, random: random, logs: l, began: time.Now(), clients: map[string]*http.Client{}, models: map[string]*modelsim.Server{}, oracle: modelsim.New(modelsim.Options{Tokens: streamTokens})}
	l.began = w.began
	w.ctx, w.stop = context.WithCancel(context.Background())
	w.net = NewNetwork(time.Duration(1+random.IntN(30))*time.Millisecond, random)
	var err error
	if w.ca.cert, w.ca.key, err = mesh.NewCA(clusterName, validFor+time.Hour); err != nil {
		return nil, err
	}
	files := map[string][]byte{
		"ca.pem": w.ca.cert, "gossip.key": []byte(base64.StdEncoding.EncodeToString(make([]byte, 32))),
		"token": []byte(adminToken), "operator.key": []byte(keyring.GenerateOperatorKey().Encode()),
	}
	for i, count := range nodes {
		site := siteNames[i].name
		w.net.Name(siteAddr(i, 1), Place{Site: site})
		for k := range count {
			m := &Machine{
				Name: fmt.Sprintf("%s-%d", site, k+1), Site: site, Addr: siteAddr(i, 10+k), w: w,
				clocks: &clocks{
					began: w.began, booted: time.Hour + time.Duration(random.Int64N(int64(time.Hour))),
					ahead: time.Duration(random.Int64N(int64(4*time.Second))) - 2*time.Second,
				},
			}
			w.net.Name(m.Addr, Place{Site: site, Node: m.Name})
			cert, key, err := mesh.Issue(w.ca.cert, w.ca.key, mesh.Identity{Cluster: clusterName, Site: site, Node: m.Name}, []string{m.Addr.String()}, validFor)
			if err != nil {
				return nil, err
			}
			files[m.Name+".pem"], files[m.Name+"-key.pem"] = cert, key
			w.machines = append(w.machines, m)
		}
		e := w.net.Endpoint(siteAddr(i, 1))
		w.clients[site] = &http.Client{
			Timeout:   10 * time.Second,
			Transport: &http.Transport{DialContext: dialWith(e), MaxIdleConnsPerHost: 64, DisableCompression: true},
		}
	}
	for name, b := range files {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			return nil, err
		}
	}
	w.config = clusterYAML(len(nodes))
	for i := range nodes {
		if err := w.serveModel(i); err != nil {
			return nil, err
		}
	}
	return w, nil
}

func siteAddr(site, number int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, byte(site + 1), 0, byte(number)})
}

func clusterYAML(sites int) string {
	var b strings.Builder
	line := func(format string, args ...any) { _, _ = fmt.Fprintf(&b, format+"\n", args...) }
	line("version: 1\naccess: {anonymous: true}\nsites:")
	for i := range sites {
		line("  %s: {city: %s, priority: %d}", siteNames[i].name, siteNames[i].city, i+1)
	}
	line("upstreams:")
	for i := range sites {
		line("  m%d: {site: %s, url: \"http://%s/v1\", max_concurrency: 400}", i, siteNames[i].name, netip.AddrPortFrom(siteAddr(i, 1), portUpstream))
	}
	line("models:")
	for name, model := range map[string]string{modelName: "m", streamModel: fmt.Sprintf("m@rate=20,tokens=%d", streamTokens), slowModel: "m@rate=2,tokens=1000"} {
		line("  %s:\n    serve:", name)
		for i := range sites {
			line("      - {upstream: m%d, model: %q}", i, model)
		}
	}
	return b.String()
}

// serveModel runs the site's model server.
func (w *World) serveModel(site int) error {
	ln, err := w.net.Endpoint(siteAddr(site, 1)).Listen(netip.AddrPortFrom(siteAddr(site, 1), portUpstream).String())
	if err != nil {
		return err
	}
	s := modelsim.New(modelsim.Options{FirstToken: 50 * time.Millisecond, Tokens: 8, Keep: 256})
	w.models[siteNames[site].name] = s
	w.servers.Go(func() { _ = s.Run(w.ctx, ln) }) // it returns nil when ctx has ended
	return nil
}

func (w *World) nodeConfig(m *Machine) *node.Config {
	c := node.DefaultConfig()
	c.Cluster, c.Name, c.Site = clusterName, m.Name, m.Site
	c.API = node.APIConfig{Bind: m.at(portAPI), Advertise: m.at(portAPI)}
	c.Admin = node.AdminConfig{Bind: m.at(portAdmin), Advertise: m.at(portAdmin), TokenFile: filepath.Join(w.dir, "token")}
	c.Gossip = node.GossipConfig{Bind: m.at(portGossip), Advertise: m.at(portGossip), KeyFile: filepath.Join(w.dir, "gossip.key")}
	c.RPC = node.RPCConfig{Bind: m.at(portRPC), Advertise: m.at(portRPC), TLS: node.PeerTLS{
		CertFile: filepath.Join(w.dir, m.Name+".pem"), KeyFile: filepath.Join(w.dir, m.Name+"-key.pem"), CAFile: filepath.Join(w.dir, "ca.pem"),
	}}
	for _, other := range w.machines {
		if other != m {
			c.Seeds = append(c.Seeds, other.at(portRPC))
		}
	}
	c.OperatorKey.File = filepath.Join(w.dir, "operator.key")
	c.Shutdown = node.ShutdownConfig{Grace: config.Duration(5 * time.Second)}
	return c
}

// settle waits until nothing happens any more at this moment of virtual time, so that no
// write to a disk is under way. Only the driver calls it.
func (w *World) settle() { synctest.Wait() }

// call sends a request from within the node's site.
func (w *World) call(ctx context.Context, m *Machine, method, url, body string, out any) (int, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://"+url, strings.NewReader(body))
	if err != nil {
		return 0, err
	}
	if strings.Contains(url, "/admin/") {
		req.Header.Set("Authorization", "Bearer "+adminToken)
	}
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	return w.do(m.Site, req, out)
}

func (w *World) do(site string, req *http.Request, out any) (int, error) {
	resp, err := w.clients[site].Do(req)
	if err != nil {
		return 0, err
	}
	b, err := io.ReadAll(resp.Body)
	_ = resp.Body.Close() // it was read
	if err != nil {
		return 0, err
	}
	if resp.StatusCode >= 300 {
		return resp.StatusCode, fmt.Errorf("%s %s: %d %s", req.Method, req.URL.Path, resp.StatusCode, strings.TrimSpace(string(b[:min(len(b), 300)])))
	}
	if out != nil {
		err = json.Unmarshal(b, out)
	}
	return resp.StatusCode, err
}

// Status asks a node.
func (w *World) Status(m *Machine) (*admin.Status, error) {
	ctx, cancel := context.WithTimeout(w.ctx, 2*time.Second)
	defer cancel()
	s := &admin.Status{}
	_, err := w.call(ctx, m, http.MethodGet, m.at(portAdmin)+"/admin/v1/status", "", s)
	return s, err
}

// boot starts all nodes, founds the cluster and waits until every node says that it is
// healthy.
func (w *World) boot() error {
	for _, m := range w.machines {
		if err := m.Start(); err != nil {
			return err
		}
	}
	first := w.machines[0]
	if err := w.within(time.Minute, func() error {
		_, err := w.call(w.ctx, first, http.MethodPost, first.at(portAdmin)+"/admin/v1/bootstrap?author=sim", w.config, nil)
		return err
	}); err != nil {
		return err
	}
	return w.within(2*time.Minute, w.healthy)
}

func (w *World) healthy() error {
	for _, m := range w.machines {
		s, err := w.Status(m)
		if err != nil {
			return err
		}
		if !s.Healthy {
			return fmt.Errorf("%s says: %s", m.Name, strings.Join(s.Reasons, "; "))
		}
		if len(s.Nodes) != len(w.machines) {
			return fmt.Errorf("%s knows %d nodes", m.Name, len(s.Nodes))
		}
	}
	return nil
}

func (w *World) within(d time.Duration, ok func() error) error {
	end := time.Now().Add(d)
	for {
		err := ok()
		if err == nil {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("not within %s: %w", d, err)
		}
		time.Sleep(250 * time.Millisecond)
	}
}

// close ends everything; the bubble ends when no goroutine is left.
func (w *World) close() error {
	var errs []error
	for _, m := range w.machines {
		errs = append(errs, m.Crash(true))
	}
	w.stop()
	w.processes.Wait()
	w.servers.Wait()
	for _, c := range w.clients {
		c.CloseIdleConnections()
	}
	// Goroutines of libraries end by their timeouts, and virtual time stops with the caller.
	time.Sleep(2 * time.Minute)
	return errors.Join(errs...)
}
