package admin

import "time"

// Status is the state of the cluster as one node, the observer, sees it. GET
// /admin/v1/status and `dsnode status -o json` return it. A value that the observer
// does not know is nil, and null in JSON, never zero.
type Status struct {
	Cluster string `json:"cluster"`
	Version string `json:"version"` // of the observer
	Healthy bool   `json:"healthy"`
	// Reasons are sentences that say why the cluster is not healthy. Empty, never nil.
	Reasons []string `json:"reasons"`
	// Warnings are sentences that say what a further loss would cost. The cluster is healthy
	// with them. Empty, never nil.
	Warnings   []string  `json:"warnings"`
	Observer   Observer  `json:"observer"`
	ObservedAt time.Time `json:"observed_at"`

	Generation   *uint64      `json:"generation"`
	FeatureLevel *Feature     `json:"feature_level"`
	Primary      *Primary     `json:"primary"`
	Raft         Raft         `json:"raft"`
	Sites        []SiteStatus `json:"sites"`
	Nodes        []NodeStatus `json:"nodes"`
	Jobs         *Jobs        `json:"jobs"`
	Alerts       []Alert      `json:"alerts"` // nil: alerts are not supported
	LastFailover *Failover    `json:"last_failover"`
	// FailbackAvailable names a stable site with a better priority than the primary's,
	// which a planned switchover could return to; nil: none.
	FailbackAvailable *string `json:"failback_available"`
	// Hold is a pause of automatic failovers; nil: they are on.
	Hold *Hold `json:"hold"`
}

// Observer is the node that answered.
type Observer struct {
	Node string `json:"node"`
	Site string `json:"site"`
}

// Feature is the command set that the cluster has agreed on.
type Feature struct {
	Agreed int `json:"agreed"`
	Newest int `json:"newest"` // that the observer's version supports
	// HeldBy are the nodes that keep the cluster below the newest level: they run an
	// older version, or their node.yaml has feature_level. Empty, never nil.
	HeldBy []string `json:"held_by"`
}

// Primary is the primary site, as last agreed.
type Primary struct {
	Site   string    `json:"site"`
	Epoch  uint64    `json:"epoch"`
	Since  time.Time `json:"since"`
	Reason string    `json:"reason"`
}

// Raft is the state of Raft as the observer sees it.
type Raft struct {
	Leader      *string `json:"leader"` // node name
	LeaderSite  *string `json:"leader_site"`
	Term        *uint64 `json:"term"`
	CommitIndex *uint64 `json:"commit_index"`
	Voters      *int    `json:"voters"`
	Quorum      bool    `json:"quorum"`
	// QuorumSince is when Quorum last changed: without a quorum, when it was lost.
	QuorumSince *time.Time `json:"quorum_since"`
}

// SiteState is the health of a site.
type SiteState string

const (
	SiteHealthy  SiteState = "healthy"
	SiteDegraded SiteState = "degraded" // it is alive, and a part of it is not
	SiteDown     SiteState = "down"
	SiteIsolated SiteState = "isolated" // it is alive, and cut off from the others
	SiteUnknown  SiteState = "unknown"
)

// Role is a site's relation to the primary: primary, same-city or remote.
type Role string

// SiteStatus is the state of a site.
type SiteStatus struct {
	Name  string    `json:"name"`
	City  string    `json:"city"`
	Role  Role      `json:"role"`
	State SiteState `json:"state"`

	NodesAlive       *int     `json:"nodes_alive"`
	NodesTotal       *int     `json:"nodes_total"`
	UpstreamsHealthy *int     `json:"upstreams_healthy"`
	UpstreamsTotal   *int     `json:"upstreams_total"`
	LastHeardSeconds *float64 `json:"last_heard_seconds"`

	Degradation *string      `json:"degradation"` // none, data, function, interface
	Replication *Replication `json:"replication"`
}

// Replication says how far a site's copy of the other sites' journals is behind, and
// the site's targets.
type Replication struct {
	RecordsBehind    *int64   `json:"records_behind"`
	LagSeconds       *float64 `json:"lag_seconds"`
	RPOTargetSeconds *float64 `json:"rpo_target_seconds"`
	RTOTargetSeconds *float64 `json:"rto_target_seconds"`
}

// NodeState is a node's state in the gossip membership.
type NodeState string

const (
	NodeAlive   NodeState = "alive"
	NodeSuspect NodeState = "suspect"
	NodeDead    NodeState = "dead"
	NodeLeft    NodeState = "left"
)

// NodeStatus is the state of a node.
type NodeStatus struct {
	Name             string     `json:"name"`
	Site             string     `json:"site"`
	State            NodeState  `json:"state"`
	Voter            *bool      `json:"voter"`
	Leader           *bool      `json:"leader"`
	LastHeardSeconds *float64   `json:"last_heard_seconds"`
	Version          string     `json:"version"`
	PID              *int       `json:"pid"`
	API              string     `json:"api"`   // host:port
	Admin            string     `json:"admin"` // host:port
	StartedAt        *time.Time `json:"started_at"`
	// Draining is true while the node is not ready for new clients.
	Draining *bool `json:"draining"`
	// DiskWriteSeconds is how long a write of raft's log takes on the node's disk.
	DiskWriteSeconds *float64 `json:"disk_write_seconds"`
	// DiskSlowSince is since when that has been too long for a raft leader, null while it
	// is not.
	DiskSlowSince *time.Time `json:"disk_slow_since"`
	// Via is the node through which the observer reaches this one while their direct
	// link is cut. It is absent otherwise.
	Via string `json:"via,omitempty"`
	// JobsMissing says why the node may lack jobs that other nodes have. It is absent
	// otherwise, and for a node that is not heard.
	JobsMissing string `json:"jobs_missing,omitempty"`
}

// Jobs counts the asynchronous jobs by status.
type Jobs struct {
	Queued    *int64 `json:"queued"`
	Running   *int64 `json:"running"`
	Succeeded *int64 `json:"succeeded"`
	Failed    *int64 `json:"failed"`
}

// Alert is an alerting rule that is pending or firing.
type Alert struct {
	Name  string    `json:"name"`
	State string    `json:"state"` // pending, firing
	Since time.Time `json:"since"`
	Site  string    `json:"site"`
}

// Failover is the last change of the primary site.
type Failover struct {
	From          string    `json:"from"`
	To            string    `json:"to"`
	Kind          string    `json:"kind"` // unplanned, planned, drill
	Epoch         uint64    `json:"epoch"`
	At            time.Time `json:"at"`
	RTOSeconds    *float64  `json:"rto_seconds"`
	RPOSeconds    *float64  `json:"rpo_seconds"`
	RecordsAtRisk *int64    `json:"records_at_risk"`
	Acknowledged  bool      `json:"acknowledged"`
}

// Hold is who paused automatic promotions, when and why.
type Hold struct {
	Reason string    `json:"reason"`
	By     string    `json:"by"`
	At     time.Time `json:"at"`
}
