package node

import (
	"slices"
	"testing"
	"time"

	"github.com/dsnode/dsnode/cluster"
)

func TestBlockedTraffic(t *testing.T) {
	const s = time.Second
	const limit = 4 * time.Second
	for _, tc := range []struct {
		name       string
		p          cluster.PeerView
		replicated time.Duration
		want       []cluster.Blocked
	}{
		{"all goes through", cluster.PeerView{HeardFor: time.Hour, LargeAgo: 2 * s, UDPAgo: 3 * s}, s, nil},
		{"just within the limit", cluster.PeerView{HeardFor: time.Hour, LargeAgo: limit - 1, UDPAgo: limit - 1}, limit - 1, nil},
		{
			"each at the limit",
			cluster.PeerView{HeardFor: time.Hour, LargeAgo: limit, UDPAgo: 5 * s},
			6 * s,
			[]cluster.Blocked{{Node: "b-1", Kind: cluster.TrafficLarge, For: limit}, {Node: "b-1", Kind: cluster.TrafficGossip, For: 5 * s}, {Node: "b-1", Kind: cluster.TrafficReplication, For: 6 * s}},
		},
		{
			"a peer behind a relay",
			cluster.PeerView{HeardFor: time.Hour, Via: "c-1", LargeAgo: 5 * s, UDPAgo: 5 * s},
			s,
			[]cluster.Blocked{{Node: "b-1", Kind: cluster.TrafficLarge, For: 5 * s}},
		},
		{"records from before a peer's return", cluster.PeerView{HeardFor: s, LargeAgo: s, UDPAgo: s}, time.Minute, nil},
	} {
		tc.p.Name = "b-1"
		if got := blocked(tc.p, tc.replicated, limit); !slices.Equal(got, tc.want) {
			t.Errorf("%s: %+v, want %+v", tc.name, got, tc.want)
		}
	}
}
