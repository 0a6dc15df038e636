package agreed

import (
	"errors"
	"fmt"
	"reflect"
	"testing"
	"time"
)

func TestApplyPurgesTheCache(t *testing.T) {
	later := applyTime.Add(time.Hour)
	type step struct {
		at time.Duration
		d  CachePurge
	}
	for _, tc := range []struct {
		name  string
		steps []step
		want  map[[2]string]uint64 // Least by model and key
		err   error
	}{
		{"none", nil, map[[2]string]uint64{{"m", "k"}: 0}, nil},
		{"everything", []step{{0, CachePurge{All: true}}}, map[[2]string]uint64{{"m", "k"}: 1, {"n", "l"}: 1}, nil},
		{"a model", []step{{0, CachePurge{Model: "m"}}}, map[[2]string]uint64{{"m", "k"}: 1, {"n", "k"}: 0}, nil},
		{"a key", []step{{0, CachePurge{Key: "k", Until: later}}}, map[[2]string]uint64{{"m", "k"}: 1, {"m", "l"}: 0}, nil},
		{
			"several purges",
			[]step{{0, CachePurge{Model: "m"}}, {0, CachePurge{Key: "k", Until: later}}, {0, CachePurge{Model: "n"}}},
			map[[2]string]uint64{{"m", "k"}: 2, {"m", "l"}: 1, {"n", "l"}: 3, {"o", "l"}: 0},
			nil,
		},
		{
			"everything after a model",
			[]step{{0, CachePurge{Model: "m"}}, {0, CachePurge{All: true}}},
			map[[2]string]uint64{{"m", "k"}: 2, {"n", "k"}: 2},
			nil,
		},
		{
			"a purged key is dropped after Until",
			[]step{{0, CachePurge{Key: "k", Until: later}}, {2 * time.Hour, CachePurge{Key: "l", Until: later.Add(time.Hour)}}},
			map[[2]string]uint64{{"m", "k"}: 0, {"m", "l"}: 2},
			nil,
		},
		{"nothing named", []step{{0, CachePurge{}}}, nil, ErrBadPurge},
		{"two things named", []step{{0, CachePurge{All: true, Model: "m"}}}, nil, ErrBadPurge},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := founded(t)
			for _, st := range tc.steps {
				before := s.Purges
				next, err := Apply(s, command(t, CmdCachePurge, applyTime.Add(st.at), st.d))
				if !errors.Is(err, tc.err) {
					t.Fatalf("error %v, want %v", err, tc.err)
				}
				if !reflect.DeepEqual(s.Purges, before) {
					t.Fatal("Apply changed the state that it was given")
				}
				s = next
			}
			b, err := s.Encode()
			if err != nil {
				t.Fatal(err)
			}
			back, err := DecodeState(b)
			if err != nil {
				t.Fatal(err)
			}
			for at, want := range tc.want {
				for _, s := range []*State{s, back} {
					if got := s.Purges.Least(at[0], func() string { return at[1] }); got != want {
						t.Errorf("Least(%v) is %d, want %d", at, got, want)
					}
				}
			}
		})
	}
}

func TestPurgesAreBounded(t *testing.T) {
	for _, make := range []func(i int) CachePurge{
		func(i int) CachePurge { return CachePurge{Key: fmt.Sprint(i), Until: applyTime.Add(time.Hour)} },
		func(i int) CachePurge { return CachePurge{Model: fmt.Sprint(i)} },
	} {
		s := founded(t)
		for i := range maxPurgedKeys {
			var err error
			if s, err = Apply(s, command(t, CmdCachePurge, applyTime, make(i))); err != nil {
				t.Fatal(err)
			}
		}
		full, err := Apply(s, command(t, CmdCachePurge, applyTime, make(maxPurgedKeys)))
		if !errors.Is(err, ErrStateFull) || full != s {
			t.Errorf("one purge too many: %v, want ErrStateFull", err)
		}
		// A purge of everything replaces the others.
		if s, err = Apply(s, command(t, CmdCachePurge, applyTime, CachePurge{All: true})); err != nil {
			t.Fatal(err)
		}
		if s, err = Apply(s, command(t, CmdCachePurge, applyTime, make(maxPurgedKeys))); err != nil {
			t.Error(err)
		}
		if s.Purges.Count != maxPurgedKeys+2 {
			t.Errorf("Count is %d, want %d", s.Purges.Count, maxPurgedKeys+2)
		}
	}
}
