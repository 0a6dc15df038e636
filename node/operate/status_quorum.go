package operate

import (
	"fmt"
	"strings"

	"github.com/dsnode/dsnode/node/admin"
)

// fewVoters says that one node's loss can still stop every change although enough nodes are
// up for three voters. A new cluster is in this state for some seconds.
func (v view) fewVoters(s admin.Status) []string {
	up := 0
	for _, n := range s.Nodes {
		if n.State == admin.NodeAlive {
			up++
		}
	}
	if !v.raft.Quorum || up < 3 || s.Raft.Voters == nil || *s.Raft.Voters >= 3 {
		return nil
	}
	return []string{fmt.Sprintf("%d of 3 voters are placed: the loss of one node can still cost the quorum", *s.Raft.Voters)}
}

// voter is a voter of Raft as this node sees it.
type voter struct {
	name, site, city string
	alive            bool
}

// voters are in the order of raft's configuration. A voter that is no member any more is
// not alive.
func (v view) voters(nodes []admin.NodeStatus) []voter {
	var list []voter
	for _, server := range v.raft.Servers {
		if !server.Voter {
			continue
		}
		n := voter{name: server.Name}
		for _, node := range nodes {
			if node.Name == server.Name {
				n.site, n.alive = node.Site, node.State == admin.NodeAlive
			}
		}
		if v.state.Parsed != nil {
			n.city = v.state.Parsed.Sites[n.site].City
		}
		list = append(list, n)
	}
	return list
}

// noQuorumThen is what the loss of the quorum means. Requests are still answered then.
const noQuorumThen = "no change and no failover is possible"

// quorumWarnings says which single loss would cost the quorum: that of a node, of one of
// several sites, or of one of several cities. A loss that contains another one is not
// listed. Without a quorum, the reasons say so instead.
func (v view) quorumWarnings(nodes []admin.NodeStatus) []string {
	voters := v.voters(nodes)
	alive := map[string]bool{}
	sites, cities := map[string][]string{}, map[string][]string{} // living voters
	siteCity := map[string]string{}
	for _, n := range voters {
		if n.alive {
			alive[n.name] = true
			sites[n.site] = append(sites[n.site], n.name)
			cities[n.city] = append(cities[n.city], n.name)
			siteCity[n.site] = n.city
		}
	}
	spare := len(alive) - (len(voters)/2 + 1) // how many more may be lost
	if !v.raft.Quorum || v.state.Parsed == nil || len(voters) == 0 || spare < 0 {
		return nil
	}
	if spare == 0 {
		return []string{onlyVoters(sortedNames(alive), len(voters), len(v.state.Nodes))}
	}
	var out []string
	said := map[string]bool{} // cities with a site that is listed
	configured := map[string]bool{}
	for _, site := range v.state.Parsed.Sites {
		configured[site.City] = true
	}
	for _, site := range sortedNames(sites) {
		if lost := len(sites[site]); lost > spare && len(v.state.Parsed.Sites) > 1 {
			said[siteCity[site]] = true
			hint := ""
			if len(v.state.Parsed.Sites) == 2 {
				hint = "; nodes in a third site would prevent that"
			}
			out = append(out, fmt.Sprintf("%d of %d voters are in site %s: while it is lost, %s%s", lost, len(voters), site, noQuorumThen, hint))
		}
	}
	for _, city := range sortedNames(cities) {
		if lost := len(cities[city]); lost > spare && len(configured) > 1 && !said[city] {
			hint := ""
			if len(configured) == 2 {
				hint = "; nodes in a third city would prevent that"
			}
			out = append(out, fmt.Sprintf("%d of %d voters are in the city %s: while it is lost, %s%s", lost, len(voters), city, noQuorumThen, hint))
		}
	}
	return out
}

// onlyVoters is for voters all of which are needed.
func onlyVoters(names []string, of, members int) string {
	switch {
	case members == 1:
		return fmt.Sprintf("the cluster has one node, %s: while it is down, nothing is answered, and without its disk everything is lost", names[0])
	case of == 1 && members < 3:
		return fmt.Sprintf("%s is the only voter: while it is lost, %s; with three nodes there are three voters, and one may be lost", names[0], noQuorumThen)
	case of == 1:
		return fmt.Sprintf("%s is the only voter: while it is lost, %s", names[0], noQuorumThen)
	}
	return fmt.Sprintf("%d of %d voters answer, and all of them are needed (%s): if one is lost, %s", len(names), of, strings.Join(names, ", "), noQuorumThen)
}
