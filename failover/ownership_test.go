package failover

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/dsnode/dsnode/cluster/agreed"
)

const (
	testLease = 1200 * time.Millisecond
	testWait  = testLease * 11 / 10
)

// claimWorld is a log of agreed states, nodes whose copies lag behind it, and
// leases that are handed from node to node.
type claimWorld struct {
	now   time.Duration
	log   []*agreed.State
	nodes []*claimNode
	// releasedAt is when all nodes of the primary site confirmed the switchover that
	// is announced; zero: they have not.
	releasedAt time.Duration
}

type claimNode struct {
	world     *claimWorld
	name      string
	applied   int
	until     time.Duration // of the lease
	epoch     uint64        // heard of with it
	changed   uint64        // change of ownership heard of with it
	fence     *Fence
	ownership *Ownership
}

func newClaimWorld(names ...string) *claimWorld {
	s := &agreed.State{
		ClusterID: "c", Generation: agreed.Generation{Number: 1}, Nodes: map[string]agreed.Node{},
		Primary: agreed.Primary{Site: "a", Epoch: 1},
	}
	for _, name := range names {
		s.Nodes[name] = agreed.Node{Name: name, Site: name[:1]}
	}
	w := &claimWorld{now: time.Hour, log: []*agreed.State{s}}
	for _, name := range names {
		n := &claimNode{world: w, name: name}
		n.restart(0)
		w.nodes = append(w.nodes, n)
	}
	return w
}

// restart begins a new process, whose copy of the state is an earlier one until it
// has applied the log again.
func (n *claimNode) restart(applied int) {
	n.applied, n.until, n.epoch, n.changed = applied, 0, 0, 0
	n.fence = NewFence(n.name, n.site(), n, func() time.Duration { return testWait }, func() time.Duration { return n.world.now }, slog.New(slog.DiscardHandler))
	n.ownership = NewOwnership(n.fence, n)
}

func (n *claimNode) site() string                   { return n.name[:1] }
func (n *claimNode) State() *agreed.State           { return n.world.log[n.applied] }
func (n *claimNode) Changed() <-chan struct{}       { return nil }
func (n *claimNode) LeaseChanged() <-chan struct{}  { return nil }
func (n *claimNode) Lease() (time.Duration, uint64) { return n.until - n.world.now, n.epoch }
func (n *claimNode) OwnershipLease() (time.Duration, uint64) {
	return n.until - n.world.now, n.changed
}

// Propose commits at once, and the proposer has applied what it proposed.
func (n *claimNode) Propose(_ context.Context, t agreed.CommandType, data any) (uint64, error) {
	err := n.world.commit(t, data)
	n.applied = len(n.world.log) - 1
	return uint64(n.applied), err
}

func (w *claimWorld) newest() *agreed.State { return w.log[len(w.log)-1] }

func (w *claimWorld) commit(t agreed.CommandType, data any) error {
	c, err := agreed.NewCommand(t, time.Unix(0, 0), data)
	if err != nil {
		return err
	}
	c.Index, c.Term = uint64(100+len(w.log)), 1
	next, err := agreed.Apply(w.newest(), c)
	w.log = append(w.log, next)
	return err
}

// lease is what a node gets from a tick that was proposed a while ago and committed
// after the entry that made a state.
func (n *claimNode) lease(proposed time.Duration, s *agreed.State) {
	n.until = max(n.until, proposed+testLease)
	n.epoch, n.changed = max(n.epoch, s.Primary.Epoch), max(n.changed, s.Ownership)
}

// relay is what a node gets from another, which answers with what it has left.
func (n *claimNode) relay(from *claimNode) {
	n.until = max(n.until, min(from.until, n.world.now+testLease))
	n.epoch = max(n.epoch, from.epoch, from.State().Primary.Epoch)
	n.changed = max(n.changed, from.changed, from.State().Ownership)
}

func TestOwnershipChecks(t *testing.T) {
	key := agreed.StreamKey("a1", fmt.Sprintf("%032x", 1))
	w := newClaimWorld("a1", "a2")
	a1, a2 := w.nodes[0], w.nodes[1]
	refused := func(n *claimNode, why string) {
		t.Helper()
		if _, err := n.ownership.Check(key); !errors.Is(err, ErrNotOwner) {
			t.Fatalf("%s: %v", why, err)
		}
	}
	a1.lease(w.now, w.newest())
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
	a2.lease(w.now, w.newest())
	refused(a2, "another's stream")
	if err := w.commit(agreed.CmdStreamOwn, agreed.StreamOwn{Stream: key, Owner: "a2", Expect: token, Term: 1}); err != nil {
		t.Fatal(err)
	}
	a2.applied = len(w.log) - 1
	refused(a2, "before the lease of the owner before has ended")
	a1.lease(w.now, w.newest())
	refused(a1, "a lease from after a change that it has not seen")
	w.now += testWait
	a2.lease(w.now, w.newest())
	if p, err := a2.ownership.Check(key); err != nil || p.Token.Compare(token) <= 0 {
		t.Fatalf("the adopter, later: %+v %v", p, err)
	}
	a2.restart(a2.applied)
	a2.lease(w.now, w.newest())
	refused(a2, "an adopter that has just started")
}

