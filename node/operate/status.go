package operate

import (
	"context"
	"os"
	"time"

	"github.com/dsnode/dsnode/cluster"
	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/gossip"
	"github.com/dsnode/dsnode/node/admin"
	"github.com/dsnode/dsnode/replication"
)

// view is everything that a status is made from, gathered at one moment.
type view struct {
	clusterName, name, site, version string

	now      time.Time
	started  time.Time // this process
	patience time.Duration

	state *agreed.State
	raft  cluster.RaftView
	peers map[string]cluster.PeerView
	// agreedAge is how old this node's copy of the agreed state may be, nil if unknown.
	agreedAge  *time.Duration
	stateBytes int
	left       map[string]bool // nodes that have left the gossip and have not come back
	health     cluster.Health  // of this node
	disk       cluster.DiskSpeed
	// slowWrite is how long a write may take on a raft leader's disk.
	slowWrite time.Duration

	jobs     *admin.Jobs                 // nil: unknown
	copies   map[string]replication.Copy // by site; absent: unknown
	failback *string                     // the site to which the primary could go back

	// Problems, as sentences; empty: none.
	waiting     string // why this node is not a member yet
	starting    string // what it has not caught up with since its start
	quarantine  string // why this node, the Raft leader, changes nothing
	leftBehind  string // that the cluster was recovered without this node
	removed     error  // that this node was removed; nil: it was not
	keyProblem  string // which data key this node can't open, and why
	jobProblems []string

	links []link // traffic that does not go through; describe sets it
}

// Status is the state of the cluster as this node sees it now, with or without quorum.
func (o *Operator) Status(context.Context) (admin.Status, error) { return describe(o.view()), nil }

// JobsMissing says, for each living node that may lack jobs that other nodes have, why. A
// node that stops meanwhile may take the only other copy of them with it.
func (o *Operator) JobsMissing() map[string]string { return o.view().jobsMissing() }

func (v view) jobsMissing() map[string]string {
	missing := map[string]string{}
	if v.health.JobsMissing != "" {
		missing[v.name] = v.health.JobsMissing
	}
	for name, p := range v.peers {
		if p.JobsMissing != "" && p.HeardWithin(v.patience) {
			missing[name] = p.JobsMissing
		}
	}
	return missing
}

// Reasons says why the cluster is not healthy; empty: it is healthy.
func (o *Operator) Reasons() []string { return describe(o.view()).Reasons }

func (o *Operator) view() view {
	v := view{
		clusterName: o.ClusterName, name: o.Name, site: o.Site, version: o.Version,
		now: o.Host.Now(), started: o.Cluster.StartedAt(), patience: o.Cluster.Timing().Patience,
		state: o.Cluster.State(), raft: o.Cluster.Raft(), peers: o.Cluster.Peers(), left: map[string]bool{}, health: o.Health(),
		disk: o.Cluster.DiskSpeed(), slowWrite: cluster.SlowWrite(o.Cluster.Timing()),
		failback: o.failbackAvailable(),
		waiting:  o.Cluster.Waiting(), starting: o.Starting(), quarantine: o.Cluster.Quarantined(), leftBehind: o.Cluster.LeftBehind(),
		removed:    o.Cluster.RemovedError(),
		keyProblem: o.Keys.Problem(), jobProblems: o.Jobs.Problems(),
	}
	v.stateBytes = o.Cluster.StateBytes()
	if age, known := o.Cluster.AgreedAge(); known {
		v.agreedAge = &age
	}
	v.health.JobsMissing = o.Jobs.Missing() // pings may still carry an older answer
	v.jobs, v.copies = o.Jobs.Status(v.state)
	for _, m := range o.Cluster.Members() {
		v.left[m.Name] = m.State == gossip.MemberLeft
	}
	return v
}

