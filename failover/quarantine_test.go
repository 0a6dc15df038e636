package failover

import (
	"slices"
	"testing"
)

func TestQuarantine(t *testing.T) {
	voters := func(states string) []QuarantineVoter { // one of w(arm) c(old) -(silent) for a1 b1 c1
		var vs []QuarantineVoter
		for i, s := range states {
			vs = append(vs, QuarantineVoter{
				Name: string("abc"[i]) + "1", Site: string("abc"[i]), Reached: s != '-', Warm: s == 'w',
			})
		}
		return vs
	}
	all := []string{"a", "b", "c"}
	for _, c := range []struct {
		name    string
		view    QuarantineView
		want    bool
		why     QuarantineReason
		missing []string
	}{
		{"just founded", QuarantineView{Founded: true, Voters: voters("c"), MemberSites: []string{"a"}}, false, FreeFounded, nil},
		{"one node, restarted", QuarantineView{Voters: voters("c"), MemberSites: []string{"a"}}, false, FreeCompared, nil},
		{"one voter was up all the time", QuarantineView{Voters: voters("cw-"), MemberSites: all}, false, FreeWarm, nil},
		{"warm, but without a majority", QuarantineView{Voters: voters("w--"), MemberSites: all}, true, QuarantineNoMajority, []string{"b", "c"}},
		{"all restarted, all there", QuarantineView{Voters: voters("ccc"), MemberSites: all}, false, FreeCompared, nil},
		{"two restarted, the third away", QuarantineView{Voters: voters("cc-"), MemberSites: all}, true, QuarantineCold, []string{"c"}},
		{"the third compared, without a vote", QuarantineView{Voters: voters("cc-"), MemberSites: all, ComparedSites: []string{"c"}}, false, FreeCompared, nil},
		{"a site without members can't know", QuarantineView{Voters: voters("cc"), MemberSites: []string{"a", "b"}}, false, FreeCompared, nil},
		{"an operator says so", QuarantineView{Voters: voters("cc-"), MemberSites: all, Released: true}, false, FreeReleased, nil},
		{"alone", QuarantineView{Voters: voters("c--"), MemberSites: all}, true, QuarantineNoMajority, []string{"b", "c"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, why, missing := Quarantine(c.view)
			if got != c.want || why != c.why || !slices.Equal(missing, c.missing) {
				t.Errorf("got %v %s %v, want %v %s %v", got, why, missing, c.want, c.why, c.missing)
			}
		})
	}
}
