package cluster

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/clusterpb"
	"github.com/dsnode/dsnode/cluster/mesh"
)

// remove removes a node from the agreed state and from raft's configuration, as an operator
// and then the placement of voters do.
func remove(t *testing.T, name string, others ...*member) {
	t.Helper()
	eventually(t, "the cluster is at feature level 2", 20*time.Second, func() bool { return others[0].State().FeatureLevel >= 2 }, others...)
	if _, err := others[0].Propose(deadline(t, 15*time.Second), agreed.CmdNodeRemove, agreed.NodeRemove{Name: name, By: "test"}); err != nil {
		t.Fatal(err)
	}
	eventually(t, name+" is no server", 20*time.Second, func() bool {
		for _, m := range others {
			if m.Raft().Leads && m.ChangeServer(name, RemoveServer) == nil {
				return true
			}
		}
		return false
	}, others...)
}

// addServer makes a member that has joined a non-voter, as the placement of voters does.
func addServer(t *testing.T, name string, others ...*member) {
	t.Helper()
	eventually(t, name+" is a non-voter", 20*time.Second, func() bool {
		for _, m := range others {
			if _, member := m.State().Nodes[name]; member && m.Raft().Leads && m.ChangeServer(name, MakeNonvoter) == nil {
				return true
			}
		}
		return false
	}, others...)
}

// wantEnded waits until a member's Run has returned because it was removed.
func (m *member) wantEnded(t *testing.T) {
	t.Helper()
	m.stop = nil
	select {
	case err := <-m.ended:
		if !errors.Is(err, ErrNodeRemoved) {
			t.Fatalf("%s ended with %v, want ErrNodeRemoved", m.name, err)
		}
		t.Log(err)
	case <-time.After(30 * time.Second):
		t.Fatalf("%s did not end", m.name)
	}
}

// wantRemoved waits until a member has learned that it was removed, and ends it, as a node
// does.
func (m *member) wantRemoved(t *testing.T, others ...*member) {
	t.Helper()
	eventually(t, m.name+" learns that it was removed", 10*time.Second, func() bool { return m.RemovedError() != nil }, others...)
	<-m.Removed()
	if left, _ := m.Lease(); left > 0 {
		t.Errorf("%s was removed and holds a lease for %s", m.name, left)
	}
	if _, err := m.Propose(deadline(t, time.Second), agreed.CmdTick, nil); !errors.Is(err, ErrNodeRemoved) {
		t.Errorf("%s was removed and proposes: %v", m.name, err)
	}
	m.stop()
	m.wantEnded(t)
	for _, o := range others {
		eventually(t, o.name+" knows of the removal", 10*time.Second, func() bool { return o.State().RemovedBefore > m.member.Load().VoteFrom })
		if _, member := o.State().Nodes[m.name]; member {
			t.Errorf("%s has joined again by itself", m.name)
		}
	}
}

// A node that lives when it is removed learns it, holds no lease, and does not come back,
// also after a restart, until it is admitted again. Then it is a member with its old disk.
func TestRemovedNodeStopsUntilItIsAdmittedAgain(t *testing.T) {
	a, b, c := threeMembers(t)
	cut := b.member.Load().VoteFrom
	remove(t, "b-1", a, c)
	b.wantRemoved(t, a, c)
	if returns, err := Returns(b.dir); err != nil || !returns {
		t.Errorf("b-1's disk does not say that it was removed: %t, %v", returns, err)
	}
	b.start(t, a.opts.RPC)
	b.wantEnded(t)
	if _, err := c.Propose(deadline(t, 15*time.Second), agreed.CmdNodeAdmit, agreed.NodeAdmit{Name: "b-1", By: "test"}); err != nil {
		t.Fatal(err)
	}
	b.start(t, a.opts.RPC)
	addServer(t, "b-1", a, c)
	eventually(t, "b-1 is a member again", 20*time.Second, func() bool { return settled(b) }, a, b, c)
	if now := b.member.Load(); now.VoteFrom <= cut || now.VoteFrom != a.State().Nodes["b-1"].Admitted || now.Removed != "" {
		t.Errorf("b-1 was admitted by entry %d before and has %+v, the agreed state %+v", cut, now, a.State().Nodes["b-1"])
	}
	if len(a.State().Removed) != 0 {
		t.Errorf("b-1 is still removed: %+v", a.State().Removed)
	}
	b.halt(t)
	b.start(t)
	eventually(t, "b-1 is a member after a restart", 20*time.Second, func() bool { return settled(b) }, a, b, c)
}

