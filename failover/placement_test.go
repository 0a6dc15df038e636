package failover

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

var placementSites = []PlacementSite{
	{"a", "shanghai", 1}, {"b", "shanghai", 2}, {"c", "beijing", 3}, {"d", "wuhan", 4}, {"e", "xian", 5},
}

// placementFrom reads "a1=V a2=n b1=V! c1=." : V voter, n non-voter, . not in
// the configuration; then ! dead for an hour, ? silent for 10 s, ~ heard again
// for 5 s, - leaving, * the leader, % not caught up, s a slow disk for two minutes, S for
// half a minute, @ its site is the primary.
// The sites a and b share a city; c, d and e have their own. A site is configured if one of
// its nodes is named.
func placementFrom(t interface{ Fatalf(string, ...any) }, text string) PlacementView {
	v := PlacementView{}
	for _, s := range placementSites {
		if strings.Contains(" "+text, " "+s.Name) {
			v.Sites = append(v.Sites, s)
		}
	}
	for _, word := range strings.Fields(text) {
		name, marks, ok := strings.Cut(word, "=")
		if !ok {
			t.Fatalf("bad word %q", word)
		}
		n := PlacementNode{Name: name, Site: name[:1], AliveFor: time.Hour, CaughtUp: true}
		for _, m := range marks {
			switch m {
			case 'V':
				n.InConfig, n.Voter = true, true
			case 'n':
				n.InConfig = true
			case '.':
			case '!':
				n.AliveFor, n.DeadFor = 0, time.Hour
			case '?':
				n.AliveFor, n.DeadFor = 0, 10*time.Second
			case '~':
				n.AliveFor = 5 * time.Second
			case '-':
				n.Leaving = true
			case '%':
				n.CaughtUp = false
			case 's':
				n.SlowFor = 2 * time.Minute
			case 'S':
				n.SlowFor = 30 * time.Second
			case '*':
				v.Leader = name
			case '@':
				v.Primary = n.Site
			default:
				t.Fatalf("bad mark %q in %q", m, word)
			}
		}
		v.Nodes = append(v.Nodes, n)
	}
	if v.Leader == "" {
		for _, n := range v.Nodes {
			if n.Voter && n.DeadFor == 0 && !n.Leaving {
				v.Leader = n.Name
				break
			}
		}
	}
	return v
}

