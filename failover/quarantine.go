package failover

import (
	"fmt"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/cluster/agreed"
)

// QuarantineView is what a node that was elected leader knows after a restart.
type QuarantineView struct {
	// Founded: this process founded the cluster, so there is no other generation.
	Founded bool
	// Voters of the Raft configuration, this node among them.
	Voters []QuarantineVoter
	// MemberSites are the sites that have at least one agreed member. A site that no
	// node ever joined from can't know another generation.
	MemberSites []string
	// ComparedSites are those with a node whose generation was compared with this
	// node's since this process started, and was the same.
	ComparedSites []string
	// Released: an operator has ended the quarantine.
	Released bool
}

// QuarantineVoter is a voter as this node knows it.
type QuarantineVoter struct {
	Name, Site string
	// Reached: it has answered since this process started. This node reaches itself.
	Reached bool
	// Warm: it has held a lease since its own start.
	Warm bool
}

// QuarantineReason names why the cluster is quarantined or free.
type QuarantineReason string

const (
	QuarantineNoMajority QuarantineReason = "no_majority"     // too few voters answered
	QuarantineCold       QuarantineReason = "cold_majority"   // all voters that answered have restarted, and sites are missing
	FreeFounded          QuarantineReason = "founded_here"    // free
	FreeReleased         QuarantineReason = "released"        // free, by an operator
	FreeWarm             QuarantineReason = "warm_voter"      // free
	FreeCompared         QuarantineReason = "all_sites_agree" // free
)

// Quarantine says whether a majority is quarantined, why, and which sites it still has to
// hear from. In quarantine the role, ownership and configuration don't change;
// completions and jobs of durability node go on. It is pure.
//
// It protects against a majority that a recovery replaced while it was down: when it
// starts again, it would elect a leader in its old generation. A voter that was up all
// the time would know of the recovery, and so would every site that the recovery
// reached. Quarantine must be asked before the first tick of a leadership: a tick makes
// leases, and a node with a lease counts as warm.
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
		// The preface of the connection has compared the generations.
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
