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
		{"nobody", nil, nil},
		{"a third site first, then neighbours", map[string]answer{
			"b-2": hears(now, false, "b-1"), "a-2": hears(now, false, "b-1"), "c-1": hears(now, false, "b-1"), "d-1": hears(now, false, "c-1", "b-1"),
		}, []string{"c-1", "d-1", "a-2", "b-2"}},
		{"who is leaving comes last", map[string]answer{
			"c-1": hears(now, true, "b-1"), "c-2": hears(now, false, "b-1"), "a-2": hears(now, false, "b-1"),
		}, []string{"c-2", "a-2", "c-1"}},
		{"not who does not hear it", map[string]answer{"c-1": hears(now, false, "d-1")}, nil},
		{"who is silent right now comes last", map[string]answer{
			"c-1": hears(now-time.Second, false, "b-1"), "b-2": hears(now, false, "b-1"),
		}, []string{"b-2", "c-1"}},
		{"not who is silent for long", map[string]answer{"c-1": hears(now-relayHears, false, "b-1")}, nil},
		{"not the node itself, nor strangers", map[string]answer{"b-1": hears(now, false, "b-1"), "x-1": hears(now, false, "b-1")}, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			table := &peerTable{answers: tc.answers}
			got := rankRelays("b-1", "a", func(n string) string { return sites[n] }, table.hearing("b-1", now), now-600*time.Millisecond)
			if !slices.Equal(got, tc.want) {
				t.Errorf("got %v, want %v", got, tc.want)
			}
			if old := table.hearing("b-1", now+time.Minute); len(old) != 0 {
				t.Errorf("a minute later %d still hear it", len(old))
			}
		})
	}
}
