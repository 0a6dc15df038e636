// Package agreed has the state that all nodes agree on through Raft, and the pure
// function Apply that changes it: the primary, the nodes, the configuration with its
// history, API-key hashes, data keys, owners of job streams, cache purges and drills.
// It uses no log, no clock and no connection. Start at State, then Apply.
package agreed

import (
	"time"

	"github.com/dsnode/dsnode/cluster/config"
)

// State is everything the cluster has agreed on. A published *State is immutable:
// readers use it without a lock, and Apply returns a new one that shares the
// unchanged parts. Every field has a bound, see bounds.go.
type State struct {
	Format       int        `json:"format"` // of this struct on disk
	FeatureLevel int        `json:"feature_level"`
	ClusterID    string     `json:"cluster_id"` // 32 hex digits, random
	Name         string     `json:"name"`
	Generation   Generation `json:"generation"`
	CreatedAt    time.Time  `json:"created_at"`

	Primary Primary         `json:"primary"`
	Nodes   map[string]Node `json:"nodes"` // by name
	// Removed are the nodes that were removed last and have not joined again, oldest
	// first, bounded. RemovedBefore also covers those that were dropped from it; see
	// WasRemoved.
	Removed       []Removal         `json:"removed,omitempty"`
	RemovedBefore uint64            `json:"removed_before,omitempty"`
	APIKeys       map[string]APIKey `json:"api_keys"`
	// HadKeys: there has been an API key, maybe one that was cleaned up since. Set from
	// feature level 3 on; see NoKeyYet.
	HadKeys bool `json:"had_keys,omitempty"`
	// ClusterKey signs the tickets of members; nil below feature level MembershipLevel.
	ClusterKey *ClusterKey `json:"cluster_key,omitempty"`
	// Waiting are the nodes that asked to join and wait for an operator, the first one
	// first, bounded.
	Waiting []Applicant `json:"waiting,omitempty"`

	// LastFailover is the newest change of the primary, nil before the first.
	LastFailover *FailoverRecord `json:"last_failover,omitempty"`
	// Switchover is the planned change in progress. After its deadline it counts
	// as abandoned, so that a crashed coordinator blocks no later one.
	Switchover *Switchover `json:"switchover,omitempty"`
	// Hold stops automatic promotions while it is set.
	Hold *Hold `json:"hold,omitempty"`
	// Drained has the upstreams that get no new requests, by name. Each of them
	// was configured when it was drained.
	Drained map[string]DrainedUpstream `json:"drained,omitempty"`
	// Purges says which cached answers must no longer be used.
	Purges CachePurges `json:"cache_purges,omitzero"`
	// Streams are the job journals with unfinished jobs and their owners, by
	// StreamKey.
	Streams map[string]JobStream `json:"streams,omitempty"`
	// DoneStreams are the keys of the streams dropped last, oldest first. No node
	// needs to keep their records.
	DoneStreams []string `json:"done_streams,omitempty"`
	// Ownership is the raft index of the newest change of Streams; it only rises.
	Ownership uint64 `json:"ownership,omitempty"`
	// DataKeys are the keys that records are sealed with, oldest first, bounded.
	DataKeys []DataKey `json:"data_keys,omitempty"`
	// DataKeysVersion rises by one with each command about data keys. A node that
	// replays its log uses it to find out which of two lists is newer.
	DataKeysVersion uint64 `json:"data_keys_version,omitempty"`
	// Drills are the newest drills, oldest first, bounded.
	Drills []DrillRecord `json:"drills,omitempty"`

	Config  ConfigVersion   `json:"config"`
	History []ConfigVersion `json:"history"` // oldest first, without the current one

	// Parsed is Config.Text parsed; derived by the node, never encoded.
	Parsed *config.Config `json:"-"`
}

// NewState is the state before the first command.
func NewState() *State { return &State{Format: formatAt(0)} }

// Generation rises by one each time an operator recovers the cluster after a
// permanent loss of its quorum. The random ID distinguishes two such recoveries.
type Generation struct {
	Number uint64 `json:"number"`
	ID     string `json:"id"`
}

// Primary is the primary site. Epoch rises by one at every change.
type Primary struct {
	Site   string    `json:"site"`
	Epoch  uint64    `json:"epoch"`
	Since  time.Time `json:"since"`
	Reason string    `json:"reason"`
	// Released says that every node of the previous primary had confirmed that it
	// released the role, so the new one need not wait until their leases end.
	Released bool `json:"released,omitempty"`
}