func TestPlaceVotersNextStep(t *testing.T) {
	for _, c := range []struct {
		name, given, step string
		why               PlacementReason
	}{
		{"one node is a cluster", "a1=V", "none", PlacementWaitNodes},
		{"two nodes of one site: one voter", "a1=V a2=n", "none", PlacementWaitNodes},
		{"two sites with a node each: one voter", "a1=V b1=n", "none", PlacementWaitNodes},
		{"three nodes of one site: three voters", "a1=V a2=n a3=n", "add_voter a2", PlacementGrow},
		{"then the third", "a1=V a2=V a3=n", "add_voter a3", PlacementGrow},
		{"one site is placed", "a1=V a2=V a3=V a4=n a5=n", "none", PlacementSettled},
		{"two sites: 2+1", "a1=V a2=n b1=n", "add_voter b1", PlacementGrow},
		{"two sites are placed", "a1=V a2=V b1=V b2=n", "none", PlacementSettled},
		{"two sites: three in one are not 2+1", "a1=V a2=V a3=V b1=n", "add_voter b1", PlacementRebalance},
		{"then one of them is demoted", "a1=V a2=V a3=V b1=V", "demote a3", PlacementShrink},
		{"two sites: the majority belongs in the primary", "a1=V a2=V b1=V b2=n@", "add_voter b2", PlacementRebalance},
		{"then a vote of the other site goes", "a1=V a2=V b1=V b2=V@", "demote a2", PlacementShrink},
		{"the primary has one node: the majority stays elsewhere", "a1=V a2=V b1=V@", "none", PlacementSettled},
		{"one voter outside the primary", "a1=V b1=n@", "add_voter b1", PlacementRebalance},
		{"its leader hands over", "a1=V* b1=V@", "move_leader b1", PlacementLeaderInWay},
		{"and is demoted", "a1=V b1=V*@", "demote a1", PlacementShrink},
		{"two voters from an interrupted growth", "a1=V b1=V c1=n%", "demote b1", PlacementShrink},
		{"a new member is added without a vote", "a1=V b1=.", "add_nonvoter b1", PlacementNewMember},
		{"a silent new member is not added", "a1=V b1=.!", "none", PlacementWaitNodes},
		{"third site not caught up", "a1=V b1=n c1=n%", "none", PlacementWaitNodes},
		{"third site caught up", "a1=V b1=n c1=n", "add_voter c1", PlacementGrow},
		{"second half of the growth", "a1=V b1=n c1=V", "add_voter b1", PlacementGrow},
		{"a cluster with one voter does not wait 30 s", "a1=V b1=n~ c1=n~", "add_voter c1", PlacementGrow},
		{"1+1+1 is placed", "a1=V b1=V c1=V", "none", PlacementSettled},
		{"four nodes: 1+1+1", "a1=V a2=n b1=V c1=V", "none", PlacementSettled},
		{"five nodes: towards 2+2+1", "a1=V a2=n b1=V b2=n c1=V", "add_voter a2", PlacementGrow},
		{"from four to five", "a1=V a2=V b1=V b2=n c1=V", "add_voter b2", PlacementGrow},
		{"2+2+1 is placed", "a1=V a2=V b1=V b2=V c1=V", "none", PlacementSettled},
		{"2+2+2 nodes: one stays without a vote", "a1=V a2=V b1=V b2=V c1=V c2=n", "none", PlacementSettled},
		{"of three sites the primary needs one vote, not two", "a1=V a2=V b1=V b2=n@ c1=V c2=V", "none", PlacementSettled},
		{"2+1+2 is as good, nothing moves", "a1=V a2=V b1=V b2=n c1=V c2=V", "none", PlacementSettled},
		{"a fresh fifth waits until it is stable", "a1=V a2=V b1=V b2=n~ c1=V", "demote a2", PlacementRebalance},

		{"three in one site of three", "a1=V a2=V a3=V b1=n c1=n", "add_voter c1", PlacementRebalance},
		{"voter dead, a node of its site replaces it", "a1=V b1=V! b2=n c1=V", "add_voter b2", PlacementStandIn},
		{"then the dead voter is demoted", "a1=V b1=V! b2=V c1=V", "demote b1", PlacementStandIn},
		{"voter silent 10 s: wait", "a1=V b1=V? b2=n c1=V", "none", PlacementSettled},
		{"another one silent: wait", "a1=V a2=V b1=V! b2=V b3=n c1=V?", "none", PlacementUncertain},
		{"no replacement: three stay three", "a1=V b1=V c1=V!", "none", PlacementNoReplace},
		{"a node of another site replaces a lost site's voter", "a1=V a2=n b1=V c1=V!", "add_voter a2", PlacementStandIn},
		{"then the lost site's voter is demoted", "a1=V a2=V b1=V c1=V!", "demote c1", PlacementStandIn},
		{"the lost site returns: 1+1+1 again", "a1=V a2=V b1=V c1=n", "add_voter c1", PlacementRebalance},
		{"one of three dead in one site: three stay three", "a1=V a2=V a3=V!", "none", PlacementNoReplace},
		{"one of three dead in one site: the fourth replaces it", "a1=V a2=V a3=V! a4=n", "add_voter a4", PlacementStandIn},
		{"two sites, the other one lost: a third node of this one", "a1=V a2=V a3=n b1=V!", "add_voter a3", PlacementStandIn},
		{"the only node of the third site is removed: 2+1", "a1=V a2=n b1=V c1=V!-", "add_voter a2", PlacementStandIn},
		{"then its vote goes", "a1=V a2=V b1=V c1=V!-", "demote c1", PlacementLeaving},
		{"the third site is removed, two nodes are left: one voter", "a1=V b1=V c1=V!-", "demote c1", PlacementLeaving},
		{"in the primary", "a1=V* b1=V@", "move_leader b1", PlacementLeaderInWay},
		{"2+2+1: the third site is removed", "a1=V a2=V b1=V b2=V c1=V!-", "demote c1", PlacementLeaving},
		{"then to three, most in the primary", "a1=V a2=V b1=V b2=V@", "demote a2", PlacementShrink},
		{"voter's disk slow, a node of its site replaces it", "a1=V b1=Vs b2=n c1=V", "add_voter b2", PlacementRebalance},
		{"then the voter with the slow disk is demoted", "a1=V b1=Vs b2=V c1=V", "demote b1", PlacementRebalance},
		{"its disk is fast again: nothing moves", "a1=V b1=n b2=V c1=V", "none", PlacementSettled},
		{"voter's disk slow for 30 s: wait", "a1=V b1=VS b2=n c1=V", "none", PlacementSettled},
		{"voter's disk slow, and that of its replacement", "a1=V b1=Vs b2=ns c1=V", "none", PlacementSettled},
		{"voter's disk slow, no replacement", "a1=V b1=Vs c1=V", "none", PlacementSettled},
		{"a slow disk is better than no voter", "a1=V a2=V b1=V b2=ns c1=V", "add_voter b2", PlacementGrow},
		{"replacement within a site while another site is lost", "a1=V a2=V! a3=n b1=V", "add_voter a3", PlacementStandIn},
		{"2+2+1, a dead: demote from five", "a1=V! a2=V! b1=V b2=V c1=V", "demote a2", PlacementShrink},
		{"2+2+1, a dead: then to three", "a1=V! a2=n! b1=V b2=V c1=V", "demote a1", PlacementStandIn},
		{"2+2+1, a dead: three stay", "a1=n! a2=n! b1=V b2=V c1=V", "none", PlacementSiteAway},
		{"2+2+1, c dead: the dead first", "a1=V a2=V b1=V b2=V c1=V!", "demote c1", PlacementShrink},
		{"2+2+1, c dead: then one of the others", "a1=V a2=V b1=V b2=V c1=n!", "demote b2", PlacementShrink},
		{"a back for 5 s: not yet", "a1=n~ a2=n~ b1=V b2=V c1=V", "none", PlacementSiteAway},
		{"a back and stable", "a1=n a2=n b1=V b2=V c1=V", "add_voter a1", PlacementGrow},
		{"a back, five again", "a1=V a2=n b1=V b2=V c1=V", "add_voter a2", PlacementGrow},
		{"a back with one node: no majority stays in b", "a1=n b1=V b2=V c1=V", "add_voter a1", PlacementRebalance},
		{"one of five dead without a replacement", "a1=V a2=V b1=V! b2=V c1=V", "demote b1", PlacementShrink},

		{"a witness: 1+1+2+1", "a1=V b1=V c1=V c2=n d1=n", "add_voter d1", PlacementGrow},
		{"1+1+2+1 is placed", "a1=V b1=V c1=V c2=V d1=V", "none", PlacementSettled},
		{"a witness with single nodes: 1+0+1+1", "a1=V b1=n c1=V d1=V", "none", PlacementSettled},
		{"the primary's site needs a vote", "a1=V b1=n@ c1=V d1=V", "add_voter b1", PlacementRebalance},
		{"a city must not hold two of three", "a1=V b1=V c1=V d1=n", "add_voter d1", PlacementRebalance},
		{"witness dead: the other site of the city", "a1=V b1=n c1=V d1=V!", "add_voter b1", PlacementStandIn},

		{"quorum lost", "a1=V b1=V! c1=V!", "none", PlacementNoQuorum},
		{"quorum lost for now", "a1=V b1=V? c1=V?", "none", PlacementNoQuorum},
		{"a non-voter leaves", "a1=V b1=V c1=V c2=n-", "remove c2", PlacementLeaving},
		{"a voter leaves, a node of its site replaces it", "a1=V b1=V c1=V- c2=n", "add_voter c2", PlacementLeaving},
		{"a voter leaves without a replacement", "a1=V b1=V c1=V-", "demote c1", PlacementLeaving},
		{"the leader leaves", "a1=V-* a2=V b1=V c1=V", "move_leader a2", PlacementLeaderInWay},
		{"the leader leaves, and a voter's disk is slow", "a1=V-* a2=VS b1=V c1=V", "move_leader b1", PlacementLeaderInWay},
		{"the leader leaves, and all disks are slow", "a1=V-* a2=VS b1=VS c1=VS", "move_leader a2", PlacementLeaderInWay},
		{"the only node can't leave", "a1=V-*", "none", PlacementNoReplace},
	} {
		t.Run(c.name, func(t *testing.T) {
			plan, why := PlaceVoters(placementFrom(t, c.given))
			if got := strings.TrimSpace(string(plan.Step) + " " + plan.Node); got != c.step || why != c.why {
				t.Errorf("%s\ngot  %s (%s)\nwant %s (%s)", c.given, got, why, c.step, c.why)
			}
		})
	}
}

