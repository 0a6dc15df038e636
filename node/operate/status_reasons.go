package operate

import (
	"fmt"
	"time"

	"github.com/dsnode/dsnode/node/admin"
	"github.com/dsnode/dsnode/node/datakeys"
)

// reasons says, one sentence each, why the cluster is not healthy.
func (v view) reasons(s admin.Status) []string {
	var out []string
	add := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	if v.raft.Quorum {
		out = append(out, v.behind()...)
	} else {
		since := ""
		if s.Raft.QuorumSince != nil {
			since = " since " + s.Raft.QuorumSince.Format(time.RFC3339)
		}
		add("no quorum%s: the configuration and the primary can't change, requests are still answered", since)
	}
	if v.leftBehind != "" {
		add("%s", v.leftBehind)
	}
	if v.keyProblem != "" {
		add("node %s: %s", v.name, v.keyProblem)
	}
	out = append(out, datakeys.Unconfirmed(v.state)...)
	for _, problem := range v.jobProblems {
		add("node %s: %s", v.name, problem)
	}
	missing := v.jobsMissing()
	for _, name := range sortedNames(missing) {
		add("node %s: %s", name, missing[name])
	}
	if v.quarantine != "" {
		add("quarantined: %s", v.quarantine)
	}
	if v.state.Parsed == nil {
		add("this node does not know the configuration yet")
	}
	for _, site := range s.Sites {
		out = append(out, v.siteReasons(site, s.Nodes)...)
	}
	out = append(out, v.fewVoters(s)...)
	if v.health.Draining {
		add("node %s is draining", v.name)
	}
	if v.state.Parsed != nil {
		for _, u := range sortedNames(v.state.Drained) {
			if def, known := v.state.Parsed.Upstreams[u]; known {
				add("upstream %s of site %s is drained", u, def.Site)
			}
		}
	}
	for _, n := range s.Nodes {
		if n.Name != v.name && n.Draining != nil && *n.Draining && n.State == admin.NodeAlive {
			add("node %s is draining", n.Name)
		}
	}
	return out
}

func (v view) siteReasons(site admin.SiteStatus, nodes []admin.NodeStatus) []string {
	var out []string
	add := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	switch {
	case *site.NodesTotal == 0:
		add("site %s: no node has joined yet", site.Name)
	case site.State == admin.SiteUnknown:
		add("site %s: not heard yet", site.Name)
	case site.State == admin.SiteDown:
		add("site %s is down: %s", site.Name, lastHeard(site.LastHeardSeconds))
	case site.State == admin.SiteIsolated:
		add("site %s is isolated", site.Name)
	case site.State == admin.SiteDegraded:
		for _, n := range nodes {
			if n.Site == site.Name && n.State != admin.NodeAlive {
				add("node %s is %s: %s", n.Name, n.State, lastHeard(n.LastHeardSeconds))
			}
		}
		if *site.UpstreamsHealthy < *site.UpstreamsTotal {
			add("site %s: %d of %d upstreams are healthy", site.Name, *site.UpstreamsHealthy, *site.UpstreamsTotal)
		}
	}
	if r := site.Replication; r.LagSeconds != nil && *r.LagSeconds > *r.RPOTargetSeconds {
		add("site %s: its copy of the other sites' jobs is %.0f s old, the target is %.0f s", site.Name, *r.LagSeconds, *r.RPOTargetSeconds)
	}
	return out
}

// fewVoters says that the loss of one node can still cost the quorum although three sites
// are up. A new cluster is in this state for some seconds.
func (v view) fewVoters(s admin.Status) []string {
	up := 0
	for _, site := range s.Sites {
		if site.NodesAlive != nil && *site.NodesAlive > 0 {
			up++
		}
	}
	if !v.raft.Quorum || up < 3 || s.Raft.Voters == nil || *s.Raft.Voters >= 3 {
		return nil
	}
	return []string{fmt.Sprintf("%d of 3 voters are placed: the loss of one node can still cost the quorum", *s.Raft.Voters)}
}

// behind says that this node's copy of the agreed state, or that of a peer, may be old.
// With a quorum the leader commits an entry several times a second. A node that has just
// started lacks it, and so does a node that gets its lease through a relay but no entries
// from the leader.
func (v view) behind() []string {
	switch {
	case v.raft.Epoch > v.state.Primary.Epoch:
		return []string{fmt.Sprintf("node %s knows the primary of epoch %d, and epoch %d has begun", v.name, v.state.Primary.Epoch, v.raft.Epoch)}
	case !v.raft.Ticked:
		return []string{fmt.Sprintf("node %s has received nothing from the raft leader since its start: its copy of the agreed state may be old", v.name)}
	case v.raft.TickAgo >= v.patience:
		return []string{fmt.Sprintf("node %s has received nothing from the raft leader for %s: its copy of the agreed state may be old",
			v.name, v.raft.TickAgo.Round(100*time.Millisecond))}
	}
	var out []string
	for _, name := range sortedNames(v.peers) {
		if p := v.peers[name]; p.HeardWithin(v.patience) && p.Stuck >= v.patience {
			out = append(out, fmt.Sprintf("node %s answers, but has applied no raft entry for %s: check its disk and its log", name, p.Stuck.Round(100*time.Millisecond)))
		}
	}
	return out
}

func lastHeard(seconds *float64) string {
	if seconds == nil {
		return "never heard"
	}
	return fmt.Sprintf("last heard %s ago", time.Duration(*seconds*float64(time.Second)).Round(100*time.Millisecond))
}
