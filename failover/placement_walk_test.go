package failover

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// placementWalk is a cluster whose nodes, sites and primary change, and whose leader
// places voters meanwhile. Time is virtual.
type placementWalk struct {
	t       *rapid.T
	now     time.Duration
	sites   map[string]PlacementSite
	nodes   map[string]*walkedNode // also those that were removed
	voters  map[string]bool        // the Raft configuration: does the server vote
	leader  string                 // empty: no quorum
	primary string
	history []string
}

type walkedNode struct {
	site   string
	member bool
	alive  bool
	since  time.Duration // of alive
}

func (w *placementWalk) view() PlacementView {
	v := PlacementView{Leader: w.leader, Primary: w.primary}
	for _, name := range slices.Sorted(maps.Keys(w.sites)) {
		v.Sites = append(v.Sites, w.sites[name])
	}
	for _, name := range slices.Sorted(maps.Keys(w.nodes)) {
		n := w.nodes[name]
		votes, in := w.voters[name]
		if !n.member && !in {
			continue
		}
		p := PlacementNode{Name: name, Site: n.site, Leaving: !n.member, InConfig: in, Voter: votes}
		if n.alive {
			p.AliveFor, p.CaughtUp = max(w.now-n.since, 1), w.now-n.since > time.Second
		} else {
			p.DeadFor = max(w.now-n.since, 1)
		}
		v.Nodes = append(v.Nodes, p)
	}
	return v
}

func (w *placementWalk) fail(format string, args ...any) {
	w.t.Helper()
	v := w.view()
	w.t.Fatalf("%s\nnow %s leader %s primary %s sites %v\n%s\nhistory: %s", fmt.Sprintf(format, args...),
		w.now, w.leader, w.primary, v.Sites, v.String(), strings.Join(w.history, ", "))
}

// elect gives the leadership to a voter if there is a quorum and the leader can't lead.
func (w *placementWalk) elect() {
	var alive []string
	voters := 0
	for _, name := range slices.Sorted(maps.Keys(w.voters)) {
		if !w.voters[name] {
			continue
		}
		voters++
		if w.nodes[name].alive {
			alive = append(alive, name)
		}
	}
	switch {
	case len(alive) < quorumOf(voters):
		w.leader = ""
	case !slices.Contains(alive, w.leader):
		w.leader = rapid.SampledFrom(alive).Draw(w.t, "leader")
	}
}

// step lets the leader look once, and reports whether it changed something. A look takes
// placeEvery.
func (w *placementWalk) step() bool {
	w.now += placeEvery
	w.elect()
	if w.leader == "" {
		return false
	}
	before := w.view()
	plan, why := PlaceVoters(before)
	if plan.Step == StepNone {
		w.checkRest(before, why)
		return false
	}
	w.history = append(w.history, fmt.Sprintf("%s %s (%s)", plan.Step, plan.Node, why))
	after := w.view()
	after.take(plan)
	w.checkStep(plan, before, after)
	switch plan.Step {
	case StepAddNonvoter, StepDemote:
		w.voters[plan.Node] = false
	case StepAddVoter:
		w.voters[plan.Node] = true
	case StepRemove:
		delete(w.voters, plan.Node)
	case StepMoveLeader:
		w.leader = plan.Node
	case StepNone:
	}
	return true
}

// settle lets the leader look until it changes nothing.
func (w *placementWalk) settle() {
	for steps := 0; w.step(); steps++ {
		if steps > 3*len(w.nodes)+4 {
			w.fail("the steps don't end")
		}
	}
}

// wait settles again and again while time passes.
func (w *placementWalk) wait(d time.Duration) {
	for until := w.now + d; w.now < until; w.now += 5 * time.Second {
		w.settle()
	}
	w.settle()
}

// checkStep: a step leaves a quorum of nodes that are heard, and no fewer further
// failures are survived than before.
func (w *placementWalk) checkStep(p Plan, before, after PlacementView) {
	w.t.Helper()
	votersBefore, heardBefore, perSiteBefore := before.votes()
	voters, heard, perSite := after.votes()
	if slackBefore, slack := heardBefore-quorumOf(votersBefore), heard-quorumOf(voters); slack < min(slackBefore, 1) {
		w.fail("%v: with %d of %d voters heard fewer further failures are survived than with %d of %d", p, heard, voters, heardBefore, votersBefore)
	}
	n := w.nodes[p.Node]
	_, configured := w.sites[n.site]
	leaving := slices.ContainsFunc(before.Nodes, func(n PlacementNode) bool { return n.Voter && n.Leaving })
	dead := slices.ContainsFunc(after.Nodes, func(n PlacementNode) bool {
		return n.Voter && (n.Leaving || n.DeadFor >= voterDeadAfter)
	})
	switch p.Step {
	case StepAddVoter, StepMoveLeader:
		if !n.alive || !n.member || !configured {
			w.fail("%v: the node is dead, removed or of an unknown site", p)
		}
	case StepDemote:
		if p.Node == w.leader {
			w.fail("%v: takes the leader's own vote", p)
		}
		if n.alive && dead {
			w.fail("%v: a dead node votes instead", p)
		}
		if votersBefore == 3 && !leaving {
			w.fail("%v: three voters shrink although none of them leaves", p)
		}
	}
	for site, votes := range perSite {
		if before.upSites() >= 3 && voters > 1 && 2*votes > voters && votes > perSiteBefore[site] {
			w.fail("%v gives %s a majority", p, site)
		}
	}
}

