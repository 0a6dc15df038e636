package failover

import (
	"fmt"
	"testing"
	"time"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/config"
)

// Who can adopt is heard, and by its answer it can execute jobs now.
func TestWhoCanAdopt(t *testing.T) {
	a := &Adopter{timing: config.TimingFrom(0)}
	const s = time.Second
	tests := []struct {
		name string
		peer cluster.PeerView
		want bool
	}{
		{"heard, with a lease", cluster.PeerView{Heard: true, Ago: s / 10, LeaseLeft: s}, true},
		{"never heard", cluster.PeerView{}, false},
		{"silent", cluster.PeerView{Heard: true, Ago: 3 * s, LeaseLeft: s}, false},
		{"draining", cluster.PeerView{Heard: true, LeaseLeft: s, Health: cluster.Health{Draining: true}}, false},
		{"cold", cluster.PeerView{Heard: true, LeaseLeft: s, Health: cluster.Health{Cold: true}}, false},
		{"its disk hangs", cluster.PeerView{Heard: true, LeaseLeft: s, Stuck: 5 * s}, false},
		{"no lease", cluster.PeerView{Heard: true}, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := a.able(tt.peer); got != tt.want {
				t.Fatalf("able %v, want %v", got, tt.want)
			}
		})
	}
}

// An adopter decides about the streams of the coordinator's last look, and not at all
// when that look is old.
func TestAdopterNeedsANewJudgement(t *testing.T) {
	timing := config.TimingFrom(0)
	w := &agreed.State{
		Primary: agreed.Primary{Site: "a"}, Nodes: map[string]agreed.Node{"a1": {Name: "a1", Site: "a"}, "b1": {Name: "b1", Site: "b"}},
		Streams: map[string]agreed.JobStream{"b1/1": {Origin: "b1", Incarnation: "1", Site: "b", Owner: "b1"}},
	}
	looked, at := true, time.Hour
	a := &Adopter{
		timing: timing,
		o:      Options{Name: "a1", Site: "a", Agreement: leading{timing: timing}, Health: func() cluster.Health { return cluster.Health{} }, Boottime: func() time.Duration { return time.Hour }, Quarantined: func() bool { return false }},
		judge: func() (Judgement, bool) {
			return Judgement{State: w, At: at, Gone: map[string]bool{"b1": true}}, looked
		},
	}
	for _, c := range []struct {
		name   string
		looked bool
		at     time.Duration
		want   int
	}{
		{"a moment ago", true, time.Hour - timing.Tick, 1},
		{"the coordinator hangs", true, time.Hour - timing.Patience, 0},
		{"no look yet", false, time.Hour, 0},
	} {
		looked, at = c.looked, c.at
		if got := Adopt(a.view(cluster.Leadership{Term: 1})); len(got) != c.want {
			t.Errorf("%s: %d adoptions, want %d", c.name, len(got), c.want)
		}
	}
}

// leading is the Agreement of a leader that hears nobody.
type leading struct {
	Agreement
	timing config.Timing
}

func (l leading) Timing() config.Timing               { return l.timing }
func (leading) Peers() map[string]cluster.PeerView    { return nil }
func (leading) Lease() (left time.Duration, _ uint64) { return time.Second, 1 }

func TestAdopt(t *testing.T) {
	stream := func(origin, owner string) agreed.JobStream {
		return agreed.JobStream{Origin: origin, Incarnation: "1", Site: origin[:1], Owner: owner, Token: agreed.FenceToken{Generation: 1, Index: 5}}
	}
	here := func(name string) AdoptionNode { return AdoptionNode{Name: name, Site: name[:1], Able: true} }
	gone := func(name string) AdoptionNode {
		return AdoptionNode{Name: name, Site: name[:1], Gone: true}
	}
	draining := AdoptionNode{Name: "a2", Site: "a"}
	tests := []struct {
		name string
		v    AdoptionView
		to   string
		why  AdoptionReason
	}{
		{"all here", AdoptionView{MayReassign: true, Nodes: []AdoptionNode{here("a1"), here("a2")}, Streams: []agreed.JobStream{stream("a1", "a1")}}, "", ""},
		{"silent, and not gone", AdoptionView{MayReassign: true, Nodes: []AdoptionNode{{Name: "a1", Site: "a"}, here("a2")}, Streams: []agreed.JobStream{stream("a1", "a1")}}, "", ""},
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
		{Name: "a1", Site: "a", Gone: true}, {Name: "b1", Site: "b", Able: true}, {Name: "b2", Site: "b", Able: true},
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
