package admin

import (
	"encoding/json"
	"time"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/failover"
)

// ConfigVersion is the text of a cluster.yaml with its version, hash, author and time.
type ConfigVersion = agreed.ConfigVersion

// UpstreamInfo is a model server as the answering node sees it.
type UpstreamInfo struct {
	Name   string        `json:"name"`
	Site   string        `json:"site"`
	Kind   string        `json:"kind"`
	URL    string        `json:"url"`    // without user and password
	Models []string      `json:"models"` // names that clients ask for
	State  UpstreamState `json:"state"`
	// Drained: it gets no new requests, by an operator's command.
	Drained bool `json:"drained"`
	// Reason says why the state is not healthy; empty when it is.
	Reason string `json:"reason"`
	// Since is when State last changed.
	Since          *time.Time `json:"since"`
	InFlight       *int       `json:"in_flight"`       // requests of the answering node
	MaxConcurrency int        `json:"max_concurrency"` // of each instance
	// Instances are the discovered addresses, as the answering node sees them. They are
	// absent without discovery and for upstreams of another site.
	Instances []InstanceInfo `json:"instances,omitempty"`
}

// InstanceInfo is one discovered address of an upstream.
type InstanceInfo struct {
	Address  string        `json:"address"` // host:port
	State    UpstreamState `json:"state"`
	Reason   string        `json:"reason"`
	InFlight int           `json:"in_flight"`
}

// UpstreamState is the health of an upstream.
type UpstreamState string

const (
	UpstreamHealthy   UpstreamState = "healthy"
	UpstreamUnhealthy UpstreamState = "unhealthy"
	UpstreamUnknown   UpstreamState = "unknown" // no result of a probe or request yet
)

// APIKeyRequest asks for a client key.
type APIKeyRequest struct {
	Tenant string   `json:"tenant"`
	Note   string   `json:"note"`
	Models []string `json:"models"` // empty: all
	// ExpiresAt nil: the key does not expire.
	ExpiresAt *time.Time `json:"expires_at"`
}

// APIKeyInfo is a client's key without its secret.
type APIKeyInfo struct {
	ID        string     `json:"id"`
	Tenant    string     `json:"tenant"`
	Note      string     `json:"note"`
	Models    []string   `json:"models"` // empty: all
	CreatedAt time.Time  `json:"created_at"`
	ExpiresAt *time.Time `json:"expires_at"` // nil: never
	RevokedAt *time.Time `json:"revoked_at"` // nil: it is not
}

// State is active, expired or revoked.
func (k APIKeyInfo) State(now time.Time) string {
	switch {
	case k.RevokedAt != nil:
		return "revoked"
	case k.ExpiresAt != nil && !now.Before(*k.ExpiresAt):
		return "expired"
	}
	return "active"
}

// APIKeyCreated is a new key. Secret is what the client sends; it can't be read again.
type APIKeyCreated struct {
	APIKeyInfo
	Secret string `json:"secret"`
}

// Check is one named condition of a switchover or a drill.
type Check = failover.Check

// FailoverRequest asks for a planned switchover.
type FailoverRequest struct {
	To string `json:"to"`
	// AcceptLoss allows a switchover that may lose records.
	AcceptLoss bool `json:"accept_loss"`
	// Waive names checks that may fail.
	Waive []string `json:"waive"`
}

// FailoverPlan says whether a switchover can begin.
type FailoverPlan struct {
	From   *string `json:"from"` // the primary now
	Epoch  *uint64 `json:"epoch"`
	To     string  `json:"to"`
	OK     bool    `json:"ok"`
	Checks []Check `json:"checks"`
}

// FailoverStep is one step of a switchover.
type FailoverStep struct {
	Name        string    `json:"name"`
	At          time.Time `json:"at"`
	TookSeconds float64   `json:"took_seconds"`
	Error       string    `json:"error,omitempty"`
}

// FailoverResult describes a finished switchover.
type FailoverResult struct {
	ID    string `json:"id"`
	From  string `json:"from"`
	To    string `json:"to"`
	Epoch uint64 `json:"epoch"` // of the new primary
	// IdleSeconds is how long no site acted as primary, until a node of the new one said
	// that it does.
	IdleSeconds float64 `json:"idle_seconds"`
	// RecordsAtRisk and RPOSeconds are what may have been lost: zero, unless the request
	// accepted a loss.
	RecordsAtRisk *int64   `json:"records_at_risk"`
	RPOSeconds    *float64 `json:"rpo_seconds"`
	// LeaderMoved: the Raft leader is in the new primary's site too. If not, the
	// primary has still moved, and the cluster keeps trying.
	LeaderMoved bool           `json:"leader_moved"`
	Checks      []Check        `json:"checks"`
	Steps       []FailoverStep `json:"steps"`
}

// DrillRequest asks for a drill, or for its plan.
type DrillRequest struct {
	Kind string `json:"kind"`
	Site string `json:"site"`
	// ForSeconds is how long an isolation lasts; zero: the default.
	ForSeconds float64 `json:"for_seconds"`
	// Return moves the primary back afterwards.
	Return bool     `json:"return"`
	Waive  []string `json:"waive"`
	// ProbeModel is a model that the drill's clients also ask for completions of one
	// token; empty: none.
	ProbeModel string `json:"probe_model"`
}

// DrillPlan says whether a drill can begin and what it would do.
type DrillPlan struct {
	Kind      string  `json:"kind"`
	Site      string  `json:"site"`
	Rehearses string  `json:"rehearses"`
	OK        bool    `json:"ok"`
	Checks    []Check `json:"checks"`
}

// Drill is the record of a drill.
type Drill struct {
	ID        string    `json:"id"`
	Kind      string    `json:"kind"`
	Site      string    `json:"site"`
	By        string    `json:"by"`
	StartedAt time.Time `json:"started_at"`
	// Deadline is when an isolated site ends the cut by itself.
	Deadline time.Time  `json:"deadline"`
	EndedAt  *time.Time `json:"ended_at"` // nil: it runs
	// Verdict is pass, fail, aborted or skipped; nil while it runs.
	Verdict *string `json:"verdict"`
	// Report is the drill's report as package failover/drill writes it. It is nil in
	// lists and while another node runs the drill.
	Report json.RawMessage `json:"report"`
}
