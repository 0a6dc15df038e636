package cluster

import (
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/dsnode/dsnode/cluster/clusterpb"
)

// What a node says of itself arrives at its peers, within bounds, whoever sends it.
func TestTroublesInAPingsAnswer(t *testing.T) {
	blocked := []Blocked{{"c-1", TrafficLarge, 5 * time.Second}, {"b-1", TrafficGossip, 6 * time.Second}}
	var r clusterpb.PingResponse
	troubles(&r, Health{Problems: []string{"its disk is short of room", "its table is being rebuilt"}, Blocked: blocked})
	var got Health
	readTroubles(&r, &got)
	if !slices.Equal(got.Problems, []string{"its disk is short of room", "its table is being rebuilt"}) || !slices.Equal(got.Blocked, blocked) {
		t.Errorf("arrived: %+v", got)
	}

	long := strings.Repeat("é", 400)
	many := slices.Repeat(blocked[:1], 100)
	r = clusterpb.PingResponse{}
	troubles(&r, Health{Problems: []string{"first", long, "third"}, Blocked: many})
	for _, sent := range []*clusterpb.PingResponse{&r, {Problems: []string{"first", long, "third"}, Blocked: slices.Repeat(r.GetBlocked(), 3)}} {
		got = Health{}
		readTroubles(sent, &got)
		size := 0
		for _, p := range got.Problems {
			if size += len(p); !utf8.ValidString(p) {
				t.Errorf("%q is cut within a character", p)
			}
		}
		if len(got.Problems) != 2 || got.Problems[0] != "first" || !strings.HasSuffix(got.Problems[1], "é…") || size > 600 || size < 595 || len(got.Blocked) != 64 {
			t.Errorf("%d sentences with %d bytes, %d kinds of traffic: %q", len(got.Problems), size, len(got.Blocked), got.Problems)
		}
	}

	// A later version may have other kinds.
	got = Health{}
	readTroubles(&clusterpb.PingResponse{Blocked: []*clusterpb.Blocked{{Node: "b-1", Kind: "carrier pigeon", ForMs: 9000}}}, &got)
	if len(got.Blocked) != 0 {
		t.Errorf("an unknown kind arrived: %+v", got.Blocked)
	}
}

// A peer has been heard since it first answered, or since its restart, or since it
// answered again after a break of the patience. Without a lease it is since the last answer
// that showed one, at most for that time.
func TestHeardFor(t *testing.T) {
	const ms, s = time.Millisecond, time.Second
	table := peerTable{answers: map[string]answer{}}
	for i, step := range []struct {
		at               time.Duration
		instance         string
		lease            int64
		heard, leaseless time.Duration
	}{
		{10 * s, "x", 0, 0, 0},
		{11 * s, "x", 0, s, s},
		{13*s + 400*ms, "x", 1, 3*s + 400*ms, 0},
		{14 * s, "x", 0, 4 * s, 600 * ms},
		{17 * s, "x", 0, 0, 0}, // silent for longer than the patience
		{18 * s, "x", 0, s, s},
		{18*s + 250*ms, "y", 0, 0, 0}, // restarted
	} {
		table.put("b-1", answer{sent: step.at, got: &clusterpb.PingResponse{
			Health: &clusterpb.Health{Instance: step.instance}, LeaseUs: step.lease,
		}}, 2500*ms)
		a, _ := table.get("b-1")
		var v PeerView
		v.fill(a, step.at)
		if v.HeardFor != step.heard || v.Leaseless != step.leaseless {
			t.Errorf("answer %d: heard for %v, without a lease for %v, want %v and %v", i, v.HeardFor, v.Leaseless, step.heard, step.leaseless)
		}
	}
}

// Traffic counts from its last answer, or from when the peer was first heard.
func TestLargeAgo(t *testing.T) {
	const s = time.Second
	c := &Cluster{large: &sentTimes{at: map[string]time.Duration{}}}
	if got := c.largeAgo("b-1", 10*s, 14*s); got != 4*s {
		t.Errorf("without an answer: %v, want 4s", got)
	}
	c.large.put("b-1", 13*s)
	if got := c.largeAgo("b-1", 10*s, 14*s); got != s {
		t.Errorf("after an answer: %v, want 1s", got)
	}
	if got := c.largeAgo("b-1", 13*s+s/2, 14*s); got != s/2 {
		t.Errorf("after a restart of the peer: %v, want 0.5s", got)
	}
}
