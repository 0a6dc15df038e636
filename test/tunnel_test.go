//go:build linux

package test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/dsnode/dsnode/node/admin"
	"github.com/dsnode/dsnode/test/lab"
)

// tunnelled bounds the time until two sites reach each other through a third.
const tunnelled = 5 * time.Second

// The link between two sites is cut in both directions while a third site reaches
// both. Within a few seconds the two reach each other through the third. There is no
// failover, no client fails, and a request is answered that only the other site's model
// server can answer. After the cut the two use their link again.
func TestFailoverNotNeededAroundOneCutLink(t *testing.T) {
	parallelIfShort(t)
	shapes := [][]int{{1, 1, 1}}
	if full() {
		shapes = append(shapes, []int{2, 2, 1})
	}
	for _, nodes := range shapes {
		t.Run(shape(nodes), func(t *testing.T) { aroundOneCut(t, nodes) })
	}
}

func aroundOneCut(t *testing.T, nodes []int) {
	s := begin(t, lab.Topology{Nodes: nodes, Cluster: onlyInTheSecondSite})
	_, epoch, leader := s.primary()
	first, second, net := s.lab.Sites[0], s.lab.Sites[1], s.lab.Net
	if err := s.askEach(t.Context(), first, farModel); err != nil { // opens connections that the cut makes useless
		t.Fatal(err)
	}
	net.Cut(0, 1)
	net.Cut(1, 0)
	hanging := make(chan error, 1) // of a request that is sent into the cut and waits
	go func() { hanging <- s.askEach(t.Context(), first, farModel) }()
	t.Logf("the link was cut, %s led; a request was answered after %v", leader,
		s.lab.WaitFor(within(tunnelled), "a request to the model server behind the cut", func(ctx context.Context) error {
			ctx, cancel := context.WithTimeout(ctx, time.Second)
			defer cancel()
			return s.askEach(ctx, first, farModel)
		}))
	cut := time.Now()
	if err := <-hanging; err != nil {
		t.Errorf("a request sent right after the cut: %v", err)
	}
	t.Logf("a request sent right after the cut was answered %v later", time.Since(cut))
	t.Logf("all hear each other after %v more", s.lab.WaitHealthy(within(tunnelled)))
	for _, n := range first.Nodes {
		var status admin.Status
		// A request may have taken the new route before the pings did.
		s.lab.WaitFor(within(tunnelled), n.Name+" to show its routes", func(ctx context.Context) (err error) {
			if status, err = n.Status(ctx); err != nil {
				return err
			}
			for _, seen := range status.Nodes {
				if around := seen.Site == second.Name; around != (seen.Via != "") {
					return fmt.Errorf("it reaches %s through %q", seen.Name, seen.Via)
				}
			}
			return nil
		})
		for _, seen := range status.Nodes {
			if seen.Via != "" && !strings.Contains(n.LogTail(1<<20), fmt.Sprintf(`"peer":%q,"relay":%q`, seen.Name, seen.Via)) {
				t.Errorf("the log of %s does not name the route to %s", n.Name, seen.Name)
			}
		}
	}

	// The route lasts, in both directions.
	found := time.Now()
	for time.Since(found) < 10*time.Second {
		for _, site := range []*lab.Site{first, second} {
			if err := s.askEach(t.Context(), site, farModel); err != nil {
				t.Fatalf("%v after the route was found: %v", time.Since(found), err)
			}
		}
		s.hearEachOther(first, second)
	}
	s.continueLoad()
	if site, now, leader := s.primary(); now != epoch {
		t.Errorf("%s is the primary in epoch %d, %s leads; want epoch %d still", site.Name, now, leader, epoch)
	}

	net.MendAll()
	took := s.lab.WaitFor(within(30*time.Second), "all connections to be direct again", func(ctx context.Context) error {
		for _, n := range s.lab.Nodes() {
			m, err := n.Metrics(ctx)
			switch {
			case err != nil:
				return err
			case m["dsnode_peer_detours"] != 0:
				return fmt.Errorf("%s has %v detours", n.Name, m["dsnode_peer_detours"])
			case m[`dsnode_peer_connections{direction="dialled",kind="relayed"}`] != 0:
				return fmt.Errorf("%s relays %v tunnels", n.Name, m[`dsnode_peer_connections{direction="dialled",kind="relayed"}`])
			}
		}
		return s.askEach(ctx, first, farModel)
	})
	t.Logf("%v after the link was mended all connections were direct, without a tunnel", took)
	s.lab.WaitHealthy(within(returns))
	s.end()
}

// farModel is served by the second site's model server only.
const farModel = "far"

func onlyInTheSecondSite(text string) string {
	return text + "  " + farModel + ":\n    serve:\n      - {upstream: shanghai-b-sim, model: \"m\"}\n"
}

// askEach sends a request to every node of a site.
func (s *scenario) askEach(ctx context.Context, site *lab.Site, model string) error {
	for _, n := range site.Nodes {
		text, err := s.lab.Ask(ctx, n, model, "Hello")
		if err != nil {
			return fmt.Errorf("ask %s of %s: %w", model, n.Name, err)
		}
		if text == "" {
			return errors.New("an empty answer")
		}
	}
	return nil
}

// hearEachOther fails the test if a node of one site has not heard a node of the
// other for longer than the patience.
func (s *scenario) hearEachOther(a, b *lab.Site) {
	s.t.Helper()
	for _, sites := range [][2]*lab.Site{{a, b}, {b, a}} {
		for _, n := range sites[0].Nodes {
			status, err := n.Status(s.t.Context())
			if err != nil {
				s.t.Fatal(err)
			}
			for _, seen := range status.Nodes {
				if seen.Site == sites[1].Name && (seen.LastHeardSeconds == nil || *seen.LastHeardSeconds > 2.5) {
					s.t.Errorf("%s does not hear %s: %+v", n.Name, seen.Name, seen)
				}
			}
		}
	}
}
