package failover

import (
	"cmp"
	"math"
	"slices"
	"time"

	"github.com/dsnode/dsnode/cluster/config"
)

// The detector turns what nodes observed into one view of each site, and into the list
// of nodes that are gone. It is a pure function of the observations and of a small memory that the coordinator carries
// from one look to the next.
//
// One recent sighting by any node keeps a site alive, however old that node's table
// is otherwise. Declaring a site down needs the leader and a node of a third site,
// each with a fresh table and without a recent pause of its own: a starved node
// hears no other node.

// Sighting is what an observer knows of one node.
type Sighting struct {
	// Ago is how long before the observation the observer sent its newest ping that
	// the node answered.
	Ago time.Duration
	// LeaseLeft is the rest of the node's own lease, as that answer told it.
	LeaseLeft time.Duration
	// LeaseKnown is false when the observer did not pass LeaseLeft on.
	LeaseKnown bool
}

// Observation is one node's table of the other nodes.
type Observation struct {
	Observer string
	Site     string
	// Age is how old the table is on the leader's clock; 0 for its own.
	Age time.Duration
	// Paused is the longest recent time in which the observer's process did not run.
	Paused time.Duration
	// Leased: the observer holds a lease, so the nodes that ping it get one.
	Leased bool
	// Seen by node name. A node that was never heard is absent.
	Seen map[string]Sighting
}

// Member is a node as the leader knows it.
type Member struct {
	Name, Site string
	// Ready: the leader heard it within a lease's length, and by its answer it held a
	// lease, was not draining, not cold, and had applied an entry within the patience. The
	// leader judges itself by the same.
	Ready bool
	// Steady is Ready within the patience instead of a lease's length, so that a
	// lossy link does not interrupt it.
	Steady bool
	// Responsive is Ready within three pings' time, without a recent pause of the
	// node's process, and Follows.
	Responsive bool
	// Follows: it applies entries while this node does. Otherwise its disk hangs, or the
	// leader's entries don't reach it; Stuck is for how long.
	Follows bool
	Stuck   time.Duration
	// CaughtUp: it has applied all committed entries except the newest few, which are
	// on their way.
	CaughtUp bool
	// UpstreamsHealthy is how many of its site's are, as the node sees them.
	UpstreamsHealthy int
	Voter            bool
	// Acts: heard within the patience, and by its answer it acted as primary in the epoch
	// of now. Of an older version, which does not tell, and of the leader it is presumed.
	Acts bool
	// SlowFor is for how long its disk has been too slow for a leader, by its own
	// measurement; 0: it is not.
	SlowFor time.Duration
}

// Input is all that the detector looks at.
type Input struct {
	Now     time.Duration // the leader's Boottime
	Timing  config.Timing
	Sites   []PlacementSite
	Members []Member
	Leader  Observation // of the leader itself
	Others  []Observation
	Primary string
	Epoch   uint64
	// Switching: a planned switchover is under way, and the primary stops for it.
	Switching bool
	// RaftLeader is the raft leader as far as this node knows, empty for none.
	RaftLeader string
	// Opened is the raft index of the newest job stream that each node opened itself
	// and still owns.
	Opened map[string]uint64
}

// SiteView is a site as seen from the leader.
type SiteView struct {
	Name     string
	City     string
	Priority int
	// Ready counts the nodes that can act as primary at once.
	Ready            int
	UpstreamsHealthy int
	// LeaderSilence is how long the leader has not heard any node of the site.
	LeaderSilence time.Duration
	// Heard: some node of another site, or the leader, has heard the site within the
	// patience.
	Heard bool
	// Silence is how long the leader and a node of a third site have both heard
	// nothing from it; zero while Heard or without such a witness.
	Silence time.Duration
	// Witnessed: a node of a third site can confirm the silence.
	Witnessed bool
	// Leased: some node of it holds a lease, or must be presumed to.
	Leased bool
	// NoLeaseFor is for how long of the time that the leader watched it held none.
	NoLeaseFor time.Duration
	// IdleFor grows while this is the primary, leased, and tells the leader that no node of
	// it acts. It shrinks as fast while one does: a process that ends again and again soon after each start is
	// heard, and gets leases.
	IdleFor time.Duration
	// StableFor is how long some node of it has been steady without a gap.
	StableFor time.Duration
	// SlowFor is for how long the disks of all its steady nodes have been too slow for a
	// raft leader; zero when one is fast enough, and when no node is steady.
	SlowFor time.Duration
	// Behind is how many records of the primary its copy lacks. It is nil when that is
	// unknown, and while the primary is not lost.
	Behind *int64

	steady, acts bool
	direct       bool // the leader itself has heard it within the patience
}

