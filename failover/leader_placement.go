package failover

import (
	"slices"
	"time"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/cluster/agreed"
)

// An election may leave the raft leader in another site than the primary's. That
// is safe, but each lease of the primary then comes over a link between sites, and
// on a bad link it may run out for a moment. So the leader moves itself to the
// primary's site: once, when a voter there has been responsive for a while, and
// after a longer wait each time that an election moved it away again.

const (
	// leaderStableFor is how long a voter must have been responsive without a gap,
	// and this leadership have lasted, before the leader moves to it.
	leaderStableFor = 30 * time.Second
	// moveAgainAfter is the least time between two attempts of a leader. It doubles
	// with each that failed.
	moveAgainAfter = 3 * time.Minute
	// electionMemory is for how long the election of a leader away from the primary's
	// site counts. Each but the first doubles leaderStableFor for the leadership.
	electionMemory = time.Hour
	// maxDoublings bounds both.
	maxDoublings = 5
)

// LeaderView is all that PlaceLeader looks at.
type LeaderView struct {
	// Healthy: Decide finds the primary healthy.
	Healthy bool
	// Busy: a switchover or a drill is under way.
	Busy bool

	LeaderSite, Primary string
	LeadingFor          time.Duration
	// Elected is how often another leader was elected away from the primary's site,
	// this one included, within electionMemory and since the primary changed.
	Elected int
	// Tried is how often this leadership has tried to move. LastTry is how long ago
	// it last did.
	Tried   int
	LastTry time.Duration

	// Voters of the primary's site.
	Voters []LeaderCandidate
}

// LeaderCandidate is a voter that could lead.
type LeaderCandidate struct {
	Name string
	// ResponsiveFor is for how long it has been Member.Responsive without a gap.
	ResponsiveFor time.Duration
	// CaughtUp: see Member.CaughtUp.
	CaughtUp bool
	// Slow: its disk is too slow for a leader.
	Slow bool
}

// LeaderReason names why the leader moves or stays.
type LeaderReason string

const (
	LeaderInPlace          LeaderReason = "in_primary_site"
	LeaderPrimaryUnhealthy LeaderReason = "primary_not_healthy"
	LeaderBusy             LeaderReason = "switchover_or_drill"
	LeaderTooNew           LeaderReason = "leads_not_long_enough"
	LeaderTriedRecently    LeaderReason = "tried_recently"
	LeaderNoVoter          LeaderReason = "no_stable_voter"
	LeaderMoves            LeaderReason = "stable_voter" // it moves
)

// PlaceLeader says to which voter of the primary's site the leader moves, empty
// when it stays, and why. It is pure.
func PlaceLeader(v LeaderView) (to string, why LeaderReason) {
	switch {
	case v.LeaderSite == v.Primary:
		return "", LeaderInPlace
	case !v.Healthy:
		return "", LeaderPrimaryUnhealthy
	case v.Busy:
		return "", LeaderBusy
	case v.LeadingFor < doubled(leaderStableFor, v.Elected-1):
		return "", LeaderTooNew
	case v.Tried > 0 && v.LastTry < doubled(moveAgainAfter, v.Tried-1):
		return "", LeaderTriedRecently
	}
	for _, n := range v.Voters {
		if n.CaughtUp && !n.Slow && n.ResponsiveFor >= leaderStableFor {
			return n.Name, LeaderMoves
		}
	}
	return "", LeaderNoVoter
}

func doubled(d time.Duration, times int) time.Duration {
	return d << min(max(times, 0), maxDoublings)
}

// leaderHistory is what a coordinator remembers for PlaceLeader. Every node keeps
// it, so that the next leader knows what happened before it led.
type leaderHistory struct {
	epoch uint64
	// last is the leader that was seen last, empty for none.
	last string
	// elected are the newest few times at which another leader appeared away from
	// the primary's site.
	elected []time.Duration
	// responsive is since when each node has been so, by name.
	responsive map[string]time.Duration

	term    uint64 // of the leadership that tried
	tried   int
	lastTry time.Duration
}

// observe takes one look, on every node.
func (h *leaderHistory) observe(s *agreed.State, in Input, leader string) {
	if h.epoch != s.Primary.Epoch {
		// The leader so far was in the old primary's site, or is moved by follow.
		h.epoch, h.last, h.elected = s.Primary.Epoch, "", nil
	}
	h.elected = slices.DeleteFunc(h.elected, func(at time.Duration) bool { return in.Now-at > electionMemory })
	responsive := make(map[string]time.Duration, len(in.Members))
	for _, m := range in.Members {
		if m.Name == leader {
			if h.last != "" && h.last != leader && m.Site != s.Primary.Site {
				h.elected = append(h.elected, in.Now)
				h.elected = h.elected[max(0, len(h.elected)-maxDoublings-1):]
			}
			h.last = leader
		}
		if !m.Responsive || in.Leader.Paused > in.Timing.Tick {
			continue
		}
		responsive[m.Name] = in.Now
		if since, already := h.responsive[m.Name]; already {
			responsive[m.Name] = since
		}
	}
	h.responsive = responsive
}

// view is for the leader.
func (h *leaderHistory) view(s *agreed.State, in Input, l cluster.Leadership, healthy bool, wall time.Time) LeaderView {
	h.lead(l.Term)
	v := LeaderView{
		Healthy: healthy,
		Busy: s.Switchover != nil || slices.ContainsFunc(s.Drills, func(d agreed.DrillRecord) bool {
			return d.Running(wall)
		}),
		LeaderSite: in.Leader.Site, Primary: s.Primary.Site, LeadingFor: in.Now - l.FirstCommit,
		Elected: len(h.elected), Tried: h.tried, LastTry: in.Now - h.lastTry,
	}
	for _, m := range in.Members {
		if m.Site == s.Primary.Site && m.Voter {
			n := LeaderCandidate{Name: m.Name, CaughtUp: m.CaughtUp, Slow: m.SlowFor > 0}
			if since, responsive := h.responsive[m.Name]; responsive {
				n.ResponsiveFor = in.Now - since
			}
			v.Voters = append(v.Voters, n)
		}
	}
	return v
}

// lead sets the count of attempts back when the leadership is another one.
func (h *leaderHistory) lead(term uint64) {
	if h.term != term {
		h.term, h.tried = term, 0
	}
}

func (h *leaderHistory) try(term uint64, now time.Duration) {
	h.lead(term)
	h.tried++
	h.lastTry = now
}
