package node

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/dsnode/dsnode/failover"
)

// quarantined asks whether this leader must hold still; see
// failover.Quarantine.
func (n *Node) quarantined() (string, bool) {
	s := n.cluster.State()
	v := failover.QuarantineView{Founded: n.cluster.Founded(), Released: n.released.Load()}
	voter := map[string]bool{}
	for _, server := range n.cluster.Raft().Servers {
		voter[server.Name] = server.Voter
	}
	for _, m := range s.Nodes {
		if !slices.Contains(v.MemberSites, m.Site) {
			v.MemberSites = append(v.MemberSites, m.Site)
		}
	}
	if voter[n.cfg.Name] {
		v.Voters = append(v.Voters, failover.QuarantineVoter{Name: n.cfg.Name, Site: n.cfg.Site, Reached: true, Warm: !n.cluster.Cold()})
	}
	for name, p := range n.cluster.Peers() {
		if voter[name] {
			v.Voters = append(v.Voters, failover.QuarantineVoter{Name: name, Site: p.Site, Reached: p.Heard, Warm: p.Heard && !p.Cold})
		}
		// An answered ping went over a connection whose preface compared the
		// generations.
		if p.Heard {
			v.ComparedSites = append(v.ComparedSites, p.Site)
		}
	}
	held, why, missing := failover.Quarantine(v)
	if !held {
		return string(why), false
	}
	words := fmt.Sprintf("%s: every voter that answers has restarted", why)
	if len(missing) > 0 {
		words += fmt.Sprintf(", and nobody of %s was asked whether the cluster was recovered meanwhile", strings.Join(missing, ", "))
	}
	return words, true
}

// ReleaseQuarantine is an operator's word that no recovery has happened
// elsewhere. It counts on the node that leads raft; others refuse.
func (n *Node) ReleaseQuarantine(context.Context) error {
	if n.cluster.Quarantined() == "" {
		return n.notHere()
	}
	n.released.Store(true)
	n.log.Warn("quarantine released by an operator")
	return nil
}
