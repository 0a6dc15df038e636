package failover

import (
	"cmp"
	"slices"
	"time"
)

// Voter placement: which members of the Raft configuration vote. PlaceVoters looks at
// the current configuration and gives one next step. So the next leader continues a
// change that a crash or an election interrupted. With an unchanged view the steps end
// with StepNone, and a configuration that is placed is not changed again.

const (
	// voterDeadAfter is how long a voter must be silent before another node
	// replaces it: longer than a restart of the process, shorter than an operator needs
	// to react.
	voterDeadAfter = 60 * time.Second
	// voterSlowAfter is how long a voter's disk must be slow before another node of its
	// site replaces it. It votes, but with it in a bare quorum nothing is committed in
	// time for a lease.
	voterSlowAfter = 60 * time.Second
	// voterStableFor is how long a member must be heard without a gap before it
	// may vote (again): a flapping link must not move votes.
	voterStableFor = 30 * time.Second
	// voterGrowAfter replaces voterStableFor while fewer than three voters are neither
	// dead nor leaving: until then any crash of a voter stops the cluster, so growing soon
	// is worth the risk.
	voterGrowAfter = 3 * time.Second

	maxVoters = 5
	// maxPlacedSites bounds the search for a distribution: of more sites only the first
	// ones are considered, those with voters first, then by priority.
	maxPlacedSites = 12
)

// PlacementSite is a configured site.
type PlacementSite struct {
	Name     string
	City     string
	Priority int // 1 comes first
}

// PlacementNode is a member as the leader sees it, or a node of the Raft configuration
// that is to become one or is none any more.
type PlacementNode struct {
	Name string
	Site string
	// AliveFor is how long the leader has heard the node without a gap longer than the
	// patience; zero while it is silent. The leader hears itself.
	AliveFor time.Duration
	// DeadFor is zero while the node is heard, else the time since it was last heard. For
	// a node that this leader has never heard it counts from the leader's first commit.
	DeadFor time.Duration
	// SlowFor is for how long its disk has been too slow for a leader; zero: it is not.
	SlowFor time.Duration
	// CaughtUp: a non-voter's log is close to the leader's. Ignored for voters.
	CaughtUp bool
	InConfig bool // in the Raft configuration, with or without a vote
	Voter    bool
	// Leaving: an operator has removed it, it is no agreed member, or its site is not
	// configured. A node that drains or restarts is not leaving.
	Leaving bool
}

// PlacementView is all that PlaceVoters looks at.
type PlacementView struct {
	Sites   []PlacementSite
	Nodes   []PlacementNode
	Leader  string // this node's name
	Primary string // the primary site
}

// StepKind is one change of the Raft configuration.
type StepKind string

// The steps. Each is a single change of the configuration, except StepMoveLeader: the
// leader can't remove its own vote, so it hands the leadership over first.
const (
	StepNone        StepKind = "none"
	StepAddNonvoter StepKind = "add_nonvoter"
	StepAddVoter    StepKind = "add_voter"
	StepDemote      StepKind = "demote"
	StepRemove      StepKind = "remove"
	StepMoveLeader  StepKind = "move_leader"
)

// Plan is the next step and its node (empty with StepNone).
type Plan struct {
	Step StepKind
	Node string
}

// PlacementReason names why PlaceVoters gave a plan. It is in the log.
type PlacementReason string

const (
	PlacementSettled      PlacementReason = "placed"
	PlacementNoQuorum     PlacementReason = "no_quorum"               // nothing could be committed
	PlacementUncertain    PlacementReason = "voter_uncertain"         // a voter is silent, but not yet for voterDeadAfter
	PlacementWaitNodes    PlacementReason = "waiting_for_three_nodes" // until then one voter is the best: of two, both are needed
	PlacementSiteAway     PlacementReason = "site_away"               // placed as well as the sites that are up allow
	PlacementNoReplace    PlacementReason = "no_replacement"
	PlacementNewMember    PlacementReason = "new_member"
	PlacementLeaving      PlacementReason = "leaving"
	PlacementGrow         PlacementReason = "grow"
	PlacementStandIn      PlacementReason = "stand_in"
	PlacementShrink       PlacementReason = "shrink"
	PlacementRebalance    PlacementReason = "rebalance"
	PlacementLeaderInWay  PlacementReason = "leader_in_the_way" // the voter to demote is the leader
	PlacementUnsafeForNow PlacementReason = "unsafe_now"        // the step would leave no quorum of heard voters
)

var noStep = Plan{Step: StepNone}

