package operate

import (
	"fmt"
	"time"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/node/admin"
	"github.com/dsnode/dsnode/node/datakeys"
)

// reasons says, one sentence each, why the cluster is not healthy.
func (v view) reasons(s admin.Status) []string {
	var out []string
	add := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	if v.removed != nil {
		add("node %s stops, and what it shows of the others is old: %s. To use its data again, run dsnode node admit %s at a member and start it; to start anew, empty its data directory first",
			v.name, v.removed, v.name)
	}
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
	out = append(out, v.staleKeys()...)
	if v.keyProblem != "" {
		add("node %s: %s", v.name, v.keyProblem)
	}
	out = append(out, datakeys.Unconfirmed(v.state)...)
	for _, problem := range v.jobProblems {
		add("node %s: %s", v.name, problem)
	}
	out = append(out, v.peerReasons()...)
	out = append(out, linkReasons(v.links)...)
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
	if v.starting != "" && v.raft.Quorum {
		add("node %s has just started: %s", v.name, v.starting)
	}
	for _, name := range sortedNames(v.peers) {
		if p := v.peers[name]; p.Starting && p.HeardWithin(v.patience) {
			add("node %s has just started and has not caught up", name)
		}
	}
	for _, n := range s.Nodes {
		if n.DiskSlowSince != nil && n.State == admin.NodeAlive {
			add("%s", v.slowDisk(n))
		}
	}
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

// slowDisk says what a node's slow disk does to the cluster.
func (v view) slowDisk(n admin.NodeStatus) string {
	takes := ""
	if n.DiskWriteSeconds != nil {
		takes = fmt.Sprintf(", a write of the raft log takes %.0f ms", *n.DiskWriteSeconds*1000)
	}
	result := "another node leads meanwhile"
	if v.raft.Leader == n.Name {
		result = "it leads, and no voter is clearly faster"
	}
	return fmt.Sprintf("node %s: its disk has been slow since %s%s, a raft leader needs less than %d ms (%s): check the disk and what else uses it",
		n.Name, n.DiskSlowSince.Format(time.RFC3339), takes, v.slowWrite.Milliseconds(), result)
}

// behind says that this node's copy of the agreed state, or that of a peer, may be old.
// With a quorum the leader commits an entry several times a second. A node that has just
// started lacks it, and so does a node that gets its lease through a relay but no entries
// from the leader.
func (v view) behind() []string {
	switch {
	case v.raft.Epoch > v.state.Primary.Epoch:
		return []string{fmt.Sprintf("node %s knows the primary of epoch %d, and epoch %d has begun", v.name, v.state.Primary.Epoch, v.raft.Epoch)}
	case v.raft.TickAgo >= v.patience:
		return []string{fmt.Sprintf("node %s has received nothing from the raft leader for %s: its copy of the agreed state may be old",
			v.name, v.raft.TickAgo.Round(100*time.Millisecond))}
	}
	var out []string
	for _, name := range sortedNames(v.peers) {
		if p := v.peers[name]; p.HeardWithin(v.patience) && p.Stuck >= v.patience {
			out = append(out, fmt.Sprintf("node %s answers, but has applied no raft entry for %s: check the network from the leader %s to it, its disk and its log",
				name, p.Stuck.Round(100*time.Millisecond), v.raft.Leader))
		}
	}
	return out
}

// staleKeys says that this node refuses all keys of clients.
func (v view) staleKeys() []string {
	if v.state.Parsed == nil || v.state.NoKeyYet() {
		return nil
	}
	age, ago := time.Duration(0), "since before its start"
	if v.agreedAge != nil {
		age = *v.agreedAge
		ago = "for " + age.Round(time.Second).String()
	}
	if !v.state.Parsed.Access.Stale(age, v.agreedAge != nil) {
		return nil
	}
	return []string{fmt.Sprintf("node %s refuses the API keys of clients: it has heard nothing from the cluster's majority %s, and access.stale_for allows %s", v.name, ago, v.state.Parsed.Access.StaleFor)}
}

// largeState warns before new API keys are refused.
func (v view) largeState() []string {
	if v.stateBytes < agreed.MaxBytesForKeys*3/4 {
		return nil
	}
	return []string{fmt.Sprintf("the agreed state has %d KiB, and from %d KiB on no more API keys can be created: revoke those that are no longer needed (dsnode apikey list), or use shorter notes and lists of models",
		v.stateBytes>>10, agreed.MaxBytesForKeys>>10)}
}

// waitingNodes names the nodes that wait for an operator's word.
func waitingNodes(s *agreed.State) []string {
	var out []string
	for _, n := range s.Waiting {
		if n.AdmittedAt.IsZero() {
			out = append(out, fmt.Sprintf("node %s of site %s at %s has asked to join since %s: dsnode node admit %s lets it",
				n.Name, n.Site, n.RPC, n.At.UTC().Format(time.RFC3339), n.Name))
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
