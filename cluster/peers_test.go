package cluster

import (
	"testing"
	"time"

	"github.com/dsnode/dsnode/cluster/clusterpb"
)

func TestPeerThatAppliesNothingIsStuck(t *testing.T) {
	table := peerTable{answers: map[string]answer{}}
	for i, step := range []struct {
		at       time.Duration
		instance string
		applied  uint64
		want     time.Duration
	}{
		{10 * time.Second, "x", 7, 0},
		{11 * time.Second, "x", 7, time.Second},
		{14 * time.Second, "x", 7, 4 * time.Second},
		{15 * time.Second, "x", 8, 0},
		{16 * time.Second, "x", 8, time.Second},
		{17 * time.Second, "y", 8, 0}, // the peer has restarted
		{18 * time.Second, "y", 5, 0},
	} {
		table.put("b-1", answer{sent: step.at, got: &clusterpb.PingResponse{
			Health: &clusterpb.Health{Instance: step.instance, AppliedIndex: step.applied},
		}}, 2500*time.Millisecond)
		a, _ := table.get("b-1")
		var v PeerView
		v.fill(a, step.at+100*time.Millisecond)
		if v.Stuck != step.want {
			t.Errorf("answer %d: stuck for %v, want %v", i, v.Stuck, step.want)
		}
	}
}

func TestHeardWithin(t *testing.T) {
	const s = time.Second
	for _, tt := range []struct {
		name         string
		p            PeerView
		heard, hears bool // within two seconds; hears x
	}{
		{"no such peer", PeerView{}, false, false},
		{"never heard", PeerView{HeardBy: map[string]time.Duration{"x": 0}}, false, false},
		{"just heard, it hears x", PeerView{Heard: true, Ago: s, HeardBy: map[string]time.Duration{"x": s - 1}}, true, true},
		{"just heard, the ages of both together are too long", PeerView{Heard: true, Ago: s, HeardBy: map[string]time.Duration{"x": s}}, true, false},
		{"just heard, it never heard x", PeerView{Heard: true, Ago: 2*s - 1}, true, false},
		{"silent", PeerView{Heard: true, Ago: 2 * s, HeardBy: map[string]time.Duration{"x": 0}}, false, false},
	} {
		if got := tt.p.HeardWithin(2 * s); got != tt.heard {
			t.Errorf("%s: heard %v", tt.name, got)
		}
		if got := tt.p.HearsWithin(2*s, "x"); got != tt.hears {
			t.Errorf("%s: hears x %v", tt.name, got)
		}
	}
}