// PlaceVoters decides the next change of the Raft configuration. It is pure.
//
// The shapes: with three sites up, five voters as 2+2+1 where nodes allow, else three as
// 1+1+1; no site holds a majority, and with three cities up no city does (1+1+2+1,
// 1+0+1+1). With two sites up three as 2+1, with one site three, if there are three nodes.
// With fewer nodes one: of two voters both are needed, so two are worse. But three stay
// three while dead ones among them may return: one voter would save nothing then.
//
// Among equal shapes it prefers the one with votes in the primary's site, then the one
// that keeps the leader, then the one that keeps most of the current voters, then
// priority. So it moves no vote without need. With three sites up one vote in the
// primary's site is enough: the leader must be able to go there. With fewer sites some
// site holds the majority, and that should be the primary's: then the loss of another
// site costs nothing.
//
// The order: a new voter is added before an old one is demoted, which never lowers the
// number of further failures that are survived. A step that would leave fewer heard
// voters than a quorum is not taken. No vote is moved while a voter is silent and not
// yet dead.
func PlaceVoters(v PlacementView) (Plan, PlacementReason) {
	p := newPlacement(v)
	if p.heardVoters(p.voters) < quorumOf(len(p.voters)) {
		return noStep, PlacementNoQuorum
	}
	for _, n := range p.nodes {
		if !n.InConfig && !n.Leaving && n.DeadFor == 0 {
			return Plan{StepAddNonvoter, n.Name}, PlacementNewMember
		}
		if n.InConfig && !n.Voter && n.Leaving {
			return Plan{StepRemove, n.Name}, PlacementLeaving
		}
	}
	target, why := p.target()
	adds, drops := difference(target, p.voters), difference(p.voters, target)
	if len(adds) == 0 && len(drops) == 0 {
		return noStep, why
	}
	// This check comes after the others: a placed cluster with a silent voter is still
	// placed.
	for _, n := range p.voters {
		if n.DeadFor > 0 && !p.dead(n) && !n.Leaving {
			return noStep, PlacementUncertain
		}
	}
	if len(adds) > 0 && len(p.voters) <= len(target) {
		return p.add(adds, drops)
	}
	return p.drop(drops, target)
}

type placement struct {
	PlacementView
	site   map[string]PlacementSite
	nodes  []PlacementNode // by site priority, then name
	voters []PlacementNode // of nodes
	// staying counts the voters that are neither dead nor leaving.
	staying int
	up      []string // sites with a usable node, by priority
	cities  int      // distinct cities of up
}

func newPlacement(v PlacementView) *placement {
	p := &placement{PlacementView: v, site: make(map[string]PlacementSite, len(v.Sites))}
	for _, s := range v.Sites {
		p.site[s.Name] = s
	}
	p.nodes = slices.Clone(v.Nodes)
	for i, n := range p.nodes {
		_, configured := p.site[n.Site]
		p.nodes[i].Leaving = n.Leaving || !configured
	}
	slices.SortFunc(p.nodes, func(a, b PlacementNode) int {
		return cmp.Or(cmp.Compare(p.site[a.Site].Priority, p.site[b.Site].Priority),
			cmp.Compare(a.Site, b.Site), cmp.Compare(a.Name, b.Name))
	})
	for _, n := range p.nodes {
		if n.Voter {
			p.voters = append(p.voters, n)
			if !n.Leaving && !p.dead(n) {
				p.staying++
			}
		}
	}
	cities := map[string]bool{}
	for _, n := range p.nodes {
		if p.usable(n) && !slices.Contains(p.up, n.Site) {
			p.up = append(p.up, n.Site)
			cities[p.site[n.Site].City] = true
		}
	}
	p.cities = len(cities)
	return p
}

func (p *placement) dead(n PlacementNode) bool { return n.DeadFor >= voterDeadAfter }

func (p *placement) slow(n PlacementNode) bool { return n.SlowFor >= voterSlowAfter }

// usable: the node may be in the target. A voter may until it is dead or leaves. Another
// member must have been heard for long enough and have caught up.
func (p *placement) usable(n PlacementNode) bool {
	if n.Leaving || !n.InConfig {
		return false
	}
	if n.Voter {
		return !p.dead(n)
	}
	stableFor := voterStableFor
	if p.staying < 3 {
		stableFor = voterGrowAfter
	}
	return n.DeadFor == 0 && n.CaughtUp && n.AliveFor >= stableFor
}

// heardVoters counts the nodes of set that are heard now.
func (p *placement) heardVoters(set []PlacementNode) int {
	heard := 0
	for _, n := range set {
		if n.DeadFor == 0 {
			heard++
		}
	}
	return heard
}

