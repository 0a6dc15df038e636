package failover

import (
	"cmp"
	"slices"
	"time"
)

// View is all that Decide looks at. Durations are on the leader's Boottime clock.
type View struct {
	Quorum      bool // the leader holds a lease from its own ticks
	Quarantined bool
	Held        bool // an operator has paused automatic promotions

	LeadingFor    time.Duration // since the first commit of this leadership
	NewLeaderWait time.Duration
	Patience      time.Duration
	NoLease       time.Duration // a primary without a lease for this long is replaced, one with slow disks after twice as long

	Primary string
	Sites   []SiteView

	Switchover Progress
	Last       LastPromotion
	Dwell      time.Duration // least time between two automatic promotions
	Penalty    time.Duration // for this long a site that was replaced is the last choice
}

// Progress of a planned switchover.
type Progress string

// A switchover is absent, under way, or past its deadline and not yet off the agreed
// state.
const (
	NoSwitchover      Progress = ""
	SwitchoverRunning Progress = "running"
	SwitchoverExpired Progress = "expired"
)

// LastPromotion is the newest automatic one.
type LastPromotion struct {
	From         string // empty: there was none
	Ago          time.Duration
	Acknowledged bool
}

// ActionKind is what the coordinator is to do.
type ActionKind string

const (
	Stay             ActionKind = "stay"
	Promote          ActionKind = "promote"
	ExpireSwitchover ActionKind = "expire_switchover"
)

// Action is one decision. Site is the one to promote.
type Action struct {
	Kind ActionKind
	Site string
}

var stay = Action{Kind: Stay}

// Reason names why Decide gave an action. It is a metric label, in the log, and shown to operators.
type Reason string

const (
	Quarantined          Reason = "quarantined"
	NoQuorum             Reason = "no_quorum"
	SwitchoverOverdue    Reason = "switchover_expired"
	SwitchoverInProgress Reason = "switchover_in_progress"
	PrimaryHealthy       Reason = "primary_healthy"
	StillPatient         Reason = "still_patient"
	Unwitnessed          Reason = "unwitnessed"      // silent to the leader, and no third site can confirm it
	PrimaryUnleased      Reason = "primary_unleased" // heard, without a lease for less than NoLease
	PrimaryHeard         Reason = "primary_heard"    // silent to the leader, heard by others
	Paused               Reason = "paused"           // by an operator
	NewLeaderWait        Reason = "new_leader_wait"  // older leases may still run
	Dwelling             Reason = "dwell"            // the last automatic promotion is too recent
	NoCandidate          Reason = "no_candidate"     // no other site is heard, leased and in service
	PrimaryLost          Reason = "primary_lost"     // promote: silent for the patience
	PrimaryNoLease       Reason = "primary_no_lease" // promote: no lease for NoLease, even if it is heard
	PrimaryIdle          Reason = "primary_idle"     // promote: it is heard and gets leases, and has not acted for 3 Patience
	PrimarySlow          Reason = "primary_slow"     // promote: all its disks are slow for 2 NoLease, those of a candidate are not
	PrimaryRemoved       Reason = "primary_removed"  // promote: its site is no longer configured
)

// Decide says what to do about the primary and why. It is pure.
func Decide(v View) (Action, Reason) {
	switch {
	case v.Quarantined:
		return stay, Quarantined
	case !v.Quorum:
		return stay, NoQuorum
	case v.Switchover == SwitchoverExpired:
		// This comes first: until the switchover is cleared no site acts as primary.
		return Action{Kind: ExpireSwitchover}, SwitchoverOverdue
	}
	why, lost := v.primaryLost()
	switch {
	case lost || v.Switchover != NoSwitchover:
	case v.primaryIdle():
		why, lost = PrimaryIdle, true
	case v.primarySlow():
		why, lost = PrimarySlow, true
	}
	switch {
	case !lost && v.Switchover == SwitchoverRunning:
		return stay, SwitchoverInProgress
	case !lost:
		return stay, why
	case v.Held:
		return stay, Paused
	case v.LeadingFor < v.NewLeaderWait:
		return stay, NewLeaderWait
	case v.Last.From != "" && !v.Last.Acknowledged && v.Last.Ago < v.Dwell:
		return stay, Dwelling
	}
	best, ok := v.candidate()
	if !ok {
		return stay, NoCandidate
	}
	return Action{Kind: Promote, Site: best}, why
}

