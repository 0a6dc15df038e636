package failover

import (
	"context"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/config"
)

// fakeServers is a Raft configuration that changes as asked.
type fakeServers struct {
	state *agreed.State
	peers map[string]cluster.PeerView

	mu     sync.Mutex // guards what follows
	raft   cluster.RaftView
	leader string // asked for by TransferLeadership
}

func (f *fakeServers) State() *agreed.State               { return f.state }
func (f *fakeServers) Peers() map[string]cluster.PeerView { return f.peers }
func (f *fakeServers) Timing() config.Timing              { return config.TimingFrom(0) }

func (f *fakeServers) Raft() cluster.RaftView {
	f.mu.Lock()
	defer f.mu.Unlock()
	v := f.raft
	v.Servers = slices.Clone(v.Servers)
	return v
}

func (f *fakeServers) ChangeServer(name string, change cluster.ServerChange) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.raft.Servers = slices.DeleteFunc(f.raft.Servers, func(s cluster.Server) bool { return s.Name == name })
	if change != cluster.RemoveServer {
		f.raft.Servers = append(f.raft.Servers, cluster.Server{Name: name, Voter: change == cluster.MakeVoter})
	}
	return nil
}

func (f *fakeServers) TransferLeadership(_ context.Context, to string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.leader = to
	return nil
}

func (f *fakeServers) voters() []string {
	var names []string
	for _, s := range f.Raft().Servers {
		if s.Voter {
			names = append(names, s.Name)
		}
	}
	slices.Sort(names)
	return names
}

// newFakeServers has one node in each of the sites a, b and c, and a leader a1 that
// has led for an hour.
func newFakeServers() *fakeServers {
	f := &fakeServers{
		state: &agreed.State{
			Nodes: map[string]agreed.Node{"a1": {Site: "a"}, "b1": {Site: "b"}, "c1": {Site: "c"}},
			Parsed: &config.Config{Sites: map[string]config.Site{
				"a": {City: "x", Priority: 1}, "b": {City: "x", Priority: 2}, "c": {City: "y", Priority: 3},
			}},
		},
		peers: map[string]cluster.PeerView{},
		raft:  cluster.RaftView{CommitIndex: 100, Servers: []cluster.Server{{Name: "a1", Voter: true}}},
	}
	for _, name := range []string{"b1", "c1"} {
		f.peers[name] = cluster.PeerView{Name: name, Heard: true, Health: cluster.Health{AppliedIndex: 100}}
	}
	return f
}

var leadsForAnHour = cluster.Leadership{Term: 1, FirstCommit: time.Hour}

func (f *fakeServers) newVoters(heardSince map[string]time.Duration) *Voters {
	return NewVoters("a1", f, func() map[string]time.Duration { return heardSince },
		func() time.Duration { return 2 * time.Hour }, slog.New(slog.DiscardHandler))
}

func TestVotersArePlacedStepByStep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeServers()
		f.raft.Servers = append(f.raft.Servers, cluster.Server{Name: "gone"})
		v := f.newVoters(map[string]time.Duration{"b1": time.Hour, "c1": time.Hour})
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- v.Lead(ctx, leadsForAnHour) }()
		time.Sleep(10 * placeEvery)
		if got := f.voters(); !slices.Equal(got, []string{"a1", "b1", "c1"}) {
			t.Errorf("voters %v", got)
		}
		if servers := f.Raft().Servers; len(servers) != 3 {
			t.Errorf("a node that is no member stays in the configuration: %v", servers)
		}
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestLeaderOfARemovedSiteHandsOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeServers()
		f.raft.Servers = append(f.raft.Servers, cluster.Server{Name: "b1", Voter: true}, cluster.Server{Name: "c1", Voter: true})
		delete(f.state.Parsed.Sites, "a")
		v := f.newVoters(map[string]time.Duration{"b1": time.Hour, "c1": time.Hour})
		ctx, stop := context.WithTimeout(t.Context(), 10*placeEvery)
		defer stop()
		if err := v.Lead(ctx, leadsForAnHour); err != nil {
			t.Error(err)
		}
		if f.leader == "" {
			t.Errorf("the leader's site is not configured and it still leads; servers %v", f.Raft().Servers)
		}
	})
}

func TestVotersView(t *testing.T) {
	const now = 2 * time.Hour
	tick := config.TimingFrom(0).Tick
	for name, c := range map[string]struct {
		peer       cluster.PeerView
		heardSince map[string]time.Duration
		want       PlacementNode
	}{
		"heard for a minute": {
			cluster.PeerView{Heard: true, Ago: tick, Health: cluster.Health{AppliedIndex: 90}},
			map[string]time.Duration{"b1": now - time.Minute},
			PlacementNode{AliveFor: time.Minute, CaughtUp: true},
		},
		"heard within the patience, silent for three ticks": {
			cluster.PeerView{Heard: true, Ago: 3 * tick, Health: cluster.Health{AppliedIndex: 100}},
			map[string]time.Duration{"b1": now - time.Minute},
			PlacementNode{AliveFor: time.Minute},
		},
		"behind": {
			cluster.PeerView{Heard: true, Health: cluster.Health{AppliedIndex: 83}},
			map[string]time.Duration{"b1": now - time.Minute},
			PlacementNode{AliveFor: time.Minute},
		},
		"silent": {
			cluster.PeerView{Heard: true, Ago: time.Minute},
			nil,
			PlacementNode{DeadFor: time.Minute},
		},
		"silent since before this leadership": {
			cluster.PeerView{Heard: true, Ago: 90 * time.Minute},
			nil,
			PlacementNode{DeadFor: time.Hour},
		},
		"never heard": {
			cluster.PeerView{},
			nil,
			PlacementNode{DeadFor: time.Hour},
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFakeServers()
			f.peers["b1"] = c.peer
			c.want.Name, c.want.Site = "b1", "b"
			nodes := f.newVoters(c.heardSince).view(f.state, leadsForAnHour).Nodes
			i := slices.IndexFunc(nodes, func(n PlacementNode) bool { return n.Name == "b1" })
			if i < 0 || nodes[i] != c.want {
				t.Errorf("got %+v, want %+v", nodes, c.want)
			}
		})
	}
}