// checkRest: where nothing is left to do, the number of voters is odd, and no site of three
// has a majority.
func (w *placementWalk) checkRest(v PlacementView, why PlacementReason) {
	w.t.Helper()
	voters, heard, perSite := v.votes()
	if why == PlacementNoQuorum || heard < quorumOf(voters) {
		w.fail("no quorum (%s) although %s leads", why, w.leader)
	}
	if why == PlacementUncertain || why == PlacementUnsafeForNow {
		return // not at rest: a silent voter is soon heard or dead
	}
	if voters%2 == 0 || voters > maxVoters {
		w.fail("at rest with %d voters (%s)", voters, why)
	}
	for site, votes := range perSite {
		if why == PlacementSettled && len(w.sites) >= 3 && 2*votes > voters {
			w.fail("%s holds the majority of three sites", site)
		}
	}
}

// checkBest compares the voters with the best that the living nodes allow. All silent nodes
// are long dead, all others have been heard for long.
func (w *placementWalk) checkBest() {
	w.t.Helper()
	usable, cities, up := 0, map[string]int{}, map[string]int{}
	for _, n := range w.nodes {
		if n.member && n.alive {
			usable++
			up[n.site]++
		}
	}
	for site, n := range up {
		cities[w.sites[site].City] += min(n, 2)
	}
	ofFive := 0 // votes that five voters can have without a majority in a site or, of three, in a city
	for _, n := range cities {
		if len(cities) >= 3 {
			n = min(n, 2)
		}
		ofFive += n
	}
	votes, cityVotes, voters, dead := map[string]int{}, map[string]int{}, 0, 0
	for name, votesToo := range w.voters {
		if !votesToo {
			continue
		}
		voters++
		votes[w.nodes[name].site]++
		cityVotes[w.sites[w.nodes[name].site].City]++
		if !w.nodes[name].alive {
			dead++
		}
	}
	want, mostPerSite, inPrimary := 3, 3, 1
	switch {
	case len(up) >= 3 && ofFive >= 5:
		want, mostPerSite = 5, 2
	case len(up) >= 3:
		mostPerSite = 1
	case len(up) == 2 && usable >= 3:
		mostPerSite, inPrimary = 2, 2
	case usable >= 3:
		inPrimary = 3
	case voters == 3 && dead == 3-usable:
		return // the dead may return; see the check of each step
	default:
		want = 1
	}
	if voters != want || want > 1 && dead > 0 {
		w.fail("%d voters, %d of them dead; want %d", voters, dead, want)
	}
	for site, n := range votes {
		if n > mostPerSite {
			w.fail("%d votes in site %s, want at most %d", n, site, mostPerSite)
		}
	}
	for city, n := range cityVotes {
		if len(up) >= 3 && len(cities) >= 3 && 2*n > voters {
			w.fail("city %s of three has %d of %d votes", city, n, voters)
		}
	}
	if got := votes[w.primary]; got < min(inPrimary, up[w.primary]) {
		w.fail("%d votes in the primary's site %s, want %d", got, w.primary, min(inPrimary, up[w.primary]))
	}
}

func (w *placementWalk) some(what string, of func(name string, n *walkedNode) bool) string {
	var names []string
	for _, name := range slices.Sorted(maps.Keys(w.nodes)) {
		if of(name, w.nodes[name]) {
			names = append(names, name)
		}
	}
	if len(names) == 0 {
		return ""
	}
	return rapid.SampledFrom(names).Draw(w.t, what)
}

func (w *placementWalk) set(name string, alive bool) {
	n := w.nodes[name]
	n.alive, n.since = alive, w.now
}

func (w *placementWalk) join(site string) {
	for i := 1; ; i++ {
		name := fmt.Sprint(site, i)
		if _, known := w.nodes[name]; !known {
			w.nodes[name] = &walkedNode{site: site, member: true, alive: true, since: w.now}
			return
		}
	}
}

