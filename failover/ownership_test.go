package failover

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/dsnode/dsnode/cluster/agreed"
)

const (
	testLease = 1200 * time.Millisecond
	testWait  = testLease * 11 / 10
)

// ownershipWorld is a log of agreed states, nodes whose copies lag behind it, and
// leases that are handed from node to node.
type ownershipWorld struct {
	now   time.Duration
	log   []*agreed.State
	nodes []*ownershipNode
}

type ownershipNode struct {
	world     *ownershipWorld
	name      string
	applied   int
	until     time.Duration
	heard     uint64
	ownership *Ownership
}

func newOwnershipWorld(names ...string) *ownershipWorld {
	s := &agreed.State{ClusterID: "c", Generation: agreed.Generation{Number: 1}, Nodes: map[string]agreed.Node{}}
	for _, name := range names {
		s.Nodes[name] = agreed.Node{Name: name, Site: name[:1]}
	}
	w := &ownershipWorld{now: time.Hour, log: []*agreed.State{s}}
	for _, name := range names {
		n := &ownershipNode{world: w, name: name}
		n.restart()
		w.nodes = append(w.nodes, n)
	}
	return w
}

func (n *ownershipNode) restart() {
	n.until, n.heard = 0, 0
	n.ownership = NewOwnership(n.name, n, func() time.Duration { return testWait }, func() time.Duration { return n.world.now })
}

func (n *ownershipNode) State() *agreed.State     { return n.world.log[n.applied] }
func (n *ownershipNode) Changed() <-chan struct{} { return nil }
func (n *ownershipNode) OwnershipLease() (time.Duration, uint64) {
	return n.until - n.world.now, n.heard
}

// Propose commits at once, and the proposer has applied what it proposed.
func (n *ownershipNode) Propose(_ context.Context, t agreed.CommandType, data any) (uint64, error) {
	err := n.world.commit(t, data)
	n.applied = len(n.world.log) - 1
	return uint64(n.applied), err
}

func (w *ownershipWorld) newest() *agreed.State { return w.log[len(w.log)-1] }

func (w *ownershipWorld) commit(t agreed.CommandType, data any) error {
	c, err := agreed.NewCommand(t, time.Unix(0, 0), data)
	if err != nil {
		return err
	}
	c.Index, c.Term = uint64(100+len(w.log)), 1
	next, err := agreed.Apply(w.newest(), c)
	w.log = append(w.log, next)
	return err
}

// lease is what a node gets from a tick that was proposed a while ago.
func (n *ownershipNode) lease(proposed time.Duration, heard uint64) {
	n.until, n.heard = max(n.until, proposed+testLease), max(n.heard, heard)
}

func TestOwnershipChecks(t *testing.T) {
	key := agreed.StreamKey("a1", fmt.Sprintf("%032x", 1))
	w := newOwnershipWorld("a1", "a2")
	a1, a2 := w.nodes[0], w.nodes[1]
	refused := func(n *ownershipNode, why string) {
		t.Helper()
		if _, err := n.ownership.Check(key); !errors.Is(err, ErrNotOwner) {
			t.Fatalf("%s: %v", why, err)
		}
	}
	a1.lease(w.now, 0)
	refused(a1, "a stream that is not agreed on")
	token, err := a1.ownership.Open(t.Context(), fmt.Sprintf("%032x", 1))
	if err != nil {
		t.Fatal(err)
	}
	p, err := a1.ownership.Check(key)
	if err != nil || p.Token != token || !p.InTime() {
		t.Fatalf("its own new stream: %+v %v", p, err)
	}
	w.now += StartWithin
	if p.InTime() {
		t.Fatal("a permit outlives StartWithin")
	}
	if len(a1.ownership.Mine()) != 1 {
		t.Fatal("a1 does not know what it owns")
	}
	w.now += testLease
	refused(a1, "without a lease")

	a2.applied = a1.applied
	a2.lease(w.now, w.newest().Ownership)
	refused(a2, "another's stream")
	if err := w.commit(agreed.CmdStreamOwn, agreed.StreamOwn{Stream: key, Owner: "a2", Expect: token, Term: 1}); err != nil {
		t.Fatal(err)
	}
	a2.applied = len(w.log) - 1
	refused(a2, "before the lease of the owner before has ended")
	a1.lease(w.now, w.newest().Ownership)
	refused(a1, "a lease from after a change that it has not seen")
	w.now += testWait
	a2.lease(w.now, w.newest().Ownership)
	if p, err := a2.ownership.Check(key); err != nil || p.Token.Compare(token) <= 0 {
		t.Fatalf("the adopter, later: %+v %v", p, err)
	}
	a2.restart()
	a2.lease(w.now, w.newest().Ownership)
	refused(a2, "an adopter that has just started")
}