// target is the set of voters to arrive at, and the reason to give when it is reached.
func (p *placement) target() ([]PlacementNode, PlacementReason) {
	if len(p.up) >= 3 {
		for size := maxVoters; size >= 3; size -= 2 {
			if set := p.choose(size, (size-1)/2, p.cities >= 3); set != nil {
				return set, PlacementSettled
			}
		}
	}
	placed := PlacementSettled
	if len(p.Sites) >= 3 {
		placed = PlacementSiteAway
	}
	if set := p.choose(3, 3, false); set != nil { // of two sites it takes both
		return set, placed
	}
	if set := p.keepThree(); set != nil {
		return set, PlacementNoReplace
	}
	if set := p.choose(1, 1, false); set != nil {
		return set, PlacementWaitNodes
	}
	return p.voters, PlacementNoReplace
}

// keepThree is three of the current voters, some of them dead. It is nil if fewer stay
// in the cluster. The ones to give up first are dead, then in the site with the lowest
// priority.
func (p *placement) keepThree() []PlacementNode {
	var alive, dead []PlacementNode
	for _, n := range p.voters {
		switch {
		case n.Leaving:
		case p.dead(n):
			dead = append(dead, n)
		default:
			alive = append(alive, n)
		}
	}
	if len(alive)+len(dead) < 3 {
		return nil
	}
	return append(alive, dead...)[:3]
}

// choose picks size usable nodes, at most perSite of a site and, with spreadCities, a
// minority of each city. It gives nil when that is not possible.
func (p *placement) choose(size, perSite int, spreadCities bool) []PlacementNode {
	bySite := p.usableBySite()
	perCity := size
	if spreadCities {
		perCity = (size - 1) / 2
	}
	var best []PlacementNode
	var bestScore placementScore
	inCity := map[string]int{}
	var walk func(at int, set []PlacementNode)
	walk = func(at int, set []PlacementNode) {
		if len(set) == size {
			if score := p.score(set); best == nil || score.better(bestScore) {
				best, bestScore = slices.Clone(set), score
			}
			return
		}
		if at == len(bySite) {
			return
		}
		site := bySite[at]
		city := p.site[site[0].Site].City
		for take := min(perSite, len(site), size-len(set)); take >= 0; take-- {
			if inCity[city]+take > perCity {
				continue
			}
			inCity[city] += take
			walk(at+1, append(set, site[:take]...))
			inCity[city] -= take
		}
	}
	walk(0, make([]PlacementNode, 0, size))
	return best
}

// usableBySite lists the usable nodes of each site in the order in which they are taken:
// those with a slow disk last; the leader, the current voters, the rest by name.
func (p *placement) usableBySite() [][]PlacementNode {
	var sites [][]PlacementNode
	for _, name := range p.up {
		var in []PlacementNode
		for _, n := range p.nodes {
			if n.Site == name && p.usable(n) {
				in = append(in, n)
			}
		}
		slices.SortStableFunc(in, func(a, b PlacementNode) int {
			return cmp.Or(boolFirst(!p.slow(a), !p.slow(b)), boolFirst(a.Name == p.Leader, b.Name == p.Leader), boolFirst(a.Voter, b.Voter))
		})
		sites = append(sites, in)
	}
	if len(sites) > maxPlacedSites {
		slices.SortStableFunc(sites, func(a, b []PlacementNode) int { return boolFirst(a[0].Voter, b[0].Voter) })
		sites = sites[:maxPlacedSites]
	}
	return sites
}

// placementScore compares sets of equal size. Earlier fields weigh more.
type placementScore struct {
	sites, cities int
	primary       int // votes in the primary's site, as far as they count
	leader, kept  int
	priorities    int // lower is better
}

func (s placementScore) better(than placementScore) bool {
	return cmp.Or(cmp.Compare(s.sites, than.sites), cmp.Compare(s.cities, than.cities),
		cmp.Compare(s.primary, than.primary), cmp.Compare(s.leader, than.leader), cmp.Compare(s.kept, than.kept),
		cmp.Compare(than.priorities, s.priorities)) > 0
}

func (p *placement) score(set []PlacementNode) placementScore {
	var s placementScore
	var sites, cities []string
	enough := len(set)
	if len(p.up) >= 3 {
		enough = 1
	}
	for _, n := range set {
		if !slices.Contains(sites, n.Site) {
			sites = append(sites, n.Site)
		}
		if city := p.site[n.Site].City; !slices.Contains(cities, city) {
			cities = append(cities, city)
		}
		if n.Site == p.Primary {
			s.primary = min(s.primary+1, enough)
		}
		if n.Name == p.Leader {
			s.leader = 1
		}
		if n.Voter {
			s.kept++
		}
		s.priorities += p.site[n.Site].Priority
	}
	s.sites, s.cities = len(sites), len(cities)
	return s
}

