package failover

import "slices"

// QuarantineView is what a node that would lead knows after a restart.
type QuarantineView struct {
	// Founded: this process founded the cluster; there is nothing older.
	Founded bool
	// Voters of the Raft configuration, this node among them.
	Voters []QuarantineVoter
	// MemberSites are the configured sites that have at least one agreed
	// member. A site that nobody ever joined from can't know another generation.
	MemberSites []string
	// ComparedSites are those with a node whose generation was compared with
	// ours since this process started, and was found the same.
	ComparedSites []string
	// Released: an operator has said that the cluster may go on.
	Released bool
}

// QuarantineVoter is a voter as this node knows it.
type QuarantineVoter struct {
	Name, Site string
	// Reached: it answered since this process started. This node reaches itself.
	Reached bool
	// Warm: it has held a lease since its own start.
	Warm bool
}

// QuarantineReason names why a cluster is quarantined, or isn't.
type QuarantineReason string

// The reasons of Quarantine.
const (
	QuarantineNoMajority QuarantineReason = "no_majority"     // too few voters answered to know
	QuarantineCold       QuarantineReason = "cold_majority"   // all who answered have restarted; sites are missing
	FreeFounded          QuarantineReason = "founded_here"    // free
	FreeReleased         QuarantineReason = "released"        // free, by an operator
	FreeWarm             QuarantineReason = "warm_voter"      // free
	FreeCompared         QuarantineReason = "all_sites_agree" // free
)

// Quarantine says whether a majority must hold still (no role, ownership or
// configuration change; completions and jobs of durability node go on), why,
// and which sites it has to hear from to be free.
//
// The danger is a majority that was replaced by a recovery while it was down:
// when it comes back together it would elect a leader in its old generation.
// One voter that was up all the time would know, and so would any site that
// the recovery reached. It must be asked before the first tick of a
// leadership: a tick makes leases, and a lease makes everybody warm.
func Quarantine(v QuarantineView) (quarantined bool, why QuarantineReason, missing []string) {
	switch {
	case v.Founded:
		return false, FreeFounded, nil
	case v.Released:
		return false, FreeReleased, nil
	}
	reached, warm := 0, false
	compared := slices.Clone(v.ComparedSites)
	for _, n := range v.Voters {
		if !n.Reached {
			continue
		}
		reached++
		warm = warm || n.Warm
		// The preface of the connection has compared generations.
		compared = append(compared, n.Site)
	}
	for _, site := range v.MemberSites {
		if !slices.Contains(compared, site) {
			missing = append(missing, site)
		}
	}
	slices.Sort(missing)
	missing = slices.Compact(missing)
	switch {
	case reached < quorumOf(len(v.Voters)):
		return true, QuarantineNoMajority, missing
	case warm:
		return false, FreeWarm, nil
	case len(missing) == 0:
		return false, FreeCompared, nil
	}
	return true, QuarantineCold, missing
}
