package failover

import (
	"cmp"
	"slices"
	"time"
)

// Voter placement: which members of the Raft configuration vote. PlaceVoters
// looks at what is and gives the one next step, so that a change interrupted
// by a crash or an election is simply continued by the next leader. Applied
// again and again with unchanged facts it ends with StepNone, and a
// configuration that it calls placed it never touches again.

const (
	// defaultVoterDeadAfter is how long a voter is missed before another one
	// stands in: longer than a reboot of the process, shorter than an
	// operator's coffee.
	defaultVoterDeadAfter = 60 * time.Second
	// defaultVoterStableFor is how long a member is heard without a gap
	// before it may vote (again): a flapping link must not move votes.
	defaultVoterStableFor = 30 * time.Second
	// defaultVoterGrowAfter replaces StableFor while there are fewer than
	// three voters: a young cluster that any crash stops gains more from
	// voting soon than it risks.
	defaultVoterGrowAfter = 3 * time.Second

	maxVoters = 5
	// maxPlacedSites bounds the search for a distribution: of more sites only
	// the best ones (voters first, then priority) are looked at.
	maxPlacedSites = 12
)

// PlacementSite is a configured site.
type PlacementSite struct {
	Name     string
	City     string
	Priority int // 1 comes first
}

// PlacementNode is a member, or one that should become or cease to be one, as
// the leader sees it.
type PlacementNode struct {
	Name string
	Site string
	// AliveFor is how long the leader has heard the node without a gap longer
	// than the patience; zero while it is silent. The leader hears itself.
	AliveFor time.Duration
	// DeadFor is zero while the node is heard, else the time since it was
	// last heard. A node never heard by this leader counts from the leader's
	// first commit.
	DeadFor time.Duration
	// CaughtUp: a non-voter's log is close to the leader's. Ignored for voters.
	CaughtUp bool
	InConfig bool // in the Raft configuration, with or without a vote
	Voter    bool
	// Leaving: it was removed by an operator or is no agreed member. A node
	// that only drains or restarts is not leaving.
	Leaving bool
}

// PlacementView is all that PlaceVoters looks at. Zero times mean the defaults
// (60 s, 30 s, 3 s).
type PlacementView struct {
	Sites  []PlacementSite
	Nodes  []PlacementNode
	Leader string // this node's name

	DeadAfter time.Duration
	StableFor time.Duration
	GrowAfter time.Duration
}

// StepKind is one change of the Raft configuration.
type StepKind string

// The steps, each a single change of the configuration (StepMoveLeader changes
// none: the leader can't take away its own vote).
const (
	StepNone        StepKind = "none"
	StepAddNonvoter StepKind = "add_nonvoter"
	StepAddVoter    StepKind = "add_voter"
	StepDemote      StepKind = "demote"
	StepRemove      StepKind = "remove"
	StepMoveLeader  StepKind = "move_leader"
)

// Plan is the next step and the node it is about (empty with StepNone).
type Plan struct {
	Step StepKind
	Node string
}

// PlacementReason names why a plan is what it is: log line and metric label.
type PlacementReason string

// The reasons of PlaceVoters.
const (
	PlacementSettled      PlacementReason = "placed"
	PlacementNoQuorum     PlacementReason = "no_quorum"       // nothing could be committed
	PlacementUncertain    PlacementReason = "voter_uncertain" // a voter is silent, but not yet for DeadAfter
	PlacementWaitSites    PlacementReason = "waiting_for_third_site"
	PlacementSiteAway     PlacementReason = "site_away" // a site's vote is kept: demoting from three gains nothing
	PlacementNoReplace    PlacementReason = "no_replacement"
	PlacementNewMember    PlacementReason = "new_member"
	PlacementLeaving      PlacementReason = "leaving"
	PlacementGrow         PlacementReason = "grow"
	PlacementStandIn      PlacementReason = "stand_in"
	PlacementShrink       PlacementReason = "shrink"
	PlacementRebalance    PlacementReason = "rebalance"
	PlacementLeaderInWay  PlacementReason = "leader_in_the_way" // the vote to take away is the leader's
	PlacementUnsafeForNow PlacementReason = "unsafe_now"        // the step would leave no live quorum
)

var noStep = Plan{Step: StepNone}

// PlaceVoters decides the one next change of the Raft configuration.
//
// The shapes: five voters as 2+2+1 where nodes allow, three as 1+1+1, else
// one, until a third site has caught up. With three sites up no site holds a
// majority, with three cities up no city does (1+1+2+1, 1+0+1+1). Among equal
// shapes the one that keeps the leader and most of today's voters wins, then
// priority; so it never moves votes for beauty.
//
// The order: a new voter is added before an old one is taken away, since that
// never lowers the number of further failures survived; a step that would
// leave fewer heard voters than a quorum is not taken; and no vote is moved
// while a voter's fate is open.
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
	// Only now: a settled cluster with a silent voter is still placed.
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
	p.DeadAfter = cmp.Or(v.DeadAfter, defaultVoterDeadAfter)
	p.StableFor = cmp.Or(v.StableFor, defaultVoterStableFor)
	p.GrowAfter = cmp.Or(v.GrowAfter, defaultVoterGrowAfter)
	for _, s := range v.Sites {
		p.site[s.Name] = s
	}
	p.nodes = slices.Clone(v.Nodes)
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

