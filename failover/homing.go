package failover

import (
	"slices"
	"time"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/cluster/agreed"
)

// Homing: an election may leave the raft leader in another site than the
// primary's. Nothing is wrong then, but each lease of the primary comes over a
// link between sites, so in bad weather the role rests for moments that it need
// not. So the leader goes home when that is safe: once, in calm, and less
// willingly each time that it was driven out again.

const (
	// homingCalm is how long a voter must have answered without a gap, and this
	// leadership have lasted, before the leader goes to it.
	homingCalm = 30 * time.Second
	// homingAgain is the least time between two attempts of a leader. It doubles
	// with each that failed.
	homingAgain = 3 * time.Minute
	// homingMemory is for how long it counts that a leader was elected away from
	// the primary's site; each but the first doubles homingCalm for the leadership.
	homingMemory = time.Hour
	// homingDoublings bounds both.
	homingDoublings = 5
)

// HomingView is all that GoHome looks at.
type HomingView struct {
	// Healthy: Decide has nothing to say but that the primary is healthy.
	Healthy bool
	// Busy: a switchover or a drill is under way.
	Busy bool

	LeaderSite, Primary string
	LeadingFor          time.Duration
	// Elected is how often another leader was elected, away from the primary's
	// site, within homingMemory and since the primary changed: once for this one.
	Elected int
	// Tried is how often this leadership has tried already, LastTry how long ago
	// it did so last.
	Tried   int
	LastTry time.Duration

	// Voters of the primary's site.
	Voters []HomingVoter
}

// HomingVoter is a voter that could lead.
type HomingVoter struct {
	Name string
	// CalmFor is for how long it has answered every ping, not been stopped, held
	// its lease and not been draining.
	CalmFor time.Duration
	// CaughtUp: it has applied what is committed, but for what is on its way.
	CaughtUp bool
}

// HomingReason names why the leader goes or stays.
type HomingReason string

// The reasons of GoHome.
const (
	HomingAtHome    HomingReason = "at_home"
	HomingUnwell    HomingReason = "primary_not_healthy"
	HomingBusy      HomingReason = "switchover_or_drill"
	HomingWait      HomingReason = "leads_not_long_enough"
	HomingTried     HomingReason = "tried_a_moment_ago"
	HomingNoVoter   HomingReason = "no_calm_voter"
	HomingCalmVoter HomingReason = "calm_voter" // go
)

// GoHome says to which voter of the primary's site the leader goes, empty when
// it stays, and why. It is pure.
func GoHome(v HomingView) (to string, why HomingReason) {
	switch {
	case v.LeaderSite == v.Primary:
		return "", HomingAtHome
	case !v.Healthy:
		return "", HomingUnwell
	case v.Busy:
		return "", HomingBusy
	case v.LeadingFor < doubled(homingCalm, v.Elected-1):
		return "", HomingWait
	case v.Tried > 0 && v.LastTry < doubled(homingAgain, v.Tried-1):
		return "", HomingTried
	}
	for _, n := range v.Voters {
		if n.CaughtUp && n.CalmFor >= homingCalm {
			return n.Name, HomingCalmVoter
		}
	}
	return "", HomingNoVoter
}

func doubled(d time.Duration, times int) time.Duration {
	return d << min(max(times, 0), homingDoublings)
}

// homing is what a coordinator remembers of it, on every node: who leads next
// has seen how it went before.
type homing struct {
	epoch uint64
	// last is the leader that was seen last, empty for none.
	last string
	// elected are the times at which another came, away from the primary's site;
	// the newest few.
	elected []time.Duration
	// calm is since when each node has been so, by name.
	calm map[string]time.Duration

	term    uint64 // of the leadership that tried
	tried   int
	lastTry time.Duration
}

// observe takes one look, on every node.
func (h *homing) observe(s *agreed.State, in Input, leader string) {
	if h.epoch != s.Primary.Epoch {
		// Who led so far was where he belonged, or is moved by follow.
		h.epoch, h.last, h.elected = s.Primary.Epoch, "", nil
	}
	h.elected = slices.DeleteFunc(h.elected, func(at time.Duration) bool { return in.Now-at > homingMemory })
	calm := make(map[string]time.Duration, len(in.Members))
	for _, m := range in.Members {
		if m.Name == leader {
			if h.last != "" && h.last != leader && m.Site != s.Primary.Site {
				h.elected = append(h.elected, in.Now)
				h.elected = h.elected[max(0, len(h.elected)-homingDoublings-1):]
			}
			h.last = leader
		}
		if !m.Calm || in.Leader.Paused > in.Timing.Tick {
			continue
		}
		calm[m.Name] = in.Now
		if since, already := h.calm[m.Name]; already {
			calm[m.Name] = since
		}
	}
	h.calm = calm
}

// view is for the leader.
func (h *homing) view(s *agreed.State, in Input, l cluster.Leadership, healthy bool, wall time.Time) HomingView {
	h.lead(l.Term)
	v := HomingView{
		Healthy: healthy,
		Busy: s.Switchover != nil || slices.ContainsFunc(s.Drills, func(d agreed.DrillRecord) bool {
			return d.Running(wall)
		}),
		LeaderSite: in.Leader.Site, Primary: s.Primary.Site, LeadingFor: in.Now - l.FirstCommit,
		Elected: len(h.elected), Tried: h.tried, LastTry: in.Now - h.lastTry,
	}
	for _, m := range in.Members {
		if m.Site == s.Primary.Site && m.Voter {
			n := HomingVoter{Name: m.Name, CaughtUp: m.CaughtUp}
			if since, calm := h.calm[m.Name]; calm {
				n.CalmFor = in.Now - since
			}
			v.Voters = append(v.Voters, n)
		}
	}
	return v
}

// lead begins to count anew with another leadership.
func (h *homing) lead(term uint64) {
	if h.term != term {
		h.term, h.tried = term, 0
	}
}

func (h *homing) try(term uint64, now time.Duration) {
	h.lead(term)
	h.tried++
	h.lastTry = now
}
