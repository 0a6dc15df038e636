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

// Topology says what to start. The zero value is 1+1+1 on perfect links.
type Topology struct {
	// Nodes of each site: {2, 2, 1}. The first site is the primary at first, the
	// second in the same city, all others in cities of their own.
	Nodes []int
	// Link is every link between two sites at the start. RoundTrip makes one.
	Link Link
	// Cluster changes the generated cluster.yaml.
	Cluster func(text string) string
	// Node changes a node.yaml before it is written.
	Node func(*node.Config)
	// Alone starts the first node of the first site only, with a configuration
	// that knows no other site: what a cluster grows from.
	Alone bool
}

// RoundTrip is a link with half of a round trip's time in each direction.
func RoundTrip(d time.Duration) Link { return Link{Delay: d / 2} }

// siteNames and their cities, in the order of Topology.Nodes.
var siteNames = []struct{ name, city string }{
	{"shanghai-a", "shanghai"}, {"shanghai-b", "shanghai"}, {"beijing", "beijing"}, {"guangzhou", "guangzhou"}, {"chengdu", "chengdu"},
}

// Lab is a running cluster on a network of its own.
type Lab struct {
	Net   *Network
	Sites []*Site
	// Random is seeded by LAB_SEED, or else by a number that is in the test's log.
	Random   *rand.Rand
	Observer *Observer

	t      testing.TB
	dir    string
	binary string
	text   string // cluster.yaml
	top    Topology
}

// Site is a data centre: its nodes and its simulated model server.
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

// Start builds the binary, starts the sites, bootstraps the cluster, and waits
// until it is healthy. At the end of the test it checks the laws, ends all
// processes and, when the test failed, shows the end of their logs.
func Start(t testing.TB, top Topology) *Lab {
	t.Helper()
	Require(t)
	if raceDetector && os.Getenv("LAB_RACE") != "1" {
		t.Skip("clients and links that the race detector slows down say nothing about times: run without -race, or with LAB_RACE=1")
	}
	if len(top.Nodes) == 0 {
		top.Nodes = []int{1, 1, 1}
	}
	l := &Lab{t: t, top: top, binary: Build(t), dir: t.TempDir()}
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

// Client is an HTTP client inside the site. What it asks of its own site passes
// no link.
func (s *Site) Client() *http.Client { return s.http }

// Kill kills all nodes of the site at once. Its model server lives.
func (s *Site) Kill() { each(s.Nodes, (*Node).Kill) }

// Stop freezes all nodes of the site at once.
func (s *Site) Stop() { each(s.Nodes, (*Node).Stop) }

// Continue ends a Stop.
func (s *Site) Continue() { each(s.Nodes, (*Node).Continue) }

// Start starts all nodes of the site.
func (s *Site) Start() { each(s.Nodes, (*Node).Start) }

// Nodes are all nodes, site by site.
func (l *Lab) Nodes() []*Node {
	var all []*Node
	for _, s := range l.Sites {
		all = append(all, s.Nodes...)
	}
	return all
}

// Running are the nodes whose process lives, stopped or not.
func (l *Lab) Running() []*Node {
	var all []*Node
	for _, n := range l.Nodes() {
		if n.Running() {
			all = append(all, n)
		}
	}
	return all
}

// Site finds one by name.
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

// ClusterYAML is the configuration that the cluster was founded with.
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

// WaitHealthy waits until every running node says that the cluster is healthy,
// sees every running node as the process that it is now, and all name one leader.
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

// sees compares what a node says of the others with what is.
func (l *Lab) sees(observer *Node, status admin.Status) error {
	for _, n := range l.Running() {
		i := slices.IndexFunc(status.Nodes, func(s admin.NodeStatus) bool { return s.Name == n.Name })
		if i < 0 {
			return fmt.Errorf("%s does not know %s", observer.Name, n.Name)
		}
		seen := status.Nodes[i]
		if seen.State != admin.NodeAlive || seen.PID == nil || *seen.PID != n.PID() {
			return fmt.Errorf("%s sees %s as %s, its process is %d: %+v", observer.Name, n.Name, seen.State, n.PID(), seen)
		}
	}
	return nil
}

// WaitPrimary waits until every running node of the sites named (all when none
// is) holds that site for the primary, and gives what they agree on.
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

// WaitFor asks again and again until there is no error, and gives the time that
// took. When it takes too long the test ends with the last error.
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

// pause is between two looks at a condition.
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

// seedFor is LAB_SEED, or a new number; a failed test tells it.
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

// each runs f for all nodes at the same time and waits.
func each(nodes []*Node, f func(*Node)) {
	var wg sync.WaitGroup
	for _, n := range nodes {
		wg.Go(func() { f(n) })
	}
	wg.Wait()
}