func TestMostVoters(t *testing.T) {
	for _, c := range []struct {
		nodes []int
		want  int
	}{
		{nil, 1},
		{[]int{3}, 1},
		{[]int{2, 2}, 1},
		{[]int{2, 2, 0}, 1},
		{[]int{1, 1, 1}, 3},
		{[]int{9, 1, 1}, 3},
		{[]int{2, 2, 1}, 5},
		{[]int{2, 2, 2}, 5},
		{[]int{1, 1, 1, 1}, 3},
		{[]int{1, 1, 2, 1}, 5},
	} {
		perSite := map[string]int{}
		for i, n := range c.nodes {
			perSite[string(rune('a'+i))] = n
		}
		if got := MostVoters(perSite); got != c.want {
			t.Errorf("%v: %d, want %d", c.nodes, got, c.want)
		}
	}
}

// take applies a step as Raft would.
func (v *PlacementView) take(p Plan) {
	for i := range v.Nodes {
		n := &v.Nodes[i]
		if n.Name != p.Node {
			continue
		}
		switch p.Step {
		case StepAddNonvoter:
			n.InConfig = true
		case StepAddVoter:
			n.Voter = true
		case StepDemote:
			n.Voter = false
		case StepRemove:
			n.InConfig = false
		case StepMoveLeader:
			v.Leader = n.Name
		case StepNone:
		}
	}
}

