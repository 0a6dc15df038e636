package cluster

import (
	"slices"
	"testing"
	"time"

	"github.com/dsnode/dsnode/cluster/clusterpb"
)

func TestRankRelays(t *testing.T) {
	sites := map[string]string{"b-1": "b", "b-2": "b", "c-1": "c", "c-2": "c", "d-1": "d", "a-2": "a"}
	hears := func(sent time.Duration, draining bool, nodes ...string) answer {
		r := &clusterpb.PingResponse{Health: &clusterpb.Health{Draining: draining}}
		for _, n := range nodes {
			r.Heard = append(r.Heard, &clusterpb.Heard{Node: n, AgoMs: 300})
		}
		return answer{sent: sent, got: r}
	}
	const now = 10 * time.Second
	for _, tc := range []struct {
		name    string
		answers map[string]answer
		want    []string
	}{
		{"no peer", nil, nil},
		{"a third site, then own site, then the node's site", map[string]answer{
			"b-2": hears(now, false, "b-1"), "a-2": hears(now, false, "b-1"), "c-1": hears(now, false, "b-1"), "d-1": hears(now, false, "c-1", "b-1"),
		}, []string{"c-1", "d-1", "a-2", "b-2"}},
		{"a draining peer is last", map[string]answer{
			"c-1": hears(now, true, "b-1"), "c-2": hears(now, false, "b-1"), "a-2": hears(now, false, "b-1"),
		}, []string{"c-2", "a-2", "c-1"}},
		{"not a peer that does not hear the node", map[string]answer{"c-1": hears(now, false, "d-1")}, nil},
		{"a silent peer is last", map[string]answer{
			"c-1": hears(now-time.Second, false, "b-1"), "b-2": hears(now, false, "b-1"),
		}, []string{"b-2", "c-1"}},
		{"not a peer that has been silent for long", map[string]answer{"c-1": hears(now-relayFreshness, false, "b-1")}, nil},
		{"not the node itself, nor an unknown node", map[string]answer{"b-1": hears(now, false, "b-1"), "x-1": hears(now, false, "b-1")}, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			table := &peerTable{answers: tc.answers}
			got := rankRelays("b-1", "a", func(n string) string { return sites[n] }, table.peersHearing("b-1", now), now-600*time.Millisecond)
			if !slices.Equal(got, tc.want) {
				t.Errorf("got %v, want %v", got, tc.want)
			}
			if old := table.peersHearing("b-1", now+time.Minute); len(old) != 0 {
				t.Errorf("a minute later %d peers still count as hearing it", len(old))
			}
		})
	}
}
