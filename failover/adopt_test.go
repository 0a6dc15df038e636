package failover

import (
	"fmt"
	"testing"
	"time"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/config"
)

// A node is silent only when no node hears it. Its lease counts as of now.
func TestAdopterJudgesByWhatAnyNodeHeard(t *testing.T) {
	a := &Adopter{timing: config.TimingFrom(0)}
	const s = time.Second
	good := cluster.PeerView{Heard: true, Ago: s / 10, LeaseLeft: s}
	tests := []struct {
		name  string
		peers map[string]cluster.PeerView
		want  AdoptionNode
	}{
		{"heard by the leader", map[string]cluster.PeerView{"x": good}, AdoptionNode{Silence: s / 10, Able: true}},
		{"never heard by any node", map[string]cluster.PeerView{}, AdoptionNode{Silence: 20 * s}},
		{"heard by a third only", map[string]cluster.PeerView{"x": {Heard: true, Ago: 15 * s}, "y": {Heard: true, Ago: s, HeardBy: map[string]time.Duration{"x": s}}}, AdoptionNode{Silence: 2 * s}},
		{"the third is silent itself", map[string]cluster.PeerView{"x": {Heard: true, Ago: 15 * s}, "y": {Heard: true, Ago: 12 * s, HeardBy: map[string]time.Duration{"x": s}}}, AdoptionNode{Silence: 13 * s}},
		{"draining", map[string]cluster.PeerView{"x": {Heard: true, LeaseLeft: s, Health: cluster.Health{Draining: true}}}, AdoptionNode{}},
		{"cold", map[string]cluster.PeerView{"x": {Heard: true, LeaseLeft: s, Health: cluster.Health{Cold: true}}}, AdoptionNode{}},
		{"its disk hangs", map[string]cluster.PeerView{"x": {Heard: true, LeaseLeft: s, Stuck: 5 * s}}, AdoptionNode{}},
		{"no lease", map[string]cluster.PeerView{"x": {Heard: true}}, AdoptionNode{}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			tt.want.Name, tt.want.Site = "x", "a"
			if got := a.judge("x", "a", tt.peers, 20*s); got != tt.want {
				t.Fatalf("judged %+v, want %+v", got, tt.want)
			}
		})
	}
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
		{"owner gone: a node of its site", AdoptionView{MayReassign: true, Primary: "b", Nodes: []AdoptionNode{gone("a1"), here("a2"), here("b1")}, Streams: []agreed.JobStream{stream("a1", "a1")}}, "a2", AdoptNeighbour},
		{"owner gone, the other node of its site drains: the primary", AdoptionView{MayReassign: true, Primary: "b", Nodes: []AdoptionNode{gone("a1"), draining, here("b1")}, Streams: []agreed.JobStream{stream("a1", "a1")}}, "b1", AdoptPrimary},
		{"site gone: the primary", AdoptionView{MayReassign: true, Primary: "b", Nodes: []AdoptionNode{gone("a1"), gone("a2"), here("b1"), here("c1")}, Streams: []agreed.JobStream{stream("a1", "a1")}}, "b1", AdoptPrimary},
		{"the primary is gone too, not replaced yet", AdoptionView{MayReassign: true, Primary: "a", Nodes: []AdoptionNode{gone("a1"), here("b1")}, Streams: []agreed.JobStream{stream("a1", "a1")}}, "", ""},
		{"an adopter that is gone: a node of the adopter's site", AdoptionView{MayReassign: true, Primary: "b", Nodes: []AdoptionNode{gone("a1"), gone("b1"), here("b2"), here("a2")}, Streams: []agreed.JobStream{stream("a1", "b1")}}, "b2", AdoptNeighbour},
		{"owner removed", AdoptionView{MayReassign: true, Primary: "b", Nodes: []AdoptionNode{here("a2"), here("b1")}, Streams: []agreed.JobStream{stream("a1", "a1")}}, "a2", AdoptRemoved},
		{"the least loaded node of its site", AdoptionView{MayReassign: true, Primary: "a", Nodes: []AdoptionNode{gone("a1"), here("a2"), here("a3")}, Streams: []agreed.JobStream{stream("a1", "a1"), stream("a2", "a2")}}, "a3", AdoptNeighbour},
		{"a leader that may not reassign yet", AdoptionView{Primary: "b", Nodes: []AdoptionNode{gone("a1"), here("a2")}, Streams: []agreed.JobStream{stream("a1", "a1")}}, "", ""},
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

// Streams of a lost site are spread over the able nodes.
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