func (p *placement) dead(n PlacementNode) bool { return n.DeadFor >= p.DeadAfter }

// usable: may be in the target. A voter stays one until it is dead or leaves;
// another member must have shown that it is worth it.
func (p *placement) usable(n PlacementNode) bool {
	if n.Leaving || !n.InConfig {
		return false
	}
	if _, configured := p.site[n.Site]; !configured {
		return false
	}
	if n.Voter {
		return !p.dead(n)
	}
	settle := p.StableFor
	if p.staying < 3 {
		settle = min(p.GrowAfter, p.StableFor)
	}
	return n.DeadFor == 0 && n.CaughtUp && n.AliveFor >= settle
}

// heardVoters counts those of set that answer now.
func (p *placement) heardVoters(set []PlacementNode) int {
	heard := 0
	for _, n := range set {
		if n.DeadFor == 0 {
			heard++
		}
	}
	return heard
}

// target is the set of voters to arrive at, and what to say when it is there.
func (p *placement) target() ([]PlacementNode, PlacementReason) {
	have := len(p.voters)
	leaving := slices.ContainsFunc(p.voters, func(n PlacementNode) bool { return n.Leaving })
	switch {
	case len(p.up) >= 3:
		for size := maxVoters; size >= 3; size -= 2 {
			if set := p.choose(size, (size-1)/2, p.cities >= 3); set != nil {
				return set, PlacementSettled
			}
		}
	case have >= 4:
		// A site is away and three remain: shrink to them. In two sites one
		// has two of the three votes; that still survives more than five
		// votes of which the dead hold two.
		if set := p.choose(3, 2, false); set != nil {
			return set, PlacementSiteAway
		}
		if set := p.choose(3, 3, false); set != nil {
			return set, PlacementSiteAway
		}
	case have == 3 && !leaving:
		return p.standIns(), PlacementSiteAway
	default:
		if set := p.choose(1, 1, false); set != nil {
			return set, PlacementWaitSites
		}
	}
	return p.voters, PlacementNoReplace
}

// standIns replaces the dead among three voters, except those whose site is
// away as a whole: their votes wait for them.
func (p *placement) standIns() []PlacementNode {
	var set, spare []PlacementNode
	for _, n := range p.nodes {
		switch {
		case n.Voter && (!p.dead(n) || !slices.Contains(p.up, n.Site)):
			set = append(set, n)
		case !n.Voter && p.usable(n):
			spare = append(spare, n)
		}
	}
	for len(set) < 3 {
		if len(spare) == 0 {
			return p.voters
		}
		next := p.fewestVotes(spare, set)
		set = append(set, next)
		spare = slices.DeleteFunc(spare, func(n PlacementNode) bool { return n.Name == next.Name })
	}
	return set
}

// choose picks size usable nodes, at most perSite of a site (and, with
// spreadCities, a minority of a city); nil when there are not so many.
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

// usableBySite lists usable nodes, in each site in the order in which they
// would be taken: the leader, today's voters, the rest by name.
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
			return cmp.Or(boolFirst(a.Name == p.Leader, b.Name == p.Leader), boolFirst(a.Voter, b.Voter))
		})
		sites = append(sites, in)
	}
	if len(sites) > maxPlacedSites {
		slices.SortStableFunc(sites, func(a, b []PlacementNode) int { return boolFirst(a[0].Voter, b[0].Voter) })
		sites = sites[:maxPlacedSites]
	}
	return sites
}

// placementScore compares sets of one size; earlier fields weigh more.
type placementScore struct {
	sites, cities, leader, kept int
	priorities                  int // lower is better
}

func (s placementScore) better(than placementScore) bool {
	return cmp.Or(cmp.Compare(s.sites, than.sites), cmp.Compare(s.cities, than.cities),
		cmp.Compare(s.leader, than.leader), cmp.Compare(s.kept, than.kept),
		cmp.Compare(than.priorities, s.priorities)) > 0
}

func (p *placement) score(set []PlacementNode) placementScore {
	var s placementScore
	var sites, cities []string
	for _, n := range set {
		if !slices.Contains(sites, n.Site) {
			sites = append(sites, n.Site)
		}
		if city := p.site[n.Site].City; !slices.Contains(cities, city) {
			cities = append(cities, city)
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

// add gives the vote to the node whose site, then city, has the fewest.
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

// drop takes a vote away: the dead first, then those who leave, then from the
// site with the most votes. The leader's own goes after it has handed over, at
// once when it leaves, else last.
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
		for _, n := range target {
			if n.Voter && n.DeadFor == 0 {
				return Plan{StepMoveLeader, n.Name}, PlacementLeaderInWay
			}
		}
		return noStep, PlacementNoReplace
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
