package failover

import (
	"testing"
	"time"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/cluster/config"
)

// A node is silent only when nobody hears it, and its lease counts as of now.
func TestAdopterJudgesByWhatAnybodyHeard(t *testing.T) {
	a := &Adopter{timing: config.TimingFrom(0)}
	const s = time.Second
	good := cluster.PeerView{Heard: true, Ago: s / 10, LeaseLeft: s}
	tests := []struct {
		name  string
		peers map[string]cluster.PeerView
		want  AdoptionNode
	}{
		{"heard by the leader", map[string]cluster.PeerView{"x": good}, AdoptionNode{Silence: s / 10, Able: true}},
		{"never heard by anybody", map[string]cluster.PeerView{}, AdoptionNode{Silence: 20 * s}},
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
