package failover

import (
	"fmt"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/cluster/agreed"
)

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

// Restarted is what ColdStart needs of the cluster; *cluster.Cluster is one.
type Restarted interface {
	State() *agreed.State
	Peers() map[string]cluster.PeerView
	Raft() cluster.RaftView
	Founded() bool
	Cold() bool
}

// ColdStart tells whether this node, leading Raft after a restart, is quarantined.
type ColdStart struct {
	name, site string
	cluster    Restarted
	released   atomic.Bool
}

// NewColdStart makes the ColdStart of a node.
func NewColdStart(name, site string, c Restarted) *ColdStart {
	return &ColdStart{name: name, site: site, cluster: c}
}

// Release ends the quarantine: an operator knows that the cluster was not recovered
// elsewhere.
func (c *ColdStart) Release() { c.released.Store(true) }

// Quarantined is cluster.Options.Quarantined.
func (c *ColdStart) Quarantined() (why string, quarantined bool) {
	held, reason, missing := Quarantine(c.view())
	why = string(reason)
	switch {
	case !held:
		return why, false
	case reason == QuarantineNoMajority:
		why += ": too few voters answer"
	default:
		why += ": every voter that answers has restarted"
	}
	if len(missing) > 0 {
		why += fmt.Sprintf("; no node of %s has told yet whether the cluster was recovered meanwhile", strings.Join(missing, ", "))
	}
	return why, true
}

// view gathers what Quarantine looks at.
func (c *ColdStart) view() QuarantineView {
	v := QuarantineView{Founded: c.cluster.Founded(), Released: c.released.Load()}
	voter := map[string]bool{}
	for _, server := range c.cluster.Raft().Servers {
		voter[server.Name] = server.Voter
	}
	for _, m := range c.cluster.State().Nodes {
		if !slices.Contains(v.MemberSites, m.Site) {
			v.MemberSites = append(v.MemberSites, m.Site)
		}
	}
	if voter[c.name] {
		v.Voters = append(v.Voters, QuarantineVoter{Name: c.name, Site: c.site, Reached: true, Warm: !c.cluster.Cold()})
	}
	for name, p := range c.cluster.Peers() {
		if voter[name] {
			v.Voters = append(v.Voters, QuarantineVoter{Name: name, Site: p.Site, Reached: p.Heard, Warm: p.Heard && !p.Cold})
		}
		// An answered ping went over a connection whose preface compared the
		// generations.
		if p.Heard {
			v.ComparedSites = append(v.ComparedSites, p.Site)
		}
	}
	return v
}