// describe makes the status from the view alone. A value that no node has reported is
// null, not zero.
func describe(v view) admin.Status {
	s := admin.Status{
		Cluster: v.clusterName, Version: v.version, Reasons: []string{}, Warnings: []string{}, ObservedAt: v.now.UTC(),
		Observer: admin.Observer{Node: v.name, Site: v.site}, Raft: v.raftStatus(),
		Sites: []admin.SiteStatus{}, Nodes: []admin.NodeStatus{},
	}
	if v.state.ClusterID == "" {
		why := v.waiting
		if why == "" {
			why = noState
		}
		s.Reasons = append(s.Reasons, why)
		return s
	}
	s.Generation = &v.state.Generation.Number
	s.FeatureLevel = v.featureLevel()
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
	v.links = v.blockedLinks()
	s.Nodes = v.nodes()
	if v.state.Parsed != nil {
		for _, name := range sortedNames(v.state.Parsed.Sites) {
			s.Sites = append(s.Sites, v.siteStatus(name, s.Nodes))
		}
	}
	s.Reasons = append(s.Reasons, v.reasons(s)...)
	s.Warnings = append(s.Warnings, v.quorumWarnings(s.Nodes)...)
	s.Warnings = append(s.Warnings, v.largeState()...)
	s.Warnings = append(s.Warnings, waitingNodes(v.state)...)
	s.Healthy = len(s.Reasons) == 0
	return s
}

// featureLevel names the members that announce a lower level than the newest.
func (v view) featureLevel() *admin.Feature {
	f := &admin.Feature{Agreed: v.state.FeatureLevel, Newest: max(agreed.MaxFeatureLevel, v.state.FeatureLevel), HeldBy: []string{}}
	for _, name := range sortedNames(v.state.Nodes) {
		if v.state.Nodes[name].Feature < f.Newest {
			f.HeldBy = append(f.HeldBy, name)
		}
	}
	return f
}

// raftStatus names a leader only while there is a quorum.
func (v view) raftStatus() admin.Raft {
	r := admin.Raft{Quorum: v.raft.Quorum}
	if !v.raft.Since.IsZero() {
		r.QuorumSince = new(v.raft.Since.UTC())
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

func (v view) nodes() []admin.NodeStatus {
	voter := map[string]bool{}
	for _, server := range v.raft.Servers {
		voter[server.Name] = server.Voter
	}
	missing := v.jobsMissing()
	var list []admin.NodeStatus
	for _, name := range sortedNames(v.state.Nodes) {
		n := v.state.Nodes[name]
		p, isPeer := v.peers[name]
		if isPeer && p.Info.RPC != "" {
			n = p.Info
		}
		s := admin.NodeStatus{
			Name: name, Site: n.Site, Version: n.Version, API: n.API, Admin: n.Admin,
			Voter: new(voter[name]), StartedAt: new(n.StartedAt), State: v.nodeState(p), JobsMissing: missing[name],
		}
		if v.raft.Quorum {
			s.Leader = new(v.raft.Leader == name)
		}
		switch {
		case name == v.name:
			s.State, s.LastHeardSeconds, s.PID, s.Draining = admin.NodeAlive, new(0.0), new(os.Getpid()), new(v.health.Draining)
			v.setDisk(&s, v.disk)
		case p.Heard:
			s.LastHeardSeconds, s.PID, s.Draining, s.Via = new(p.Ago.Seconds()), new(p.PID), new(p.Draining), p.Via
			v.setDisk(&s, p.Disk)
		}
		list = append(list, s)
	}
	return list
}

func (v view) setDisk(s *admin.NodeStatus, d cluster.DiskSpeed) {
	if d.Known {
		s.DiskWriteSeconds = new(d.Write.Seconds())
	}
	if d.SlowFor > 0 {
		s.DiskSlowSince = new(v.now.Add(-d.SlowFor).UTC())
	}
}

// nodeState is alive while the peer answers, suspect for another patience, then dead. A
// peer that has left the gossip is left instead. The silence of a peer that has never
// answered this process counts from the start of the process.
func (v view) nodeState(p cluster.PeerView) admin.NodeState {
	silent := v.now.Sub(v.started)
	if p.Heard {
		silent = p.Ago
	}
	switch {
	case p.HeardWithin(v.patience):
		return admin.NodeAlive
	case v.left[p.Name]:
		return admin.NodeLeft
	case silent < 2*v.patience:
		return admin.NodeSuspect
	}
	return admin.NodeDead
}