func (v *PlacementView) votes() (voters, heard int, perSite map[string]int) {
	perSite = map[string]int{}
	for _, n := range v.Nodes {
		if n.Voter {
			voters++
			perSite[n.Site]++
			if n.DeadFor == 0 {
				heard++
			}
		}
	}
	return voters, heard, perSite
}

func (v *PlacementView) upSites() int {
	up := map[string]bool{}
	for _, n := range v.Nodes {
		if n.DeadFor == 0 && !n.Leaving && n.AliveFor >= voterStableFor && n.CaughtUp {
			up[n.Site] = true
		}
	}
	return len(up)
}

func (v *PlacementView) String() string {
	var b strings.Builder
	for _, n := range v.Nodes {
		fmt.Fprintf(&b, "%s{voter=%v in=%v dead=%s leaving=%v} ", n.Name, n.Voter, n.InConfig, n.DeadFor, n.Leaving)
	}
	return b.String()
}

func drawPlacement(t *rapid.T) PlacementView {
	var words []string
	for _, site := range []string{"a", "b", "c", "d", "e"}[:rapid.IntRange(1, 5).Draw(t, "sites")] {
		for i := 1; i <= rapid.IntRange(0, 3).Draw(t, "nodes"); i++ {
			words = append(words, fmt.Sprintf("%s%d=%s%s", site, i,
				rapid.SampledFrom([]string{"V", "V", "n", "n", "."}).Draw(t, "role"),
				rapid.SampledFrom([]string{"", "", "", "", "!", "-", "?", "~", "%", "s", "S"}).Draw(t, "mark")))
		}
	}
	v := placementFrom(t, strings.Join(words, " "))
	var leaders []string
	for _, n := range v.Nodes {
		if n.Voter && n.DeadFor == 0 {
			leaders = append(leaders, n.Name)
		}
	}
	if len(leaders) == 0 {
		t.Skip("no node could lead")
	}
	v.Leader = rapid.SampledFrom(leaders).Draw(t, "leader")
	return v
}

