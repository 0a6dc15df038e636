package node

import (
	"fmt"
	"maps"
	"os"
	"slices"
	"time"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/gossip"
	"github.com/dsnode/dsnode/node/admin"
	"github.com/dsnode/dsnode/node/datakeys"
	"github.com/dsnode/dsnode/replication"
)

// sight is all that a status is made of, gathered at one moment.
type sight struct {
	name, site, version string
	now                 time.Time
	patience            time.Duration
	started             time.Time

	state   *agreed.State
	raft    cluster.RaftView
	peers   map[string]cluster.PeerView
	left    map[string]bool // said goodbye over gossip and have not come back
	health  cluster.Health
	waiting string
	// quarantine is why this node, leading raft, holds still; empty: it does not.
	quarantine string
	leftBehind string // a recovery went on without this node, in words
	keys       string // which data key can't be opened here, and why
	jobs       *admin.Jobs
	journals   string                      // what this node's own journals have lost
	table      string                      // why this node doesn't know all jobs
	copies     map[string]replication.Copy // by site; absent: not known
	failback   *string
}

func (n *Node) status() admin.Status {
	v := sight{
		name: n.cfg.Name, site: n.cfg.Site, version: n.version, now: time.Now(),
		patience: n.cluster.Timing().Patience, started: n.cluster.StartedAt(),
		state: n.cluster.State(), raft: n.cluster.Raft(), peers: n.cluster.Peers(),
		health: n.surround.Load().health, waiting: n.cluster.Waiting(),
		quarantine: n.cluster.Quarantined(), leftBehind: n.cluster.LeftBehind(),
		left: map[string]bool{}, failback: n.failbackAvailable(), keys: n.keys.Problem(),
	}
	v.jobs, v.copies = n.work.status(v.state)
	v.journals, v.table = n.work.damaged(), n.work.partial()
	for _, m := range n.cluster.Members() {
		v.left[m.Name] = m.State == gossip.MemberLeft
	}
	s := describe(v)
	s.Cluster = n.cfg.Cluster
	return s
}

// describe is a status, from what was seen alone. What was never heard is nil:
// a zero would be a lie.
func describe(v sight) admin.Status {
	s := admin.Status{
		Version: v.version, Reasons: []string{}, ObservedAt: v.now.UTC(),
		Observer: admin.Observer{Node: v.name, Site: v.site}, Raft: v.raftStatus(),
		Sites: []admin.SiteStatus{}, Nodes: []admin.NodeStatus{},
	}
	if v.state.ClusterID == "" {
		why := v.waiting
		if why == "" {
			why = "this node has not heard the agreed state since its start"
		}
		s.Reasons = append(s.Reasons, why)
		return s
	}
	s.Generation = &v.state.Generation.Number
	p := v.state.Primary
	s.Primary = &admin.Primary{Site: p.Site, Epoch: p.Epoch, Since: p.Since, Reason: p.Reason}
	if f := v.state.LastFailover; f != nil {
		s.LastFailover = &admin.Failover{
			From: f.From, To: f.To, Kind: string(f.Kind), Epoch: f.Epoch, At: f.At, RTOSeconds: f.RTOSeconds,
			RPOSeconds: f.RPOSeconds, RecordsAtRisk: f.RecordsAtRisk, Acknowledged: f.Acknowledged,
		}
	}
	s.FailbackAvailable = v.failback
	if h := v.state.Hold; h != nil {
		s.Hold = &admin.Hold{Reason: h.Reason, By: h.By, At: h.At}
	}
	s.Jobs = v.jobs
	s.Nodes = v.nodes()
	if v.state.Parsed != nil {
		for _, name := range sortedNames(v.state.Parsed.Sites) {
			s.Sites = append(s.Sites, v.siteStatus(name, s.Nodes))
		}
	}
	s.Reasons = append(s.Reasons, v.reasons(s)...)
	s.Healthy = len(s.Reasons) == 0
	return s
}

func (v sight) raftStatus() admin.Raft {
	r := admin.Raft{Quorum: v.raft.Quorum}
	if !v.raft.Since.IsZero() {
		since := v.raft.Since.UTC()
		r.QuorumSince = &since
	}
	if v.raft.Term == 0 {
		return r
	}
	r.Term, r.CommitIndex = &v.raft.Term, &v.raft.CommitIndex
	if v.raft.Leader != "" && v.raft.Quorum {
		r.Leader = &v.raft.Leader
		if n, known := v.state.Nodes[v.raft.Leader]; known {
			r.LeaderSite = &n.Site
		}
	}
	voters := 0
	for _, server := range v.raft.Servers {
		if server.Voter {
			voters++
		}
	}
	r.Voters = &voters
	return r
}

