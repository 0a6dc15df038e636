package failover

import (
	"maps"
	"slices"
	"testing"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/cluster/agreed"
)

func TestQuarantine(t *testing.T) {
	voters := func(states string) []QuarantineVoter { // one of w(arm) c(old) -(silent) for a1 b1 c1
		var vs []QuarantineVoter
		for i, s := range states {
			vs = append(vs, QuarantineVoter{
				Name: string("abc"[i]) + "1", Site: string("abc"[i]), Reached: s != '-', Warm: s == 'w',
			})
		}
		return vs
	}
	all := []string{"a", "b", "c"}
	for _, c := range []struct {
		name    string
		view    QuarantineView
		want    bool
		why     QuarantineReason
		missing []string
	}{
		{"just founded", QuarantineView{Founded: true, Voters: voters("c"), MemberSites: []string{"a"}}, false, FreeFounded, nil},
		{"one node, restarted", QuarantineView{Voters: voters("c"), MemberSites: []string{"a"}}, false, FreeCompared, nil},
		{"one voter was up all the time", QuarantineView{Voters: voters("cw-"), MemberSites: all}, false, FreeWarm, nil},
		{"warm, but without a majority", QuarantineView{Voters: voters("w--"), MemberSites: all}, true, QuarantineNoMajority, []string{"b", "c"}},
		{"all restarted, all there", QuarantineView{Voters: voters("ccc"), MemberSites: all}, false, FreeCompared, nil},
		{"two restarted, the third away", QuarantineView{Voters: voters("cc-"), MemberSites: all}, true, QuarantineCold, []string{"c"}},
		{"the third compared, without a vote", QuarantineView{Voters: voters("cc-"), MemberSites: all, ComparedSites: []string{"c"}}, false, FreeCompared, nil},
		{"a site without members need not be heard", QuarantineView{Voters: voters("cc"), MemberSites: []string{"a", "b"}}, false, FreeCompared, nil},
		{"an operator has released it", QuarantineView{Voters: voters("cc-"), MemberSites: all, Released: true}, false, FreeReleased, nil},
		{"alone", QuarantineView{Voters: voters("c--"), MemberSites: all}, true, QuarantineNoMajority, []string{"b", "c"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, why, missing := Quarantine(c.view)
			if got != c.want || why != c.why || !slices.Equal(missing, c.missing) {
				t.Errorf("got %v %s %v, want %v %s %v", got, why, missing, c.want, c.why, c.missing)
			}
		})
	}
}

// restartedNode is node a1, which votes with b1 and c1. Peers that are not named have
// not been heard.
type restartedNode struct {
	peers         map[string]cluster.PeerView
	founded, cold bool
}

func (r restartedNode) State() *agreed.State {
	return &agreed.State{Nodes: map[string]agreed.Node{"a1": {Site: "a"}, "b1": {Site: "b"}, "c1": {Site: "c"}, "d1": {Site: "d"}}}
}

func (r restartedNode) Raft() cluster.RaftView {
	return cluster.RaftView{Servers: []cluster.Server{{Name: "a1", Voter: true}, {Name: "b1", Voter: true}, {Name: "c1", Voter: true}, {Name: "d1"}}}
}

func (r restartedNode) Peers() map[string]cluster.PeerView {
	all := map[string]cluster.PeerView{"b1": {Site: "b"}, "c1": {Site: "c"}, "d1": {Site: "d"}}
	maps.Copy(all, r.peers)
	return all
}
func (r restartedNode) Founded() bool { return r.founded }
func (r restartedNode) Cold() bool    { return r.cold }

func TestColdStart(t *testing.T) {
	heard := func(site string, cold bool) cluster.PeerView {
		return cluster.PeerView{Site: site, Heard: true, Health: cluster.Health{Cold: cold}}
	}
	for name, c := range map[string]struct {
		node restartedNode
		want string
		held bool
	}{
		"founded":          {restartedNode{founded: true, cold: true}, "founded_here", false},
		"no voter answers": {restartedNode{cold: true}, "no_majority: too few voters answer; no node of b, c, d has told yet whether the cluster was recovered meanwhile", true},
		"all have restarted": {restartedNode{cold: true, peers: map[string]cluster.PeerView{
			"b1": heard("b", true),
		}}, "cold_majority: every voter that answers has restarted; no node of c, d has told yet whether the cluster was recovered meanwhile", true},
		"a non-voter counts for its site": {restartedNode{cold: true, peers: map[string]cluster.PeerView{
			"b1": heard("b", true), "c1": heard("c", true), "d1": heard("d", true),
		}}, "all_sites_agree", false},
		"a warm peer": {restartedNode{cold: true, peers: map[string]cluster.PeerView{"b1": heard("b", false)}}, "warm_voter", false},
		"warm itself": {restartedNode{peers: map[string]cluster.PeerView{"b1": heard("b", true)}}, "warm_voter", false},
	} {
		t.Run(name, func(t *testing.T) {
			s := NewColdStart("a1", "a", c.node)
			if why, held := s.Quarantined(); why != c.want || held != c.held {
				t.Errorf("%q %v, want %q %v", why, held, c.want, c.held)
			}
			s.Release()
			if why, held := s.Quarantined(); held {
				t.Errorf("quarantined after an operator ended it: %s", why)
			}
		})
	}
}