// switchover takes one step of a planned switchover, as handoff does: announce,
// release, and within a lease's length of the release promote or roll back.
func (w *claimWorld) switchover(to string) error {
	s := w.newest()
	if s.Switchover == nil {
		w.releasedAt = 0
		return w.commit(agreed.CmdSwitchover, agreed.SwitchoverSet{Next: &agreed.Switchover{
			ID: fmt.Sprint(len(w.log)), From: s.Primary.Site, To: to, Deadline: time.Unix(1, 0),
		}})
	}
	switch {
	case w.releasedAt == 0:
		ended, cancel := context.WithCancel(context.Background())
		cancel()
		for _, n := range w.nodes {
			if n.site() == s.Switchover.From && n.fence.Release(ended, s.Switchover.ID) != nil {
				return nil
			}
		}
		w.releasedAt = w.now
		return nil
	case w.now-w.releasedAt > testLease:
		return w.commit(agreed.CmdSwitchover, agreed.SwitchoverSet{Expect: s.Switchover.ID})
	}
	return w.commit(agreed.CmdPromote, agreed.Promote{
		Site: s.Switchover.To, ExpectEpoch: s.Primary.Epoch, Generation: 1, Kind: agreed.FailoverPlanned, SwitchoverID: s.Switchover.ID, Released: true,
	})
}

// A node confirms a switchover and is restarted. Its new process has forgotten that,
// and its copy is from before the announcement. The promotion comes as late as
// handoff allows it, and a lease from just before it runs for L.
func TestRestartedNodeHasForgottenItsRelease(t *testing.T) {
	w := newClaimWorld("a1", "b1")
	a1, b1 := w.nodes[0], w.nodes[1]
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	acts := func(n *claimNode, want bool) {
		t.Helper()
		if got := n.fence.Acting(); got != want {
			t.Fatalf("%s acts as primary: %v, want %v", n.name, got, want)
		}
	}
	acts(a1, false) // it has just started
	acts(b1, false)
	w.now += 2 * testWait
	a1.lease(w.now, w.newest())
	acts(a1, true)
	must(w.switchover("b"))
	a1.applied, b1.applied = 1, 1
	must(w.switchover("b"))
	if w.releasedAt == 0 {
		t.Fatal("a1 did not confirm")
	}
	a1.restart(0)
	acts(a1, false)
	w.now += testLease
	a1.lease(w.now, w.newest())
	must(w.switchover("b"))
	b1.applied = 2
	b1.lease(w.now, w.newest())
	acts(b1, true)
	for end := w.now + 2*testLease; w.now < end; w.now += testLease / 12 {
		acts(a1, false)
	}
}

// However copies lag, leases wander, nodes restart and switchovers end: at no moment
// may two nodes start jobs of one stream, or two sites act as primary.
func TestNoClaimHasTwoHolders(t *testing.T) {
	type permitted struct {
		Permit
		by    *claimNode
		fence *Fence // of the process; one that has ended starts nothing
	}
	rapid.Check(t, func(t *rapid.T) {
		w := newClaimWorld("a1", "a2", "b1")
		key := agreed.StreamKey("a1", fmt.Sprintf("%032x", 1))
		if _, err := w.nodes[0].ownership.Open(t.Context(), fmt.Sprintf("%032x", 1)); err != nil {
			t.Fatal(err)
		}
		holders := map[Claim]func(*claimNode) string{
			Primary:     func(n *claimNode) string { return n.site() },
			Stream(key): func(n *claimNode) string { return n.name },
		}
		permits := map[Claim][]permitted{}
		// Drawn evenly: rapid's ranges prefer their ends.
		times := rapid.SampledFrom([]time.Duration{0, StartWithin - 1, testLease / 12, testLease / 4, testLease / 2})
		ages := rapid.SampledFrom([]time.Duration{0, testLease / 2, testLease - 1})
		var late *claimNode // it gets nothing from the leader
		for range rapid.IntRange(100, 1500).Draw(t, "steps") {
			n := rapid.SampledFrom(w.nodes).Draw(t, "node")
			var err error
			switch rapid.SampledFrom([]string{
				"time", "time", "time", "time", "time", "relay", "relay", "apply", "late", "in time", "adopt", "promote",
				"switchover", "switchover", "switchover", "switchover", "restart",
			}).Draw(t, "what") {
			case "time": // and a tick of a leader whose copy is the newest
				w.now += times.Draw(t, "passes")
				for _, n := range w.nodes {
					if n != late {
						n.applied = len(w.log) - 1
						n.lease(w.now-ages.Draw(t, "age"), w.newest())
					}
				}
			case "relay":
				n.relay(rapid.SampledFrom(w.nodes).Draw(t, "from"))
			case "apply":
				n.applied = min(n.applied+1, len(w.log)-1)
			case "late":
				late = n
			case "in time":
				late = nil
			case "adopt":
				err = w.commit(agreed.CmdStreamOwn, agreed.StreamOwn{
					Stream: key, Owner: n.name, Expect: w.newest().Streams[key].Token, Term: 1,
				})
			case "promote":
				p := w.newest().Primary
				err = w.commit(agreed.CmdPromote, agreed.Promote{Site: n.site(), ExpectEpoch: p.Epoch, Generation: 1, Kind: agreed.FailoverUnplanned})
			case "switchover":
				err = w.switchover(n.site())
			case "restart":
				n.restart(rapid.IntRange(0, n.applied).Draw(t, "applied"))
			}
			if err != nil {
				t.Fatal(err)
			}
			for c, holder := range holders {
				for _, n := range w.nodes {
					if p, err := n.fence.Check(c); err == nil {
						permits[c] = append(permits[c], permitted{p, n, n.fence})
					}
				}
				permits[c] = slices.DeleteFunc(permits[c], func(p permitted) bool { return !p.InTime() || p.by.fence != p.fence })
				for _, p := range permits[c] {
					if first := permits[c][0].by; holder(p.by) != holder(first) {
						t.Fatalf("%s and %s may start something at the same time: claim %s", first.name, p.by.name, c)
					}
				}
			}
		}
	})
}