func (v sight) nodes() []admin.NodeStatus {
	voter := map[string]bool{}
	for _, server := range v.raft.Servers {
		voter[server.Name] = server.Voter
	}
	var list []admin.NodeStatus
	for _, name := range sortedNames(v.state.Nodes) {
		n := v.state.Nodes[name]
		p, isPeer := v.peers[name]
		if isPeer && p.Info.RPC != "" {
			n = p.Info
		}
		vote, leads := voter[name], v.raft.Quorum && v.raft.Leader == name
		started := n.StartedAt
		s := admin.NodeStatus{
			Name: name, Site: n.Site, Version: n.Version, API: n.API, Admin: n.Admin, Voter: &vote, StartedAt: &started,
		}
		if v.raft.Quorum {
			s.Leader = &leads
		}
		if name == v.name {
			pid, zero, draining := os.Getpid(), 0.0, v.health.Draining
			s.State, s.LastHeardSeconds, s.PID, s.Draining = admin.NodeAlive, &zero, &pid, &draining
		} else {
			s.State = v.stateOf(p)
			if p.Heard {
				ago, pid, draining := p.Ago.Seconds(), p.PID, p.Draining
				s.LastHeardSeconds, s.PID, s.Draining, s.Via = &ago, &pid, &draining, p.Via
			}
		}
		list = append(list, s)
	}
	return list
}

// stateOf a peer: alive while it answers, suspect for one more patience, then
// dead; left when it said so. One that never answered this process is suspect
// until the process has waited as long as for any other.
func (v sight) stateOf(p cluster.PeerView) admin.NodeState {
	silent := v.now.Sub(v.started)
	if p.Heard {
		silent = p.Ago
	}
	switch {
	case p.Heard && silent < v.patience:
		return admin.NodeAlive
	case v.left[p.Name]:
		return admin.NodeLeft
	case silent < 2*v.patience:
		return admin.NodeSuspect
	}
	return admin.NodeDead
}

func (v sight) siteStatus(name string, nodes []admin.NodeStatus) admin.SiteStatus {
	cfg := v.state.Parsed
	site := cfg.Sites[name]
	rpo, rto := site.RPOTarget.D().Seconds(), site.RTOTarget.D().Seconds()
	s := admin.SiteStatus{
		Name: name, City: site.City, Role: admin.Role(cfg.Role(name, v.state.Primary.Site)),
		Replication: &admin.Replication{RPOTargetSeconds: &rpo, RTOTargetSeconds: &rto},
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
		healthy, none := v.upstreamsHealthy(name), "none"
		s.UpstreamsHealthy, s.Degradation = &healthy, &none
	}
	s.State = v.siteState(s)
	return s
}

// upstreamsHealthy is what the site's best-informed living node says.
func (v sight) upstreamsHealthy(site string) int {
	if site == v.site {
		return v.health.UpstreamsHealthy
	}
	healthy := 0
	for _, p := range v.peers {
		if p.Site == site && p.Heard && p.Ago < v.patience {
			healthy = max(healthy, p.UpstreamsHealthy)
		}
	}
	return healthy
}

func (v sight) siteState(s admin.SiteStatus) admin.SiteState {
	switch {
	case *s.NodesTotal == 0:
		return admin.SiteUnknown // nobody ever joined from there
	case *s.NodesAlive == 0 && v.heardByOthers(s.Name):
		return admin.SiteIsolated
	case *s.NodesAlive == 0 && s.LastHeardSeconds == nil && v.now.Sub(v.started) < 2*v.patience:
		return admin.SiteUnknown
	case *s.NodesAlive == 0:
		return admin.SiteDown
	case s.Name == v.site && v.apart():
		return admin.SiteIsolated
	case *s.NodesAlive < *s.NodesTotal, *s.UpstreamsTotal > 0 && *s.UpstreamsHealthy < *s.UpstreamsTotal:
		return admin.SiteDegraded
	}
	return admin.SiteHealthy
}

// heardByOthers reports whether a living peer of another site hears a site
// that this node does not.
func (v sight) heardByOthers(site string) bool {
	for _, p := range v.peers {
		if !p.Heard || p.Ago >= v.patience || p.Site == site {
			continue
		}
		for name, ago := range p.HeardBy {
			if v.state.Nodes[name].Site == site && ago+p.Ago < v.patience {
				return true
			}
		}
	}
	return false
}

// apart reports whether this node hears no other site although there are some.
func (v sight) apart() bool {
	others := false
	for _, p := range v.peers {
		if p.Site == v.site {
			continue
		}
		others = true
		if p.Heard && p.Ago < v.patience {
			return false
		}
	}
	return others
}