// Memory is what the detector keeps between two looks. The zero value is that of a
// process that has just started. Every node keeps one, so that a new leader knows
// what it saw before it led.
type Memory struct {
	looked bool
	last   time.Duration
	// watching is since when the leader has watched without a pause.
	watching time.Duration
	noLease  map[string]time.Duration // watched time without a lease, by site
	stable   map[string]time.Duration // Now of when the site became steady
	opened   map[string]opening       // by node
	idle     time.Duration            // SiteView.IdleFor of the primary
	epoch    uint64                   // that idle is of
}

// opening is the newest job stream that a node opened, and the Now of the look that saw
// it first.
type opening struct {
	index uint64
	at    time.Duration
}

// Observe gives the view of each site and what to remember for the next look.
// The views are ordered by priority.
func Observe(m Memory, in Input) (Memory, []SiteView) {
	next := Memory{
		looked: true, last: in.Now, watching: m.watching,
		noLease: map[string]time.Duration{}, stable: map[string]time.Duration{}, opened: map[string]opening{},
	}
	for _, n := range in.Members {
		newest, known := m.opened[n.Name]
		if index := in.Opened[n.Name]; index > newest.index {
			newest, known = opening{index: index, at: in.Now}, true
		}
		if known {
			next.opened[n.Name] = newest
		}
	}
	step := in.Now - m.last
	limit := pauseLimit(in.Timing)
	if !m.looked || step > limit || in.Leader.Paused > limit {
		// A leader that did not run did not listen either: its patience begins
		// again. Only watched time counts as time without a lease.
		next.watching = in.Now
		step = 0
	}
	views := make([]SiteView, 0, len(in.Sites))
	for _, s := range in.Sites {
		v := in.site(s, in.Now-next.watching)
		if !v.Leased {
			next.noLease[s.Name] = m.noLease[s.Name] + step
			v.NoLeaseFor = next.noLease[s.Name]
		}
		if s.Name == in.Primary {
			next.idle, next.epoch = idle(m, in, v, step), in.Epoch
			v.IdleFor = next.idle
		}
		if v.steady {
			since, was := m.stable[s.Name]
			if !was {
				since = in.Now
			}
			next.stable[s.Name] = since
			v.StableFor = in.Now - since
		}
		views = append(views, v)
	}
	slices.SortFunc(views, func(a, b SiteView) int {
		return cmp.Or(cmp.Compare(a.Priority, b.Priority), cmp.Compare(a.Name, b.Name))
	})
	return next, views
}

// idle is SiteView.IdleFor of the primary, a step of watched time after the last look.
func idle(m Memory, in Input, v SiteView, step time.Duration) time.Duration {
	switch {
	case m.epoch != in.Epoch || in.Switching:
		return 0
	case v.acts:
		return max(0, m.idle-step)
	case v.Leased && v.direct:
		return m.idle + step
	}
	return m.idle // it has no lease, or tells the leader nothing
}

// pauseLimit is the longest pause of a node's process with which the node still
// counts as a witness against a site. A node that runs 700 ms of each second stays
// below it; it is far below the patience.
func pauseLimit(t config.Timing) time.Duration { return 2 * t.Tick }

// freshLimit is how old a witness's table may be: a ping interval, a lost
// segment and some jitter.
func freshLimit(t config.Timing) time.Duration { return 4 * t.Tick }

func (in Input) site(s PlacementSite, watched time.Duration) SiteView {
	v := SiteView{Name: s.Name, City: s.City, Priority: s.Priority}
	var nodes []string
	for _, m := range in.Members {
		if m.Site != s.Name {
			continue
		}
		nodes = append(nodes, m.Name)
		v.acts = v.acts || m.Acts
		if m.Ready {
			v.Ready++
		}
		if m.Steady {
			if !v.steady || m.SlowFor < v.SlowFor {
				v.SlowFor = m.SlowFor
			}
			v.steady = true
			v.UpstreamsHealthy = max(v.UpstreamsHealthy, m.UpstreamsHealthy)
		}
	}
	if in.Leader.Site == s.Name {
		// The observer is one of its nodes, and leads with a lease of its own.
		v.Heard, v.Leased = true, in.Leader.Leased
		return v
	}
	q := in.silenceOf(nodes, s.Name, watched, func(o Observation) bool { return o.Site != s.Name })
	v.LeaderSilence, v.Heard, v.Witnessed, v.Silence = q.leader, q.newest < in.Timing.Patience, q.witnessed, q.both
	if v.Heard {
		v.Silence = 0
	}
	v.Leased = in.Leader.leased(nodes, in.Timing)
	if v.direct = q.direct < in.Timing.Patience; v.direct {
		return v // an answer of the site itself to the leader is better evidence
	}
	for _, o := range in.Others {
		v.Leased = v.Leased || (o.Site != s.Name && o.leased(nodes, in.Timing))
	}
	return v
}