// However copies lag, leases wander and nodes restart: at no moment may two nodes
// start jobs of one stream.
func TestNeverTwoOwners(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := newOwnershipWorld("a1", "a2", "b1")
		key := agreed.StreamKey("a1", fmt.Sprintf("%032x", 1))
		if _, err := w.nodes[0].ownership.Open(t.Context(), fmt.Sprintf("%032x", 1)); err != nil {
			t.Fatal(err)
		}
		var permits []Permit
		var holders []string
		for range rapid.IntRange(20, 200).Draw(t, "steps") {
			n := rapid.SampledFrom(w.nodes).Draw(t, "node")
			switch rapid.SampledFrom([]string{"time", "time", "time", "tick", "tick", "relay", "relay", "apply", "adopt", "restart"}).Draw(t, "what") {
			case "time":
				w.now += time.Duration(rapid.Int64Range(0, int64(testLease/2)).Draw(t, "step"))
			case "tick": // committed by a leader whose copy is the newest
				n.lease(w.now-time.Duration(rapid.Int64Range(0, int64(testLease)).Draw(t, "age")), w.newest().Ownership)
			case "relay": // n asks another, which answers with what it has left
				other := rapid.SampledFrom(w.nodes).Draw(t, "from")
				n.until = max(n.until, min(other.until, w.now+testLease))
				n.heard = max(n.heard, other.heard, other.State().Ownership)
			case "apply":
				n.applied = min(n.applied+rapid.IntRange(1, 3).Draw(t, "entries"), len(w.log)-1)
			case "adopt":
				_ = w.commit(agreed.CmdStreamOwn, agreed.StreamOwn{
					Stream: key, Owner: n.name, Expect: w.newest().Streams[key].Token, Term: 1,
				})
			case "restart":
				n.restart()
			}
			for _, n := range w.nodes {
				if p, err := n.ownership.Check(key); err == nil {
					permits, holders = append(permits, p), append(holders, n.name)
				}
			}
			var valid string
			for i, p := range permits {
				if !p.InTime() {
					continue
				}
				if valid != "" && valid != holders[i] {
					t.Fatalf("%s and %s may start jobs of one stream at the same time", valid, holders[i])
				}
				valid = holders[i]
			}
		}
	})
}