// primaryLost tells the state of the primary, and whether it must be replaced.
func (v View) primaryLost() (Reason, bool) {
	i := slices.IndexFunc(v.Sites, func(s SiteView) bool { return s.Name == v.Primary })
	if i < 0 {
		return PrimaryRemoved, true
	}
	p := v.Sites[i]
	switch {
	case !p.Heard && p.Silence >= v.Patience:
		return PrimaryLost, true
	case p.NoLeaseFor >= v.NoLease:
		return PrimaryNoLease, true
	case p.Heard && p.Leased && p.LeaderSilence >= v.Patience:
		return PrimaryHeard, false
	case p.Heard && p.Leased:
		return PrimaryHealthy, false
	case p.Heard:
		return PrimaryUnleased, false
	case !p.Witnessed && p.LeaderSilence >= v.Patience:
		return Unwitnessed, false
	}
	return StillPatient, false
}

// primaryIdle reports whether the primary's site is heard and gets leases, but has not
// acted for three times the patience: longer than a restart, after which a node may act at
// the earliest when old leases have ended. Its processes may end soon after each start, on
// a disk that is full, and each start ends the silence.
func (v View) primaryIdle() bool {
	i := slices.IndexFunc(v.Sites, func(s SiteView) bool { return s.Name == v.Primary })
	return i >= 0 && v.Sites[i].IdleFor >= 3*v.Patience
}

// primarySlow reports whether the primary's site acts, on disks that have been too slow
// for a minute, while another site could act that was steady for as long on a disk that is
// not. All that a primary does waits for its disk. It still holds a lease, and a backup
// may take a minute, so nothing is done in a hurry, or if no site is better.
func (v View) primarySlow() bool {
	i := slices.IndexFunc(v.Sites, func(s SiteView) bool { return s.Name == v.Primary })
	if i < 0 || v.Sites[i].SlowFor < 2*v.NoLease {
		return false
	}
	best, ok := v.candidate()
	return ok && slices.ContainsFunc(v.Sites, func(s SiteView) bool {
		return s.Name == best && s.SlowFor == 0 && s.StableFor >= 2*v.NoLease && s.UpstreamsHealthy > 0
	})
}

// candidate picks the site to promote among those that can act at once. First comes
// a site whose disks are not slow, then one that was not itself just replaced, then one with a healthy upstream, then
// one in the lost primary's city, then the freshest copy, then the better priority.
//
// A site that was just replaced is the last choice, and only when it has been steady
// for the dwell. Otherwise two flapping sites would take turns as primary.
func (v View) candidate() (string, bool) {
	city := ""
	for _, s := range v.Sites {
		if s.Name == v.Primary {
			city = s.City
		}
	}
	penalized := func(s SiteView) bool {
		return s.Name == v.Last.From && !v.Last.Acknowledged && v.Last.Ago < v.Penalty
	}
	var able []SiteView
	for _, s := range v.Sites {
		if s.Name == v.Primary || s.Ready == 0 || !s.Heard || !s.Leased || (penalized(s) && s.StableFor < v.Dwell) {
			continue
		}
		able = append(able, s)
	}
	if len(able) == 0 {
		return "", false
	}
	best := slices.MinFunc(able, func(a, b SiteView) int {
		return cmp.Or(boolFirst(a.SlowFor == 0, b.SlowFor == 0),
			boolFirst(!penalized(a), !penalized(b)),
			boolFirst(a.UpstreamsHealthy > 0, b.UpstreamsHealthy > 0),
			boolFirst(a.City == city, b.City == city),
			fresher(a.Behind, b.Behind),
			cmp.Compare(a.Priority, b.Priority), cmp.Compare(a.Name, b.Name))
	})
	return best.Name, true
}

// fresher orders copies: fewer missing records first, unknown last.
func fresher(a, b *int64) int {
	if a == nil || b == nil {
		return boolFirst(a != nil, b != nil)
	}
	return cmp.Compare(*a, *b)
}

// FailbackStable is how long a preferred site must be steady before the status says
// that failback to it is available. There is no automatic failback.
const FailbackStable = 5 * time.Minute

// FailbackAvailable names the steady site with a better priority than the primary's
// to which a planned switchover could return.
func FailbackAvailable(v View) (site string, ok bool) {
	at := slices.IndexFunc(v.Sites, func(s SiteView) bool { return s.Name == v.Primary })
	if at < 0 || !v.Quorum || v.Quarantined || v.Switchover != NoSwitchover {
		return "", false
	}
	best := v.Sites[at].Priority
	for _, s := range v.Sites {
		if s.Priority < best && s.Ready > 0 && s.Leased && s.UpstreamsHealthy > 0 && s.SlowFor == 0 && s.StableFor >= FailbackStable {
			site, ok, best = s.Name, true, s.Priority
		}
	}
	return site, ok
}