// add gives a vote to the node whose site, then city, has the fewest.
func (p *placement) add(adds, drops []PlacementNode) (Plan, PlacementReason) {
	next := p.fewestVotes(adds, p.voters)
	after := append(slices.Clone(p.voters), next)
	if p.heardVoters(after) < quorumOf(len(after)) {
		return noStep, PlacementUnsafeForNow
	}
	why := PlacementGrow
	switch {
	case slices.ContainsFunc(drops, p.dead):
		why = PlacementStandIn
	case slices.ContainsFunc(drops, func(n PlacementNode) bool { return n.Leaving }):
		why = PlacementLeaving
	case len(drops) > 0:
		why = PlacementRebalance
	}
	return Plan{StepAddVoter, next.Name}, why
}

// drop demotes a voter: a dead one first, then one that leaves, then one of the site
// with the most votes. A leader that does not leave is the last choice. A leader can't
// demote itself: it hands over, and the next leader demotes it.
func (p *placement) drop(drops, target []PlacementNode) (Plan, PlacementReason) {
	votes := votesBySite(p.voters)
	next := slices.MinFunc(drops, func(a, b PlacementNode) int {
		return cmp.Or(boolFirst(p.dead(a), p.dead(b)), boolFirst(a.Leaving, b.Leaving),
			boolFirst(b.Name == p.Leader, a.Name == p.Leader),
			cmp.Compare(votes[b.Site], votes[a.Site]),
			cmp.Compare(p.site[b.Site].Priority, p.site[a.Site].Priority),
			cmp.Compare(b.Name, a.Name))
	})
	if next.Name == p.Leader {
		to := ""
		for _, n := range target {
			if n.Voter && n.DeadFor == 0 && (to == "" || n.SlowFor == 0) {
				if to = n.Name; n.SlowFor == 0 {
					break
				}
			}
		}
		if to == "" {
			return noStep, PlacementNoReplace
		}
		return Plan{StepMoveLeader, to}, PlacementLeaderInWay
	}
	after := difference(p.voters, []PlacementNode{next})
	if p.heardVoters(after) < quorumOf(len(after)) {
		return noStep, PlacementUnsafeForNow
	}
	switch {
	case next.Leaving:
		return Plan{StepDemote, next.Name}, PlacementLeaving
	case p.dead(next) && len(p.voters)%2 == 0:
		return Plan{StepDemote, next.Name}, PlacementStandIn
	case len(p.voters) > len(target)+1 || len(p.up) < 3:
		return Plan{StepDemote, next.Name}, PlacementShrink
	}
	return Plan{StepDemote, next.Name}, PlacementRebalance
}

func (p *placement) fewestVotes(of, voters []PlacementNode) PlacementNode {
	site := votesBySite(voters)
	city := map[string]int{}
	for _, n := range voters {
		city[p.site[n.Site].City]++
	}
	return slices.MinFunc(of, func(a, b PlacementNode) int {
		return cmp.Or(cmp.Compare(site[a.Site], site[b.Site]),
			cmp.Compare(city[p.site[a.Site].City], city[p.site[b.Site].City]),
			cmp.Compare(p.site[a.Site].Priority, p.site[b.Site].Priority),
			cmp.Compare(a.Name, b.Name))
	})
}

func votesBySite(voters []PlacementNode) map[string]int {
	votes := map[string]int{}
	for _, n := range voters {
		votes[n.Site]++
	}
	return votes
}

// difference is a without the nodes of b.
func difference(a, b []PlacementNode) []PlacementNode {
	var out []PlacementNode
	for _, n := range a {
		if !slices.ContainsFunc(b, func(m PlacementNode) bool { return m.Name == n.Name }) {
			out = append(out, n)
		}
	}
	return out
}

func quorumOf(voters int) int { return voters/2 + 1 }

// MostVoters is how many voters there can be with that many usable nodes in each site; 1
// when it is not for PlaceVoters alone to say.
func MostVoters(perSite map[string]int) int {
	sites, nodes := 0, 0
	for _, n := range perSite {
		if n > 0 {
			sites, nodes = sites+1, nodes+min(n, (maxVoters-1)/2)
		}
	}
	switch {
	case sites < 3:
		return 1
	case nodes >= maxVoters:
		return maxVoters
	}
	return 3
}

// VoteReturnsWithin is how long after a node's start it has its vote again, if it is to
// have one.
const VoteReturnsWithin = voterStableFor + 15*time.Second

// boolFirst orders true before false.
func boolFirst(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return -1
	}
	return 1
}
