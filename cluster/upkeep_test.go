package cluster

import (
	"testing"

	"github.com/dsnode/dsnode/cluster/agreed"
)

func TestFeatureLevelNeedsEveryMember(t *testing.T) {
	for _, tc := range []struct {
		name    string
		agreed  int
		members []int
		want    int
	}{
		{"no member", 1, nil, 1},
		{"all members of this build", 0, []int{agreed.MaxFeatureLevel, agreed.MaxFeatureLevel}, agreed.MaxFeatureLevel},
		{"one older member", 0, []int{agreed.MaxFeatureLevel, 0}, 0},
		{"never lower", 1, []int{0}, 1},
		{"never above this build", 0, []int{agreed.MaxFeatureLevel + 5}, agreed.MaxFeatureLevel},
	} {
		s := &agreed.State{FeatureLevel: tc.agreed, Nodes: map[string]agreed.Node{}}
		for i, f := range tc.members {
			s.Nodes[string(rune('a'+i))] = agreed.Node{Feature: f}
		}
		if got := featureLevel(s); got != tc.want {
			t.Errorf("%s: level %d, want %d", tc.name, got, tc.want)
		}
	}
}

// A node announces at most the level that its operator set, and never less than the
// cluster's.
func TestAnnouncedFeatureLevel(t *testing.T) {
	for _, tc := range []struct{ held, agreed, want int }{
		{0, 0, agreed.MaxFeatureLevel}, // before it is a member
		{0, 1, agreed.MaxFeatureLevel},
		{1, 0, 1},
		{1, 1, 1},
		{1, 2, 2}, // too late: the cluster's level is never lowered
		{agreed.MaxFeatureLevel, 1, agreed.MaxFeatureLevel},
	} {
		if got := announcedLevel(tc.held, tc.agreed); got != tc.want {
			t.Errorf("held at %d in a cluster at %d: announces %d, want %d", tc.held, tc.agreed, got, tc.want)
		}
	}
}
