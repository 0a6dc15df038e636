package admin

import (
	"fmt"
	"time"
)

// Judge says in words what is not as it should be, worst first, and nothing
// when the cluster is healthy: it has a quorum, every configured site is up
// with a node and an upstream that serve, nothing is degraded, and replication
// is within the site's target. It reads s alone, its clock included; Reasons
// and Healthy are what it is there to fill. What is unknown is no complaint by
// itself, except where health depends on it: a site of which nothing is known
// is not healthy.
func Judge(s Status) []string {
	reasons := []string{}
	if reason := judgeQuorum(s); reason != "" {
		reasons = append(reasons, reason)
	}
	if s.Primary == nil {
		reasons = append(reasons, "no site is known to be the primary")
	}
	for _, site := range s.Sites {
		reasons = append(reasons, judgeSite(site)...)
	}
	for _, node := range s.Nodes {
		switch node.State {
		case NodeSuspect, NodeDead:
			reasons = append(reasons, fmt.Sprintf("node %s is %s%s", node.Name, node.State, heard(node.LastHeardSeconds)))
		case NodeAlive, NodeLeft:
		}
	}
	return reasons
}

func judgeQuorum(s Status) string {
	switch since := s.Raft.QuorumSince; {
	case s.Raft.Quorum:
		return ""
	case since == nil:
		return "no quorum: the configuration can't change and no site can take over"
	default:
		return fmt.Sprintf("no quorum since %s: the configuration can't change and no site can take over",
			since.UTC().Format(time.RFC3339))
	}
}

func judgeSite(site SiteStatus) []string {
	var reasons []string
	say := func(format string, args ...any) {
		reasons = append(reasons, "site "+site.Name+" "+fmt.Sprintf(format, args...))
	}
	switch site.State {
	case SiteDown, SiteIsolated:
		// What else is wrong there follows from this.
		say("is %s%s", site.State, heard(site.LastHeardSeconds))
		return reasons
	case SiteUnknown:
		say("was not heard of")
		return reasons
	case SiteHealthy, SiteDegraded:
	}
	switch {
	case site.NodesTotal != nil && *site.NodesTotal == 0:
		say("has no node yet")
	case site.NodesAlive != nil && *site.NodesAlive == 0:
		say("has no node alive")
	}
	switch {
	case site.UpstreamsTotal != nil && *site.UpstreamsTotal == 0:
		say("has no upstream configured")
	case site.UpstreamsHealthy != nil && site.UpstreamsTotal != nil && *site.UpstreamsHealthy < *site.UpstreamsTotal:
		say("has %d of %d upstreams healthy", *site.UpstreamsHealthy, *site.UpstreamsTotal)
	}
	if site.Degradation != nil && *site.Degradation != "none" {
		say("is degraded: %s", *site.Degradation)
	}
	if r := site.Replication; r != nil && r.LagSeconds != nil && r.RPOTargetSeconds != nil && *r.LagSeconds > *r.RPOTargetSeconds {
		say("lags %s behind the others, its target is %s", seconds(*r.LagSeconds), seconds(*r.RPOTargetSeconds))
	}
	if len(reasons) == 0 && site.State == SiteDegraded {
		say("is degraded")
	}
	return reasons
}

// heard is the age of the last sign of life, as an addition to a sentence.
func heard(age *float64) string {
	if age == nil {
		return ""
	}
	return ", last heard " + seconds(*age) + " ago"
}

func seconds(s float64) string {
	d := time.Duration(s * float64(time.Second))
	if d < 10*time.Second {
		return d.Round(100 * time.Millisecond).String()
	}
	return d.Round(time.Second).String()
}