// Node is a member as agreed: its identity and its last known addresses.
type Node struct {
	Name      string    `json:"name"`
	Site      string    `json:"site"`
	RPC       string    `json:"rpc"` // host:port, advertised
	Gossip    string    `json:"gossip"`
	API       string    `json:"api"`
	Admin     string    `json:"admin"`
	Version   string    `json:"version"`
	Feature   int       `json:"feature"`  // the highest feature level it supports
	Instance  string    `json:"instance"` // random per process start
	StartedAt time.Time `json:"started_at"`
	JoinedAt  time.Time `json:"joined_at"`
	// Admitted is the raft index of the entry that made it a member, 0 if the cluster was
	// below feature level 2 then. A node with an older admission was removed.
	Admitted uint64 `json:"admitted,omitempty"`
	// OperatorKey is the fingerprint of the operator key that the process was
	// started with, OperatorKeyPrevious that of the previous key, which it can
	// still open data keys with. A fingerprint reveals nothing about its key.
	OperatorKey         string `json:"operator_key,omitempty"`
	OperatorKeyPrevious string `json:"operator_key_previous,omitempty"`
}

// ConfigVersion is the text of a cluster.yaml, and who changed it when.
type ConfigVersion struct {
	Version uint64    `json:"version"`
	Hash    string    `json:"hash"` // SHA-256 of Text, hex
	Author  string    `json:"author"`
	Time    time.Time `json:"time"`
	Text    string    `json:"text"`
}

// APIKey is a client's key without its secret.
type APIKey struct {
	ID        string    `json:"id"`
	Hash      string    `json:"hash"` // SHA-256 of the secret part, hex
	Tenant    string    `json:"tenant"`
	Note      string    `json:"note,omitempty"`
	Models    []string  `json:"models,omitempty"` // empty: all
	CreatedAt time.Time `json:"created_at"`
	ExpiresAt time.Time `json:"expires_at,omitzero"`
	RevokedAt time.Time `json:"revoked_at,omitzero"`
}

// FailoverKind says why the primary changed.
type FailoverKind string

// The kinds of failover.
const (
	FailoverUnplanned FailoverKind = "unplanned"
	FailoverPlanned   FailoverKind = "planned"
	FailoverDrill     FailoverKind = "drill"
)

// FailoverRecord is one change of the primary, as the status shows it. A value
// that was not measured is nil.
type FailoverRecord struct {
	From          string       `json:"from"`
	To            string       `json:"to"`
	Kind          FailoverKind `json:"kind"`
	Epoch         uint64       `json:"epoch"`
	At            time.Time    `json:"at"`
	Reason        string       `json:"reason"`
	RTOSeconds    *float64     `json:"rto_seconds"`
	RPOSeconds    *float64     `json:"rpo_seconds"`
	RecordsAtRisk *int64       `json:"records_at_risk"`
	Acknowledged  bool         `json:"acknowledged"`
}

// Switchover is a planned change of the primary in progress. The primary releases
// its role as soon as it sees one.
type Switchover struct {
	ID       string       `json:"id"`
	From     string       `json:"from"`
	To       string       `json:"to"`
	Kind     FailoverKind `json:"kind"`
	By       string       `json:"by"`
	At       time.Time    `json:"at"`
	Deadline time.Time    `json:"deadline"`
}

// Hold is a pause of automatic promotions.
type Hold struct {
	Reason string    `json:"reason"`
	By     string    `json:"by"`
	At     time.Time `json:"at"`
}

// DrillRecord is a drill as agreed: who ran it when, and its result. Report is a
// document of package drill; here it is opaque and bounded.
type DrillRecord struct {
	ID        string    `json:"id"`
	Kind      string    `json:"kind"`
	Site      string    `json:"site"`
	By        string    `json:"by"`
	StartedAt time.Time `json:"started_at"`
	// Deadline is when the site ends its isolation by its own timer, even if the
	// drill's runner has died.
	Deadline time.Time `json:"deadline"`
	// AbandonedAt is when a drill without a verdict counts as aborted, because its
	// runner must have died.
	AbandonedAt time.Time `json:"abandoned_at,omitzero"`
	EndedAt     time.Time `json:"ended_at,omitzero"`
	Verdict     string    `json:"verdict,omitempty"` // empty: running
	Report      []byte    `json:"report,omitempty"`
}

// Running reports whether the drill is still running at a time. A drill whose
// runner died ends at AbandonedAt.
func (d DrillRecord) Running(at time.Time) bool {
	return d.Verdict == "" && (at.Before(d.Deadline) || at.Before(d.AbandonedAt))
}
