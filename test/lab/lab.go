//go:build linux

package lab

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dsnode/dsnode/node"
	"github.com/dsnode/dsnode/node/admin"
)

// Topology says what to start. The zero value is three sites with one node each, on
// links without delay and loss.
type Topology struct {
	// Nodes of each site, such as {2, 2, 1}. The first site begins as the primary. The
	// second is in the same city, each other in another city.
	Nodes []int
	// Link is the initial state of every link between two sites.
	Link Link
	// Cluster edits the generated cluster.yaml.
	Cluster func(text string) string
	// Node edits each node.yaml before it is written.
	Node func(*node.Config)
	// Binary that all nodes begin with; Build's when empty.
	Binary string
	// Alone starts only the first node of the first site, with a configuration
	// without other sites, for tests that let a cluster grow.
	Alone bool
}

// RoundTrip returns a link that takes half of a round trip's time.
func RoundTrip(d time.Duration) Link { return Link{Delay: d / 2} }

// siteNames are the sites in the order of Topology.Nodes.
var siteNames = []struct{ name, city string }{
	{"shanghai-a", "shanghai"}, {"shanghai-b", "shanghai"}, {"beijing", "beijing"}, {"guangzhou", "guangzhou"}, {"chengdu", "chengdu"},
}

// Lab is a running cluster with its network.
type Lab struct {
	Net   *Network
	Sites []*Site
	// Random is seeded with LAB_SEED or with a random number that the test logs.
	Random   *rand.Rand
	Observer *Observer

	t    testing.TB
	dir  string
	text string // cluster.yaml
	top  Topology
}

// Site is a data centre with nodes and a simulated model server.
type Site struct {
	Index int
	Name  string
	City  string
	Nodes []*Node
	Model *ModelServer

	lab  *Lab
	http *http.Client
}

const (
	startWithin   = time.Minute // a machine that builds and tests at once is slow
	pollEvery     = 50 * time.Millisecond
	clientTimeout = 60 * time.Second
)

// Start builds the binary, starts the sites, bootstraps the cluster and waits until
// it is healthy. At the end of the test the laws are checked and all processes are
// killed; a failed test logs the last lines of the nodes' logs.
func Start(t testing.TB, top Topology) *Lab {
	t.Helper()
	Require(t)
	if raceDetector && os.Getenv("LAB_RACE") != "1" {
		t.Skip("the race detector slows clients and links down too much for promised times: run without -race, or with LAB_RACE=1")
	}
	if len(top.Nodes) == 0 {
		top.Nodes = []int{1, 1, 1}
	}
	if top.Binary == "" {
		top.Binary = Build(t)
	}
	l := &Lab{t: t, top: top, dir: t.TempDir()}
	seed := seedFor(t)
	l.Random = rand.New(rand.NewPCG(seed, 1))
	network, err := NewNetwork(len(top.Nodes), seed)
	if err != nil {
		t.Fatal(err)
	}
	l.Net = network
	t.Cleanup(l.close)
	l.Net.SetAll(top.Link)
	for i, n := range top.Nodes {
		l.Sites = append(l.Sites, newSite(l, i, n))
	}
	l.writeFiles()
	for _, s := range l.Sites {
		s.Model.Start()
	}
	l.Observer = l.observe()
	if top.Alone {
		l.Sites[0].Nodes[0].Start()
	} else {
		for _, n := range l.Nodes() {
			n.Start()
		}
	}
	l.bootstrap()
	l.WaitHealthy(startWithin)
	return l
}

func newSite(l *Lab, index, nodes int) *Site {
	s := &Site{Index: index, Name: siteNames[index].name, City: siteNames[index].city, lab: l}
	s.http = &http.Client{
		Timeout: clientTimeout,
		Transport: &http.Transport{
			DialContext: func(ctx context.Context, _, addr string) (net.Conn, error) {
				return l.Net.Dial(ctx, index, addr)
			},
			MaxIdleConnsPerHost: 1024, IdleConnTimeout: time.Minute, DisableCompression: true,
		},
	}
	s.Model = newModelServer(l, s)
	for i := range nodes {
		s.Nodes = append(s.Nodes, newNode(l, s, i))
	}
	return s
}

// Client returns an HTTP client in the site. Its requests to nodes of the same site
// pass no link.
func (s *Site) Client() *http.Client { return s.http }

// Kill kills all nodes of the site at once. Its model server goes on.
func (s *Site) Kill() { each(s.Nodes, (*Node).Kill) }

// Stop sends SIGSTOP to all nodes of the site at once.
func (s *Site) Stop() { each(s.Nodes, (*Node).Stop) }

// Continue ends a Stop.
func (s *Site) Continue() { each(s.Nodes, (*Node).Continue) }

// Start starts all nodes of the site.
func (s *Site) Start() { each(s.Nodes, (*Node).Start) }

// Nodes returns all nodes, site by site.
func (l *Lab) Nodes() []*Node {
	var all []*Node
	for _, s := range l.Sites {
		all = append(all, s.Nodes...)
	}
	return all
}

// Running returns the nodes with a process, also a stopped one.
func (l *Lab) Running() []*Node {
	var all []*Node
	for _, n := range l.Nodes() {
		if n.Running() {
			all = append(all, n)
		}
	}
	return all
}