// A node that did not run when it was removed learns it when it returns. A wiped one joins
// as a new node, and then the old disk stays refused.
func TestNodeThatWasAwayLearnsOfItsRemoval(t *testing.T) {
	a, b, c := threeMembers(t)
	b.halt(t)
	remove(t, "b-1", a, c)
	b.start(t)
	b.wantRemoved(t, a, c)

	eventually(t, "the cluster is at feature level 3", 20*time.Second, func() bool { return a.State().MembersOnly() }, a, c)
	wiped := newMember(t, a.ca, "b", "b-1").start(t, a.opts.RPC)
	eventually(t, "the wiped b-1 is told to wait for an operator", 20*time.Second, func() bool {
		return strings.Contains(wiped.Waiting(), "dsnode node admit b-1")
	}, a, c)
	if _, err := c.Propose(deadline(t, 15*time.Second), agreed.CmdNodeAdmit, agreed.NodeAdmit{Name: "b-1", By: "test"}); err != nil {
		t.Fatal(err)
	}
	addServer(t, "b-1", a, c)
	eventually(t, "the wiped b-1 is a member", 20*time.Second, func() bool { return settled(wiped) }, a, c, wiped)
	wiped.halt(t)

	// The old disk, as from an image that was made before the removal.
	m, err := readMemberFile(b.dir)
	if err != nil {
		t.Fatal(err)
	}
	m.Removed = ""
	if err := writeMemberFile(b.dir, m); err != nil {
		t.Fatal(err)
	}
	b.start(t)
	eventually(t, "the old disk is refused", 10*time.Second, func() bool { return b.RemovedError() != nil }, a, c)
	b.stop()
	b.wantEnded(t)
	wiped.start(t)
	eventually(t, "the wiped b-1 is still a member", 20*time.Second, func() bool { return settled(wiped) }, a, c, wiped)
}

// Below feature level 2 no removal is noted. But the removed node gets no lease and is not
// admitted when it announces itself. When the last node that holds the level is restarted
// without it, the removed one learns of its removal.
func TestRemovalBelowItsFeatureLevel(t *testing.T) {
	a, b, c := threeMembersAt(t, 1)
	b.halt(t)
	if _, err := a.Propose(deadline(t, 15*time.Second), agreed.CmdNodeRemove, agreed.NodeRemove{Name: "b-1", By: "test"}); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Propose(deadline(t, 15*time.Second), agreed.CmdNodeAdmit, agreed.NodeAdmit{Name: "b-1"}); !errors.Is(err, ErrFeatureLevel) {
		t.Errorf("admit at level 1: %v, want ErrFeatureLevel", err)
	}
	eventually(t, "b-1 is no server", 20*time.Second, func() bool {
		for _, m := range []*member{a, c} {
			if m.Raft().Leads && m.ChangeServer("b-1", RemoveServer) == nil {
				return true
			}
		}
		return false
	}, a, c)
	b.start(t)
	eventually(t, "b-1 hears a member, and has announced itself in vain", 20*time.Second, func() bool {
		heard := false
		for _, p := range b.Peers() {
			heard = heard || p.HeardWithin(time.Second)
		}
		return heard && time.Since(b.StartedAt()) > 3*announceRetry
	}, a, b, c)
	if left, _ := b.Lease(); left > 0 {
		t.Errorf("b-1 was removed and holds a lease for %s", left)
	}
	if _, member := a.State().Nodes["b-1"]; member || b.RemovedError() != nil || a.State().FeatureLevel != 1 {
		t.Errorf("b-1 is a member: %t, has learned %v, level %d", member, b.RemovedError(), a.State().FeatureLevel)
	}
	for _, m := range []*member{a, c} {
		m.halt(t)
		m.level = 0
	}
	a.start(t)
	c.start(t, a.opts.RPC) // both have new addresses
	eventually(t, "the level is the newest", 20*time.Second, func() bool {
		return a.State().FeatureLevel == agreed.MaxFeatureLevel && c.State().FeatureLevel == agreed.MaxFeatureLevel
	}, a, c)
	b.halt(t)
	b.start(t, a.opts.RPC) // the others have new addresses
	b.wantRemoved(t, a, c)
}

