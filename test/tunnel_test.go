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

// tunnelled is how long it may take until the peers of two sites reach each
// other through a third.
const tunnelled = 5 * time.Second

// The link between two sites is cut both ways, and a third reaches both: in a
// few seconds they reach each other through it. Nothing fails over, no client
// notices, and a request that only the site behind the cut can answer is
// answered. When the link is whole again they go back to it.
func TestFailoverNotNeededAroundOneCutLink(t *testing.T) {
	sharing(t)
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
	if err := s.askEach(t.Context(), first, farModel); err != nil { // on connections that the cut will leave dead
		t.Fatal(err)
	}
	net.Cut(0, 1)
	net.Cut(1, 0)
	hanging := make(chan error, 1) // a patient client, whose request goes into the cut
	go func() { hanging <- s.askEach(t.Context(), first, farModel) }()
	t.Logf("the link was cut, %s led; a request got through after %v", leader,
		s.lab.WaitFor(within(tunnelled), "a request to the model server behind the cut", func(ctx context.Context) error {
			ctx, cancel := context.WithTimeout(ctx, time.Second)
			defer cancel()
			return s.askEach(ctx, first, farModel)
		}))
	cut := time.Now()
	if err := <-hanging; err != nil {
		t.Errorf("a request that was on its way: %v", err)
	}
	t.Logf("one that was on its way was answered %v later", time.Since(cut))
	t.Logf("all hear each other after %v more", s.lab.WaitHealthy(within(tunnelled)))
	for _, n := range first.Nodes {
		var status admin.Status
		// A request may have found its way before the pings did.
		s.lab.WaitFor(within(tunnelled), n.Name+" to say how it reaches whom", func(ctx context.Context) (err error) {
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
			if seen.Via != "" && !strings.Contains(n.LogTail(1<<20), fmt.Sprintf(`"peer":%q,"through":%q`, seen.Name, seen.Via)) {
				t.Errorf("the log of %s does not say how it reaches %s", n.Name, seen.Name)
			}
		}
	}

	// It stays so, whoever asks.
	found := time.Now()
	for time.Since(found) < 10*time.Second {
		for _, site := range []*lab.Site{first, second} {
			if err := s.askEach(t.Context(), site, farModel); err != nil {
				t.Fatalf("%v after the detour was found: %v", time.Since(found), err)
			}
		}
		s.hearEachOther(first, second)
	}
	s.goOn()
	if site, now, leader := s.primary(); now != epoch {
		t.Errorf("%s is the primary in epoch %d, %s leads; want epoch %d still", site.Name, now, leader, epoch)
	}

	net.MendAll()
	took := s.lab.WaitFor(within(30*time.Second), "all to go the direct way again", func(ctx context.Context) error {
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
	t.Logf("%v after the link was mended all was direct again, and no tunnel stood", took)
	s.lab.WaitHealthy(within(returns))
	s.end()
}

// farModel is served by the second site's model server alone.
const farModel = "far"

func onlyInTheSecondSite(text string) string {
	return text + "  " + farModel + ":\n    serve:\n      - {upstream: shanghai-b-sim, model: \"m\"}\n"
}

// askEach asks a model of every node of a site, from within.
func (s *story) askEach(ctx context.Context, site *lab.Site, model string) error {
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

// hearEachOther fails the test when a node of one site has not heard one of the
// other for the patience.
func (s *story) hearEachOther(a, b *lab.Site) {
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
