package node

import (
	"strings"
	"testing"
	"time"
)

func TestWhatANodeLacksAfterItsStart(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(*startView)
		want   string
	}{
		{"nothing", func(*startView) {}, ""},
		{"no entry of the leader", func(v *startView) { v.Ticked = false }, "nothing from the raft leader"},
		{"entries", func(v *startView) { v.Committed = v.Applied + mayLack + 1 }, "at entry 100, that of a peer at 117"},
		{"entries that are on their way", func(v *startView) { v.Committed = v.Applied + mayLack }, ""},
		{"it is ahead of its peers", func(v *startView) { v.Committed = 1 }, ""},
		{"the job table", func(v *startView) { v.JobsLoaded = false }, "its job table is not loaded"},
		{"jobs of other nodes", func(v *startView) { v.Lacking = []string{"b-1", "c-1"} }, "not yet all jobs of b-1, c-1"},
		{"the votes of others", func(v *startView) { v.HadVote, v.Voters = true, 4 }, "4 of 5 are placed"},
		{"its vote, which it or another node has", func(v *startView) { v.HadVote = true }, ""},
		{"votes that did not come back", func(v *startView) { v.HadVote, v.Voters, v.Running = true, 3, time.Minute }, ""},
		{"it had no vote", func(v *startView) { v.Voters = 3 }, ""},
		{"the end of old leases", func(v *startView) { v.FenceWait = 1300 * time.Millisecond }, "for another 1.3 s"},
		{"the primary", func(v *startView) { v.FenceKnown = false }, "does not know the primary"},
	} {
		v := startView{Ticked: true, Applied: 100, Committed: 100, FenceKnown: true, JobsLoaded: true, Voters: 5, MostVoters: 5}
		tc.change(&v)
		if got := v.lacks(); (got == "") != (tc.want == "") || !strings.Contains(got, tc.want) {
			t.Errorf("%s: %q, want %q", tc.name, got, tc.want)
		}
	}
}