// A removed node whose member file is that of another cluster, or that can reach nobody,
// ends too.
func TestRemovedNodeThatReachesNobodyEnds(t *testing.T) {
	ca := newTestCA(t, "test")
	m := newMember(t, ca, "a", "a-1")
	if err := writeMemberFile(m.dir, memberFile{
		ClusterID: "c", Name: "test", Generation: agreed.Generation{Number: 1}, Removed: "node a-1 was removed",
	}); err != nil {
		t.Fatal(err)
	}
	m.logs = newDiskStore()
	m.start(t)
	if err := m.Bootstrap(deadline(t, time.Second), []byte(testSites), "test"); !errors.Is(err, ErrNodeRemoved) {
		t.Errorf("bootstrap of a removed node: %v, want ErrNodeRemoved", err)
	}
	m.wantEnded(t)
}

// Only members get leases: a node that is about to join, or was removed, gets none.
func TestOnlyMembersGetLeases(t *testing.T) {
	a := newMember(t, newTestCA(t, "test"), "a", "a-1").start(t)
	if err := a.Bootstrap(deadline(t, 10*time.Second), []byte(testSites), "test"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a-1 holds a lease", 20*time.Second, func() bool { left, _ := a.Lease(); return left > 500*time.Millisecond })
	ask := func(name string) int64 {
		got, err := (&peerServer{c: a.Cluster}).respond(mesh.Identity{Site: "b", Node: name}, &clusterpb.PingRequest{
			Node: &clusterpb.NodeInfo{Name: name, Site: "b"},
		})
		if err != nil {
			t.Fatal(err)
		}
		return got.GetLeaseUs()
	}
	if left := ask("b-1"); left != 0 {
		t.Errorf("a node that is no member got a lease of %d µs", left)
	}
	if _, err := a.Propose(deadline(t, 15*time.Second), agreed.CmdNodePut, agreed.NodePut{Node: agreed.Node{Name: "b-1", Site: "b", Feature: agreed.MaxFeatureLevel}, Admit: true}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the member gets a lease", 5*time.Second, func() bool { return ask("b-1") > 0 })
}

func TestJoinChecksTheStandingOfANode(t *testing.T) {
	s := &agreed.State{
		ClusterID: "c", FeatureLevel: 2, Generation: agreed.Generation{Number: 1, ID: "g"}, RemovedBefore: 50,
		Nodes: map[string]agreed.Node{"old-1": {Name: "old-1", Site: "a"}, "again-1": {Name: "again-1", Site: "a", Admitted: 60, Instance: "i"}},
		Removed: []agreed.Removal{
			{Name: "gone-1", Site: "a", Index: 50, At: time.Unix(1, 0).UTC(), By: "ops"},
			{Name: "back-1", Site: "a", Index: 40, AdmittedAt: time.Unix(2, 0)},
		},
	}
	returning := func(admitted uint64) *clusterpb.JoinRequest {
		return &clusterpb.JoinRequest{Returning: true, Admitted: admitted, ClusterId: "c", Generation: 1, GenerationId: "g"}
	}
	otherGeneration, otherCluster := returning(9), returning(9)
	otherGeneration.GenerationId, otherCluster.ClusterId = "h", "d"
	fresh := &clusterpb.JoinRequest{Fresh: true}
	for _, tc := range []struct {
		what, name, site string
		r                *clusterpb.JoinRequest
		refused          string
	}{
		{"a member announces itself", "old-1", "a", &clusterpb.JoinRequest{}, ""},
		{"a new node", "new-1", "a", fresh, ""},
		{"a removed name with an empty disk", "gone-1", "a", fresh, ""},
		{"a removed node announces itself", "gone-1", "a", &clusterpb.JoinRequest{Admitted: 9}, "gone-1 is no member"},
		{"an unknown node announces itself", "new-1", "a", &clusterpb.JoinRequest{Admitted: 70}, "new-1 is no member"},
		{"the disk from before", "again-1", "a", &clusterpb.JoinRequest{Admitted: 59}, "again-1"},
		{"the disk from after", "again-1", "a", &clusterpb.JoinRequest{Admitted: 60}, ""},
		{"a member that lost raft's stores", "old-1", "a", &clusterpb.JoinRequest{Fresh: true, ClusterId: "c"}, ""},
		{"a removed node that lost them", "gone-1", "a", &clusterpb.JoinRequest{Fresh: true, ClusterId: "c", Admitted: 9}, "gone-1 is no member"},
		{"a removed node returns", "gone-1", "a", returning(9), "was removed at 1970-01-01T00:00:01Z by ops"},
		{"an admitted node returns", "back-1", "a", returning(9), ""},
		{"at another site", "back-1", "b", returning(9), "removed"},
		{"of another generation", "back-1", "a", otherGeneration, "empty data directory"},
		{"of another cluster", "back-1", "a", otherCluster, "empty data directory"},
		{"the answer to its first call was lost", "again-1", "a", returning(9), ""},
		{"nobody knows of it", "who-1", "a", returning(9), "removed"},
	} {
		err := checkStanding(s, agreed.Node{Name: tc.name, Site: tc.site, Instance: "i"}, tc.r)
		switch {
		case tc.refused == "" && err != nil:
			t.Errorf("%s: %v", tc.what, err)
		case tc.refused != "" && (!errors.Is(err, ErrNodeRemoved) || !strings.Contains(err.Error(), tc.refused)):
			t.Errorf("%s: %v, want ErrNodeRemoved with %q", tc.what, err, tc.refused)
		}
	}
}

// A bootstrap that is refused because a seed belongs to a cluster leaves nothing there.
func TestRefusedBootstrapRegistersNothing(t *testing.T) {
	a := newMember(t, newTestCA(t, "test"), "a", "a-1").start(t)
	if err := a.Bootstrap(deadline(t, 10*time.Second), []byte(testSites), "test"); err != nil {
		t.Fatal(err)
	}
	free := newMember(t, a.ca, "b", "b-9").start(t)
	before := a.Raft().CommitIndex
	// A node with seeds joins by itself, so the seed is given only to the check.
	if err := free.checkSeed(deadline(t, 15*time.Second), a.opts.RPC); !errors.Is(err, ErrSeedKnows) {
		t.Errorf("a seed that belongs to a cluster: %v, want ErrSeedKnows", err)
	}
	if err := a.checkSeed(deadline(t, 15*time.Second), free.opts.RPC); err != nil {
		t.Errorf("a seed that belongs to none: %v", err)
	}
	eventually(t, "ticks were committed after the call", 10*time.Second, func() bool { return a.Raft().CommitIndex > before+3 })
	if _, known := a.State().Nodes["b-9"]; known {
		t.Error("the refused bootstrap registered a join")
	}
}