// never is longer than any time since a sighting.
const never = time.Duration(math.MaxInt64)

// silence is what all nodes together know about the silence of a group of nodes: of a
// site, or of one node.
type silence struct {
	direct    time.Duration // since the leader's newest sighting of one of them
	newest    time.Duration // since anybody's newest sighting, however old the table is otherwise
	leader    time.Duration // for how long the leader has listened and heard none
	witnessed bool
	both      time.Duration // for how long a witness has heard none either; 0 without one
}

// silenceOf is the one judgement of silence, for failovers and for adoptions. A witness
// is a node outside the group with a fresh table and without a recent pause, which has
// heard one of the group before. It is not at the leader's site, because the leader's
// neighbours share its links; it may be if the group is there too.
func (in Input) silenceOf(nodes []string, site string, watched time.Duration, outside func(Observation) bool) silence {
	q := silence{direct: never, newest: never, leader: watched}
	if ago, seen := in.Leader.latest(nodes); seen {
		// Silence before a pause of the leader proves nothing: only watched time
		// counts.
		q.direct, q.newest, q.leader = ago, ago, min(ago, watched)
	}
	for _, o := range in.Others {
		ago, ever := o.latest(nodes)
		if !ever || !outside(o) {
			continue
		}
		q.newest = min(q.newest, ago+o.Age)
		if o.Site == in.Leader.Site && site != in.Leader.Site || o.Age > freshLimit(in.Timing) || o.Paused > pauseLimit(in.Timing) {
			continue
		}
		q.witnessed = true
		q.both = max(q.both, ago)
	}
	q.both = min(q.both, q.leader)
	return q
}

// Gone tells which nodes are gone, so that others may adopt their job streams. The
// memory is the one that Observe returned for the same input. A node is gone when nobody
// has heard it for adoptAfter, by the leader's word and by a witness's. Where no witness
// answers, it is gone after NoLease: a second site has no third one to confirm it, and a
// node without a lease runs only what nobody can adopt.
//
// A node that has just opened a stream lives, whoever hears it. A leader that hears fewer
// voters than its own commits prove to be alive judges nobody: pings don't reach it,
// and Raft's messages do.
func Gone(m Memory, in Input) map[string]bool {
	gone := map[string]bool{}
	if !in.hearsQuorum() {
		return gone
	}
	watched := in.Now - m.watching
	for _, n := range in.Members {
		if n.Name == in.Leader.Observer {
			continue
		}
		if o, known := m.opened[n.Name]; known && in.Now-o.at < adoptAfter {
			continue
		}
		q := in.silenceOf([]string{n.Name}, n.Site, watched, func(o Observation) bool { return o.Observer != n.Name })
		if q.newest < adoptAfter {
			continue
		}
		gone[n.Name] = q.leader >= in.Timing.NoLease || q.witnessed && q.both >= adoptAfter
	}
	return gone
}

// hearsQuorum reports whether the leader hears a majority of the voters, itself included.
func (in Input) hearsQuorum() bool {
	voters, heard := 0, 0
	for _, m := range in.Members {
		if !m.Voter {
			continue
		}
		voters++
		if s, ok := in.Leader.Seen[m.Name]; m.Name == in.Leader.Observer || ok && s.Ago < in.Timing.Patience {
			heard++
		}
	}
	return heard > voters/2
}

// latest is how long before the observation one of the nodes was last heard.
func (o Observation) latest(nodes []string) (ago time.Duration, ever bool) {
	for _, n := range nodes {
		if s, ok := o.Seen[n]; ok && (!ever || s.Ago < ago) {
			ago, ever = s.Ago, true
		}
	}
	return ago, ever
}

// leased reports whether, as far as o knows, one of the nodes may hold a lease: it
// said so within the patience. When o did not pass that on, a node that o hears is
// presumed to have got a lease from o, if o holds one.
func (o Observation) leased(nodes []string, t config.Timing) bool {
	return slices.ContainsFunc(nodes, func(n string) bool {
		s, ok := o.Seen[n]
		if !ok || s.Ago+o.Age >= t.Patience {
			return false
		}
		if s.LeaseKnown {
			return s.LeaseLeft > 0
		}
		return o.Leased
	})
}
