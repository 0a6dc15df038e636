package operate

import "github.com/dsnode/dsnode/node/admin"

func (v view) siteStatus(name string, nodes []admin.NodeStatus) admin.SiteStatus {
	cfg := v.state.Parsed
	site := cfg.Sites[name]
	s := admin.SiteStatus{
		Name: name, City: site.City, Role: admin.Role(cfg.Role(name, v.state.Primary.Site)),
		Replication: &admin.Replication{
			RPOTargetSeconds: new(site.RPOTarget.D().Seconds()), RTOTargetSeconds: new(site.RTOTarget.D().Seconds()),
		},
	}
	if c, known := v.copies[name]; known {
		s.Replication.RecordsBehind, s.Replication.LagSeconds = c.RecordsBehind, c.LagSeconds
	}
	alive, total, upstreams := 0, 0, 0
	for u, def := range cfg.Upstreams {
		if _, drained := v.state.Drained[u]; def.Site == name && !drained {
			upstreams++
		}
	}
	var heard *float64
	for _, n := range nodes {
		if n.Site != name {
			continue
		}
		total++
		if n.State == admin.NodeAlive {
			alive++
		}
		if n.LastHeardSeconds != nil && (heard == nil || *n.LastHeardSeconds < *heard) {
			heard = n.LastHeardSeconds
		}
	}
	s.NodesAlive, s.NodesTotal, s.UpstreamsTotal, s.LastHeardSeconds = &alive, &total, &upstreams, heard
	if alive > 0 {
		s.UpstreamsHealthy, s.Degradation = new(v.upstreamsHealthy(name)), new("none")
	}
	s.State = v.siteState(s)
	if s.State == admin.SiteHealthy && v.impaired(name) {
		s.State = admin.SiteDegraded
	}
	return s
}

// impaired reports whether a node of a site can't do its part, or the site's traffic with
// most other sites does not go through.
func (v view) impaired(site string) bool {
	for name := range v.troubled() {
		if v.state.Nodes[name].Site == site {
			return true
		}
	}
	return v.cutOffSites()[site]
}

// upstreamsHealthy is the highest count that a living node of the site reports.
func (v view) upstreamsHealthy(site string) int {
	if site == v.site {
		return v.health.UpstreamsHealthy
	}
	healthy := 0
	for _, p := range v.peers {
		if p.Site == site && p.HeardWithin(v.patience) {
			healthy = max(healthy, p.UpstreamsHealthy)
		}
	}
	return healthy
}

func (v view) siteState(s admin.SiteStatus) admin.SiteState {
	switch {
	case *s.NodesTotal == 0:
		return admin.SiteUnknown
	case *s.NodesAlive == 0 && v.othersHear(s.Name):
		return admin.SiteIsolated
	case *s.NodesAlive == 0 && s.LastHeardSeconds == nil && v.now.Sub(v.started) < 2*v.patience:
		return admin.SiteUnknown
	case *s.NodesAlive == 0:
		return admin.SiteDown
	case s.Name == v.site && !v.raft.Quorum && v.hearsNoOtherSite():
		return admin.SiteIsolated // with a quorum, it is the other sites that are lost
	case v.lacksJobs(s.Name), *s.NodesAlive < *s.NodesTotal, *s.UpstreamsTotal > 0 && *s.UpstreamsHealthy < *s.UpstreamsTotal:
		return admin.SiteDegraded
	}
	return admin.SiteHealthy
}

// lacksJobs reports whether a living node of a site may lack jobs that other nodes have.
func (v view) lacksJobs(site string) bool {
	for name := range v.jobsMissing() {
		if v.state.Nodes[name].Site == site {
			return true
		}
	}
	return false
}

// othersHear reports whether a living peer outside a site hears a node of that site.
func (v view) othersHear(site string) bool {
	for _, p := range v.peers {
		if !p.HeardWithin(v.patience) || p.Site == site {
			continue
		}
		for name := range p.HeardBy {
			if v.state.Nodes[name].Site == site && p.HearsWithin(v.patience, name) {
				return true
			}
		}
	}
	return false
}

// hearsNoOtherSite reports whether there are nodes of other sites, and this node hears
// none of them.
func (v view) hearsNoOtherSite() bool {
	others := false
	for _, p := range v.peers {
		if p.Site == v.site {
			continue
		}
		others = true
		if p.HeardWithin(v.patience) {
			return false
		}
	}
	return others
}
