package failover

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/cluster/agreed"
)

// keepStreams lets every node of a world run its Adopter while it leads, and have one
// stream of its own agreed on while it has a lease: when another node gets the stream it
// opens the next one at once. It ends with the function that it returns.
func (w *world) keepStreams() (stop func()) {
	ctx, cancel := context.WithCancel(w.t.Context())
	var work sync.WaitGroup
	for _, name := range w.names {
		n := w.nodes[name]
		work.Go(func() { n.adopt(ctx) })
		work.Go(func() { n.open(ctx) })
	}
	return func() {
		cancel()
		work.Wait()
	}
}

// adopt runs the node's Adopter, like cluster.WhileLeader.
func (n *node) adopt(ctx context.Context) {
	a := NewAdopter(Options{
		Name: n.name, Site: n.site, Agreement: n, Health: func() cluster.Health { return cluster.Health{} },
		Boottime: n.w.now, Quarantined: func() bool { return false },
		Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry(),
	}, func() (Judgement, bool) {
		n.w.mu.Lock()
		c := n.coord
		n.w.mu.Unlock()
		return c.Judgement()
	})
	for wait(ctx, 50*time.Millisecond) == nil {
		l, leads := n.Leading()
		if !leads {
			continue
		}
		leading, end := context.WithCancel(ctx)
		done := make(chan struct{})
		go func() {
			defer close(done)
			_ = a.Lead(leading, l) // it ends with leading, never with an error
		}()
		for wait(leading, 50*time.Millisecond) == nil {
			if now, leads := n.Leading(); !leads || now.Term != l.Term {
				break
			}
		}
		end()
		<-done
	}
}

func (n *node) open(ctx context.Context) {
	for opened := 1; wait(ctx, 250*time.Millisecond) == nil; {
		n.w.mu.Lock()
		runs := n.runs()
		n.w.mu.Unlock()
		if left, _ := n.Lease(); !runs || left <= 0 || len(n.ownStreams()) > 0 {
			continue
		}
		d := agreed.StreamOpen{Origin: n.name, Incarnation: fmt.Sprintf("%032x", opened)}
		if _, err := n.Propose(ctx, agreed.CmdStreamOpen, d); err == nil {
			opened++
		}
	}
}

func (n *node) ownStreams() (own []agreed.JobStream) {
	for _, j := range n.State().Streams {
		if j.Origin == n.name && j.Owner == n.name {
			own = append(own, j)
		}
	}
	return own
}

// owners counts the streams by origin and owner: "a1>b1".
func (w *world) owners() map[string]int {
	of := map[string]int{}
	for _, j := range w.agreed().Streams {
		of[j.Origin+">"+j.Owner]++
	}
	return of
}

func (w *world) allHaveStreams() bool {
	of := w.owners()
	for _, name := range w.names {
		if of[name+">"+name] != 1 {
			return false
		}
	}
	return true
}

// A leader that hears nobody, while Raft's messages pass and the others get their leases
// from it, takes nobody for gone. Neither does one that was stopped.
func TestNobodyAdoptsFromLivingNodes(t *testing.T) {
	for _, make := range []func(*testing.T) *world{ones(1), twos(2)} {
		for name, fault := range map[string]func(w *world, on bool){
			"the leader hears nobody": func(w *world, on bool) {
				w.mu.Lock()
				defer w.mu.Unlock()
				w.deaf["a"] = on
			},
			"the leader is stopped": func(w *world, on bool) {
				if on {
					w.pause("a1")
					w.pass(2 * time.Second)
					w.resume("a1")
				}
			},
		} {
			simulate(t, make, func(t *testing.T, w *world) {
				defer w.keepStreams()()
				w.until("each node has a stream", 10*time.Second, w.allHaveStreams)
				w.lead("a1")
				fault(w, true)
				w.pass(time.Minute)
				fault(w, false)
				w.pass(20 * time.Second)
				if of := w.owners(); len(of) != len(w.names) || !w.allHaveStreams() {
					t.Errorf("%s: streams are owned as %v", name, of)
				}
			})
		}
	}
}

// A node that is lost is gone ten seconds later, and its stream gets another owner: a
// neighbour, else a node of the primary. Also that of the leader and of the primary.
func TestStreamsOfLostNodesAreAdopted(t *testing.T) {
	for _, c := range []struct {
		name  string
		world func(*testing.T) *world
		lost  []string
		stays string // the site of the new owners
	}{
		{"a remote site", ones(3), []string{"c1"}, "a"},
		{"the leader, the only node of the primary", ones(4), []string{"a1"}, "b"},
		{"a neighbour of the leader", twos(5), []string{"a2"}, "a"},
		{"the leader", twos(6), []string{"a1"}, "a"},
		{"a site of two nodes", twos(7), []string{"b1", "b2"}, "a"},
	} {
		simulate(t, c.world, func(t *testing.T, w *world) {
			defer w.keepStreams()()
			w.until("each node has a stream", 10*time.Second, w.allHaveStreams)
			w.lead("a1")
			w.pass(adoptAfter)
			w.kill(c.lost...)
			took := w.until(c.name+" is adopted", 25*time.Second, func() bool {
				streams := w.agreed().Streams
				for _, j := range streams {
					for _, lost := range c.lost {
						if j.Owner == lost {
							return false
						}
					}
				}
				return true
			})
			if took < adoptAfter-time.Second {
				t.Errorf("%s: adopted after %s", c.name, took)
			}
			for _, j := range w.agreed().Streams {
				if j.Before != "" && j.Owner[:1] != c.stays {
					t.Errorf("%s: %s has the stream of %s", c.name, j.Owner, j.Origin)
				}
			}
		})
	}
}