// reasons say in words what is not as it should be.
func (v sight) reasons(s admin.Status) []string {
	var out []string
	if !v.raft.Quorum {
		words := "no quorum: the configuration and the primary can't change, requests go on"
		if s.Raft.QuorumSince != nil {
			words = fmt.Sprintf("no quorum since %s: the configuration and the primary can't change, requests go on", s.Raft.QuorumSince.Format(time.RFC3339))
		}
		out = append(out, words)
	}
	if v.raft.Quorum {
		out = append(out, v.behind()...)
	}
	if v.leftBehind != "" {
		out = append(out, v.leftBehind)
	}
	if v.keys != "" {
		out = append(out, fmt.Sprintf("node %s: %s", v.name, v.keys))
	}
	out = append(out, datakeys.NotInUse(v.state)...)
	if v.journals != "" {
		out = append(out, fmt.Sprintf("node %s: %s", v.name, v.journals))
	}
	if v.table != "" {
		out = append(out, fmt.Sprintf("node %s: %s", v.name, v.table))
	}
	if v.quarantine != "" {
		out = append(out, "quarantined: "+v.quarantine)
	}
	if v.state.Parsed == nil {
		out = append(out, errNoConfig.Error())
	}
	for _, site := range s.Sites {
		switch site.State {
		case admin.SiteUnknown:
			if *site.NodesTotal == 0 {
				out = append(out, fmt.Sprintf("site %s: no node has joined yet", site.Name))
			} else {
				out = append(out, fmt.Sprintf("site %s: not heard of yet", site.Name))
			}
		case admin.SiteDown:
			out = append(out, fmt.Sprintf("site %s is down: %s", site.Name, lastHeard(site.LastHeardSeconds)))
		case admin.SiteIsolated:
			out = append(out, fmt.Sprintf("site %s is isolated", site.Name))
		case admin.SiteDegraded:
			out = append(out, v.degraded(site, s.Nodes)...)
		}
		if r := site.Replication; r.LagSeconds != nil && *r.LagSeconds > *r.RPOTargetSeconds {
			out = append(out, fmt.Sprintf("site %s: its copy of the other sites' jobs is %.0f s old, the target is %.0f s",
				site.Name, *r.LagSeconds, *r.RPOTargetSeconds))
		}
	}
	out = append(out, v.fewVoters(s)...)
	if v.health.Draining {
		out = append(out, fmt.Sprintf("node %s is draining", v.name))
	}
	if v.state.Parsed != nil {
		for _, u := range sortedNames(v.state.Drained) {
			if def, known := v.state.Parsed.Upstreams[u]; known {
				out = append(out, fmt.Sprintf("upstream %s of site %s is drained", u, def.Site))
			}
		}
	}
	for _, n := range s.Nodes {
		if n.Name != v.name && n.Draining != nil && *n.Draining && n.State == admin.NodeAlive {
			out = append(out, fmt.Sprintf("node %s is draining", n.Name))
		}
	}
	return out
}

// fewVoters says that the loss of one node would still cost the quorum although
// three sites live: a young cluster, for some seconds.
func (v sight) fewVoters(s admin.Status) []string {
	up := 0
	for _, site := range s.Sites {
		if site.NodesAlive != nil && *site.NodesAlive > 0 {
			up++
		}
	}
	if !v.raft.Quorum || up < 3 || s.Raft.Voters == nil || *s.Raft.Voters >= 3 {
		return nil
	}
	return []string{fmt.Sprintf("%d of 3 voters are placed: losing one node can still cost the quorum", *s.Raft.Voters)}
}

// behind says that what this node knows of the agreed state is old: it has just
// started, or hears the leader by other ways than raft's. With a quorum a tick
// comes several times a second. A peer can be behind likewise.
func (v sight) behind() []string {
	switch {
	case v.raft.Epoch > v.state.Primary.Epoch:
		return []string{fmt.Sprintf("node %s has heard of epoch %d and knows the primary of epoch %d only", v.name, v.raft.Epoch, v.state.Primary.Epoch)}
	case !v.raft.Ticked:
		return []string{fmt.Sprintf("node %s has not heard from the raft leader since its start: what it says of the agreed state may be old", v.name)}
	case v.raft.TickAgo >= v.patience:
		return []string{fmt.Sprintf("node %s has not heard from the raft leader for %s: what it says of the agreed state may be old",
			v.name, v.raft.TickAgo.Round(100*time.Millisecond))}
	}
	var out []string
	for _, name := range sortedNames(v.peers) {
		if p := v.peers[name]; p.Heard && p.Ago < v.patience && p.Stuck >= v.patience {
			out = append(out, fmt.Sprintf("node %s answers, but has not followed the agreed state for %s: look at its disk and its log", name, p.Stuck.Round(100*time.Millisecond)))
		}
	}
	return out
}

func (v sight) degraded(site admin.SiteStatus, nodes []admin.NodeStatus) []string {
	var out []string
	for _, n := range nodes {
		if n.Site == site.Name && n.State != admin.NodeAlive {
			out = append(out, fmt.Sprintf("node %s is %s: %s", n.Name, n.State, lastHeard(n.LastHeardSeconds)))
		}
	}
	if *site.UpstreamsHealthy < *site.UpstreamsTotal {
		out = append(out, fmt.Sprintf("site %s: %d of %d upstreams are healthy", site.Name, *site.UpstreamsHealthy, *site.UpstreamsTotal))
	}
	return out
}

func lastHeard(seconds *float64) string {
	if seconds == nil {
		return "never heard"
	}
	return fmt.Sprintf("last heard %s ago", time.Duration(*seconds*float64(time.Second)).Round(100*time.Millisecond))
}

func sortedNames[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