// From any configuration, with a view that does not change otherwise, the steps end soon
// in a shape that the rules allow, and every configuration on the way can commit.
func TestPlaceVotersProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		v := drawPlacement(t)
		first := v.String()
		var why PlacementReason
		for step := 0; ; step++ {
			if step > 3*len(v.Nodes)+4 {
				t.Fatalf("the steps from %s don't end, now at %s", first, v.String())
			}
			votersBefore, heardBefore, perSiteBefore := v.votes()
			var plan Plan
			plan, why = PlaceVoters(v)
			if plan.Step == StepNone {
				break
			}
			if heardBefore < quorumOf(votersBefore) {
				t.Fatalf("%v without a quorum at %s", plan, v.String())
			}
			if plan.Step == StepDemote && plan.Node == v.Leader {
				t.Fatalf("takes the leader's own vote at %s", v.String())
			}
			v.take(plan)
			voters, heard, perSite := v.votes()
			if heard < quorumOf(voters) {
				t.Fatalf("%v leaves no live quorum: %s", plan, v.String())
			}
			if slackBefore, slack := heardBefore-quorumOf(votersBefore), heard-quorumOf(voters); slack < min(slackBefore, 1) && !strings.Contains(first, "leaving=true") {
				t.Fatalf("%v: fewer further failures are survived now: %s", plan, v.String())
			}
			if votersBefore == 3 && voters == 2 && !strings.Contains(first, "leaving=true") {
				t.Fatalf("demoted from three to two: %s", v.String())
			}
			for site, votes := range perSite {
				if v.upSites() >= 3 && voters > 1 && 2*votes > voters && votes > perSiteBefore[site] {
					t.Fatalf("%v gives %s a majority: %s", plan, site, v.String())
				}
			}
			if plan.Step == StepMoveLeader && heardBefore == 0 {
				t.Fatal("moved the leader although no voter is heard")
			}
			if voters != votersBefore && voters%2 == 0 && votersBefore%2 == 0 {
				t.Fatalf("from an even number of voters to another: %s", v.String())
			}
		}
		if again, _ := PlaceVoters(v); again.Step != StepNone {
			t.Fatalf("not idempotent: %v at %s", again, v.String())
		}
		voters, _, perSite := v.votes()
		switch why {
		case PlacementSettled:
			for site, votes := range perSite {
				if len(v.Sites) >= 3 && 2*votes > voters {
					t.Fatalf("%s holds the majority in the end: %s", site, v.String())
				}
			}
			fallthrough
		case PlacementWaitNodes, PlacementSiteAway:
			if voters%2 == 0 || voters > maxVoters {
				t.Fatalf("ends with %d voters (%s): %s", voters, why, v.String())
			}
		case PlacementNoQuorum, PlacementUncertain, PlacementNoReplace, PlacementUnsafeForNow:
		default:
			t.Fatalf("ends with %s: %s", why, v.String())
		}
		if why == PlacementUnsafeForNow && voters%2 == 1 && voters <= maxVoters &&
			!slices.ContainsFunc(v.Nodes, func(n PlacementNode) bool { return n.DeadFor > 0 }) {
			t.Fatalf("unsafe although all nodes are heard: %s", v.String())
		}
	})
}