// event changes the cluster at random, as far as that is possible now.
func (w *placementWalk) event() {
	t := w.t
	what := rapid.SampledFrom([]string{"kill", "kill", "return", "return", "wipe", "join", "join", "remove", "remove", "add site", "remove site", "promote", "elect", "kill site"}).Draw(t, "event")
	w.elect()
	quorum := w.leader != ""
	on := ""
	switch what {
	case "kill":
		if on = w.some("node", func(_ string, n *walkedNode) bool { return n.alive }); on != "" {
			w.set(on, false)
		}
	case "kill site":
		on = rapid.SampledFrom(slices.Sorted(maps.Keys(w.sites))).Draw(t, "site")
		for name, n := range w.nodes {
			if n.site == on && n.alive {
				w.set(name, false)
			}
		}
	case "return":
		if on = w.some("node", func(_ string, n *walkedNode) bool { return n.member && !n.alive }); on != "" {
			w.set(on, true)
		}
	case "wipe": // the leader demotes it before it is admitted again
		on = w.some("node", func(name string, n *walkedNode) bool { return quorum && n.member && !n.alive })
		if on == "" {
			return
		}
		w.set(on, true)
		if w.voters[on] {
			w.voters[on] = false
		}
	case "join":
		on = rapid.SampledFrom(slices.Sorted(maps.Keys(w.sites))).Draw(t, "site")
		if quorum && len(w.nodes) < 14 {
			w.join(on)
		}
	case "remove":
		on = w.some("node", func(_ string, n *walkedNode) bool { return quorum && n.member && !n.alive })
		if on != "" {
			w.nodes[on].member = false
		}
	case "add site":
		for _, s := range placementSites {
			if _, known := w.sites[s.Name]; !known && quorum {
				w.sites[s.Name], on = s, s.Name
				break
			}
		}
	case "remove site":
		for _, name := range slices.Sorted(maps.Keys(w.sites)) {
			members := w.some("", func(_ string, n *walkedNode) bool { return n.member && n.site == name })
			if quorum && members == "" && name != w.primary {
				delete(w.sites, name)
				on = name
				break
			}
		}
	case "promote":
		if name := w.some("node", func(_ string, n *walkedNode) bool { return quorum && n.member && n.alive }); name != "" {
			w.primary, on = w.nodes[name].site, w.nodes[name].site
		}
	case "elect":
		w.leader = ""
	}
	w.history = append(w.history, strings.TrimSpace("["+what+" "+on)+"]")
}

// From any topology to any other: nodes die, return with their disk or without it, join and are
// removed; sites and the primary change, while the placement is at any point of its steps. No step
// makes the cluster weaker, each series of steps ends, and when all is quiet the voters are
// the best that the living nodes allow, and stay so.
func TestPlaceVotersOnAnyWalk(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		first := placementSites[0]
		w := &placementWalk{
			t: t, sites: map[string]PlacementSite{first.Name: first}, primary: first.Name,
			nodes:  map[string]*walkedNode{"a1": {site: "a", member: true, alive: true, since: -time.Hour}},
			voters: map[string]bool{"a1": true}, leader: "a1",
		}
		for _, s := range placementSites[1:rapid.IntRange(1, 5).Draw(t, "sites")] {
			w.sites[s.Name] = s
		}
		for _, site := range slices.Sorted(maps.Keys(w.sites)) {
			for range rapid.IntRange(0, 3).Draw(t, "nodes") {
				w.join(site)
			}
		}
		for range rapid.IntRange(0, 30).Draw(t, "events") {
			w.event()
			for range rapid.IntRange(0, 4).Draw(t, "looks") {
				w.step()
			}
			if pause := rapid.SampledFrom([]time.Duration{0, 0, time.Second, 10 * time.Second, 45 * time.Second, 70 * time.Second, 3 * time.Minute}).Draw(t, "pause"); pause > 0 {
				w.history = append(w.history, "["+pause.String()+"]")
				w.wait(pause)
			}
		}
		quiet := func(why string) {
			w.history = append(w.history, "["+why+"]")
			w.wait(3 * time.Minute)
			if w.leader == "" {
				return
			}
			w.checkBest()
			steps := len(w.history)
			w.wait(10 * time.Minute)
			if len(w.history) != steps {
				w.fail("it goes on after it was placed")
			}
		}
		quiet("quiet")
		for name, n := range w.nodes {
			if n.member && !n.alive {
				w.set(name, true)
			}
		}
		quiet("all members return")
		if w.leader == "" {
			w.fail("no quorum although all members are back")
		}
	})
}