// Site finds a site by name.
func (l *Lab) Site(name string) *Site {
	l.t.Helper()
	for _, s := range l.Sites {
		if s.Name == name {
			return s
		}
	}
	l.t.Fatalf("there is no site %q", name)
	return nil
}

// ClusterYAML returns the configuration that the cluster was bootstrapped with.
func (l *Lab) ClusterYAML() string { return l.text }

func (l *Lab) bootstrap() {
	l.t.Helper()
	first := l.Sites[0].Nodes[0]
	l.WaitFor(startWithin, "the first node to be bootstrapped", func(ctx context.Context) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, first.AdminURL()+"/admin/v1/bootstrap?author=lab", strings.NewReader(l.text))
		if err != nil {
			return err
		}
		_, err = first.ask(req)
		return err
	})
}

// WaitHealthy waits until every running node reports a healthy cluster, shows every
// running node as alive with its current process id, and all name the same leader.
func (l *Lab) WaitHealthy(within time.Duration) time.Duration {
	l.t.Helper()
	return l.WaitFor(within, "the cluster to be healthy", func(ctx context.Context) error {
		leaders := map[string]bool{}
		for _, n := range l.Running() {
			status, err := n.Status(ctx)
			if err != nil {
				return err
			}
			if !status.Healthy {
				return fmt.Errorf("%s says: %s", n.Name, strings.Join(status.Reasons, "; "))
			}
			if err := l.sees(n, status); err != nil {
				return err
			}
			if status.Raft.Leader == nil {
				return fmt.Errorf("%s knows no leader", n.Name)
			}
			leaders[*status.Raft.Leader] = true
		}
		if len(leaders) != 1 {
			return fmt.Errorf("nodes name several leaders: %v", slices.Collect(maps.Keys(leaders)))
		}
		return nil
	})
}

// sees checks that a node shows every running node as alive, with its process id.
func (l *Lab) sees(observer *Node, status admin.Status) error {
	for _, n := range l.Running() {
		i := slices.IndexFunc(status.Nodes, func(s admin.NodeStatus) bool { return s.Name == n.Name })
		if i < 0 {
			return fmt.Errorf("%s does not know %s", observer.Name, n.Name)
		}
		seen := status.Nodes[i]
		if seen.State != admin.NodeAlive || seen.PID == nil || *seen.PID != n.PID() {
			return fmt.Errorf("%s shows %s as %s, want alive with process %d: %+v", observer.Name, n.Name, seen.State, n.PID(), seen)
		}
	}
	return nil
}

// WaitPrimary waits until every running node reports that site as the primary, and
// returns what they report.
func (l *Lab) WaitPrimary(within time.Duration, site string) admin.Primary {
	l.t.Helper()
	var primary admin.Primary
	l.WaitFor(within, site+" to be the primary", func(ctx context.Context) error {
		for _, n := range l.Running() {
			status, err := n.Status(ctx)
			if err != nil {
				return err
			}
			if status.Primary == nil || status.Primary.Site != site {
				return fmt.Errorf("%s says %+v", n.Name, status.Primary)
			}
			primary = *status.Primary
		}
		return nil
	})
	return primary
}

// WaitFor calls condition until it returns no error, and returns how long that took.
// After the limit the test fails with the last error.
func (l *Lab) WaitFor(within time.Duration, what string, condition func(context.Context) error) time.Duration {
	l.t.Helper()
	begun := time.Now()
	for {
		ctx, cancel := context.WithTimeout(context.Background(), min(within, 3*time.Second))
		err := condition(ctx)
		cancel()
		took := time.Since(begun)
		if err == nil {
			return took
		}
		if took > within {
			l.t.Fatalf("waited %s for %s: %v", within, what, err)
		}
		pause(pollEvery)
	}
}

// pause waits before a condition is checked again.
func pause(d time.Duration) { <-time.After(d) }

func (l *Lab) close() {
	if l.Observer != nil {
		l.Observer.stop()
		for _, broken := range l.Observer.Laws() {
			l.t.Errorf("a law was broken: %s", broken)
		}
	}
	for _, s := range l.Sites {
		for _, n := range s.Nodes {
			n.end()
		}
		s.Model.end()
		s.http.CloseIdleConnections()
	}
	l.Net.Close()
	if l.t.Failed() {
		for _, n := range l.Nodes() {
			l.t.Logf("--- end of the log of %s\n%s", n.Name, n.LogTail(25))
		}
	}
	if keep := os.Getenv("LAB_KEEP"); keep != "" {
		to := filepath.Join(keep, strings.ReplaceAll(l.t.Name(), "/", "_"))
		if err := os.CopyFS(to, os.DirFS(l.dir)); err != nil && !errors.Is(err, os.ErrExist) {
			l.t.Logf("keep the lab's files: %v", err)
		}
		l.t.Logf("the lab's files are in %s", to)
	}
}

// seedFor returns LAB_SEED or a random number, and logs it.
func seedFor(t testing.TB) uint64 {
	t.Helper()
	seed := rand.Uint64()
	if text := os.Getenv("LAB_SEED"); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatalf("LAB_SEED: %v", err)
		}
	}
	t.Logf("LAB_SEED=%d", seed)
	return seed
}

// each calls f for all nodes at the same time and waits.
func each(nodes []*Node, f func(*Node)) {
	var wg sync.WaitGroup
	for _, n := range nodes {
		wg.Go(func() { f(n) })
	}
	wg.Wait()
}
