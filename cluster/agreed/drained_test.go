package agreed

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	"github.com/dsnode/dsnode/cluster/config"
)

func TestApplyDrainsUpstreams(t *testing.T) {
	both := []string{"u", "v"}
	many := make([]string, config.MaxUpstreams+1)
	for i := range many {
		many[i] = fmt.Sprintf("u%d", i)
	}
	for _, tc := range []struct {
		name  string
		given []string // drained before
		d     UpstreamDrain
		want  []string
		err   error
	}{
		{"the first drain", nil, UpstreamDrain{Name: "u", Drained: true, Configured: both, Expect: 1}, []string{"u"}, nil},
		{"a second upstream", []string{"u"}, UpstreamDrain{Name: "v", Drained: true, Configured: both, Expect: 1}, both, nil},
		{"repeated drain", []string{"u"}, UpstreamDrain{Name: "u", Drained: true, Configured: both, Expect: 1}, []string{"u"}, nil},
		{"resume", both, UpstreamDrain{Name: "u", Configured: both, Expect: 1}, []string{"v"}, nil},
		{"repeated resume", nil, UpstreamDrain{Name: "u", Configured: both, Expect: 1}, nil, nil},
		{"an entry that is no longer configured is dropped", both, UpstreamDrain{Name: "v", Drained: true, Configured: []string{"v"}, Expect: 1}, []string{"v"}, nil},
		{"an unknown upstream", []string{"u"}, UpstreamDrain{Name: "w", Drained: true, Configured: both, Expect: 1}, []string{"u"}, ErrUnknownUpstream},
		{"another version of the configuration", []string{"u"}, UpstreamDrain{Name: "v", Drained: true, Configured: both, Expect: 2}, []string{"u"}, ErrVersionConflict},
		{"too many upstreams", nil, UpstreamDrain{Name: "u1", Drained: true, Configured: many, Expect: 1}, nil, ErrStateFull},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := founded(t)
			for _, name := range tc.given {
				var err error
				if s, err = Apply(s, command(t, CmdUpstreamDrain, applyTime, UpstreamDrain{Name: name, Drained: true, By: "me", Configured: both, Expect: 1})); err != nil {
					t.Fatal(err)
				}
			}
			before := maps.Clone(s.Drained)
			next, err := Apply(s, command(t, CmdUpstreamDrain, applyTime.Add(time.Hour), tc.d))
			if !errors.Is(err, tc.err) || (err != nil && next != s) {
				t.Fatalf("error %v, want %v", err, tc.err)
			}
			if got := slices.Sorted(maps.Keys(next.Drained)); !slices.Equal(got, tc.want) {
				t.Errorf("drained: %v, want %v", got, tc.want)
			}
			if !maps.Equal(before, s.Drained) {
				t.Error("Apply changed the state that it was given")
			}
			for name, d := range next.Drained {
				if _, was := before[name]; was && !d.At.Equal(applyTime) {
					t.Errorf("%s: draining it again moved its time to %s", name, d.At)
				}
			}
			// The entries survive a snapshot.
			b, err := next.Encode()
			if err != nil {
				t.Fatal(err)
			}
			if back, err := DecodeState(b); err != nil || !maps.Equal(back.Drained, next.Drained) {
				t.Errorf("decoded snapshot: %v, error %v", back, err)
			}
		})
	}
}