func TestAdopt(t *testing.T) {
	stream := func(origin, owner string) agreed.JobStream {
		return agreed.JobStream{Origin: origin, Incarnation: "1", Site: origin[:1], Owner: owner, Token: agreed.FenceToken{Generation: 1, Index: 5}}
	}
	here := func(name string) AdoptionNode { return AdoptionNode{Name: name, Site: name[:1], Able: true} }
	gone := func(name string) AdoptionNode {
		return AdoptionNode{Name: name, Site: name[:1], Silence: adoptAfter}
	}
	draining := AdoptionNode{Name: "a2", Site: "a"}
	tests := []struct {
		name string
		v    AdoptionView
		to   string
		why  AdoptionReason
	}{
		{"all here", AdoptionView{MayReassign: true, Nodes: []AdoptionNode{here("a1"), here("a2")}, Streams: []agreed.JobStream{stream("a1", "a1")}}, "", ""},
		{"silent for less than ten seconds", AdoptionView{MayReassign: true, Nodes: []AdoptionNode{{Name: "a1", Site: "a", Silence: adoptAfter - 1}, here("a2")}, Streams: []agreed.JobStream{stream("a1", "a1")}}, "", ""},
		{"gone: a neighbour", AdoptionView{MayReassign: true, Primary: "b", Nodes: []AdoptionNode{gone("a1"), here("a2"), here("b1")}, Streams: []agreed.JobStream{stream("a1", "a1")}}, "a2", AdoptNeighbour},
		{"gone, and the neighbour drains: the primary", AdoptionView{MayReassign: true, Primary: "b", Nodes: []AdoptionNode{gone("a1"), draining, here("b1")}, Streams: []agreed.JobStream{stream("a1", "a1")}}, "b1", AdoptPrimary},
		{"site gone: the primary", AdoptionView{MayReassign: true, Primary: "b", Nodes: []AdoptionNode{gone("a1"), gone("a2"), here("b1"), here("c1")}, Streams: []agreed.JobStream{stream("a1", "a1")}}, "b1", AdoptPrimary},
		{"the primary is gone too, not replaced yet", AdoptionView{MayReassign: true, Primary: "a", Nodes: []AdoptionNode{gone("a1"), here("b1")}, Streams: []agreed.JobStream{stream("a1", "a1")}}, "", ""},
		{"an adopter that is gone: its own neighbour", AdoptionView{MayReassign: true, Primary: "b", Nodes: []AdoptionNode{gone("a1"), gone("b1"), here("b2"), here("a2")}, Streams: []agreed.JobStream{stream("a1", "b1")}}, "b2", AdoptNeighbour},
		{"removed for good", AdoptionView{MayReassign: true, Primary: "b", Nodes: []AdoptionNode{here("a2"), here("b1")}, Streams: []agreed.JobStream{stream("a1", "a1")}}, "a2", AdoptRemoved},
		{"the idlest neighbour", AdoptionView{MayReassign: true, Primary: "a", Nodes: []AdoptionNode{gone("a1"), here("a2"), here("a3")}, Streams: []agreed.JobStream{stream("a1", "a1"), stream("a2", "a2")}}, "a3", AdoptNeighbour},
		{"a leader that may not yet", AdoptionView{Primary: "b", Nodes: []AdoptionNode{gone("a1"), here("a2")}, Streams: []agreed.JobStream{stream("a1", "a1")}}, "", ""},
		{"quarantined", AdoptionView{MayReassign: true, Quarantined: true, Nodes: []AdoptionNode{gone("a1"), here("a2")}, Streams: []agreed.JobStream{stream("a1", "a1")}}, "", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := Adopt(tt.v)
			if tt.to == "" {
				if len(got) != 0 {
					t.Fatalf("adopted %+v", got)
				}
				return
			}
			if len(got) != 1 || got[0].To != tt.to || got[0].Reason != tt.why {
				t.Fatalf("got %+v, want %s because of %s", got, tt.to, tt.why)
			}
		})
	}
}

// Streams of a lost site are spread, and each goes to somebody who is able.
func TestAdoptSpreads(t *testing.T) {
	v := AdoptionView{MayReassign: true, Primary: "b", Nodes: []AdoptionNode{
		{Name: "a1", Site: "a", Silence: adoptAfter}, {Name: "b1", Site: "b", Able: true}, {Name: "b2", Site: "b", Able: true},
	}}
	for n := range 10 {
		v.Streams = append(v.Streams, agreed.JobStream{Origin: "a1", Incarnation: fmt.Sprint(n), Site: "a", Owner: "a1"})
	}
	load := map[string]int{}
	for _, a := range Adopt(v) {
		load[a.To]++
	}
	if load["b1"] != 5 || load["b2"] != 5 {
		t.Fatalf("spread as %v", load)
	}
}
