package admin

import (
	"encoding/json"
	"time"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/failover"
)

// ConfigVersion is a cluster.yaml as it was written, with its version, hash,
// author and time.
type ConfigVersion = agreed.ConfigVersion

// UpstreamInfo is one model server as the answering node sees it.
type UpstreamInfo struct {
	Name   string        `json:"name"`
	Site   string        `json:"site"`
	Kind   string        `json:"kind"`
	URL    string        `json:"url"`    // without user information
	Models []string      `json:"models"` // names that clients ask for
	State  UpstreamState `json:"state"`
	// Drained: an operator lets it get no new request.
	Drained bool `json:"drained"`
	// Reason says why the state is not healthy, empty otherwise.
	Reason string `json:"reason"`
	// Since is when State took its present value.
	Since          *time.Time `json:"since"`
	InFlight       *int       `json:"in_flight"`       // from the answering node
	MaxConcurrency int        `json:"max_concurrency"` // of each instance
	// Instances are the addresses that were discovered, as the answering node
	// sees them; absent without discovery and for another site's upstreams.
	Instances []InstanceInfo `json:"instances,omitempty"`
}

// InstanceInfo is one address of an upstream that is discovered.
type InstanceInfo struct {
	Address  string        `json:"address"` // host:port
	State    UpstreamState `json:"state"`
	Reason   string        `json:"reason"`
	InFlight int           `json:"in_flight"`
}

// UpstreamState is how an upstream is doing.
type UpstreamState string

// The states of an upstream.
const (
	UpstreamHealthy   UpstreamState = "healthy"
	UpstreamUnhealthy UpstreamState = "unhealthy"
	UpstreamUnknown   UpstreamState = "unknown" // nothing was heard of it yet
)

// APIKeyRequest asks for a key of the client API.
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

// State is what the key is good for at a time: active, expired or revoked.
func (k APIKeyInfo) State(now time.Time) string {
	switch {
	case k.RevokedAt != nil:
		return "revoked"
	case k.ExpiresAt != nil && !now.Before(*k.ExpiresAt):
		return "expired"
	}
	return "active"
}

// APIKeyCreated is a new key. Secret is what the client sends; nobody can read
// it again.
type APIKeyCreated struct {
	APIKeyInfo
	Secret string `json:"secret"`
}

// Check is one named condition of a switchover or a drill.
type Check = failover.Check

// FailoverRequest asks for a planned switchover.
type FailoverRequest struct {
	To string `json:"to"`
	// AcceptLoss goes on although records may be lost.
	AcceptLoss bool `json:"accept_loss"`
	// Waive names checks that need not hold.
	Waive []string `json:"waive"`
}

// FailoverPlan is whether a switchover may begin.
type FailoverPlan struct {
	From   *string `json:"from"` // the primary now
	Epoch  *uint64 `json:"epoch"`
	To     string  `json:"to"`
	OK     bool    `json:"ok"`
	Checks []Check `json:"checks"`
}

// FailoverStep is one part of a switchover as it went.
type FailoverStep struct {
	Name        string    `json:"name"`
	At          time.Time `json:"at"`
	TookSeconds float64   `json:"took_seconds"`
	Error       string    `json:"error,omitempty"`
}

// FailoverResult is a switchover that was made.
type FailoverResult struct {
	ID    string `json:"id"`
	From  string `json:"from"`
	To    string `json:"to"`
	Epoch uint64 `json:"epoch"` // of the new primary
	// IdleSeconds is how long no site was the primary.
	IdleSeconds   float64 `json:"idle_seconds"`
	RecordsAtRisk *int64  `json:"records_at_risk"`
	// LeaderMoved: the raft leadership is at the new primary too. If not, the
	// cluster goes on trying; the role has moved all the same.
	LeaderMoved bool           `json:"leader_moved"`
	Checks      []Check        `json:"checks"`
	Steps       []FailoverStep `json:"steps"`
}

// DrillRequest asks for a drill, or for its plan.
type DrillRequest struct {
	Kind string `json:"kind"`
	Site string `json:"site"`
	// ForSeconds is how long an isolation lasts; zero is the default.
	ForSeconds float64 `json:"for_seconds"`
	// Return moves the primary back afterwards.
	Return bool     `json:"return"`
	Waive  []string `json:"waive"`
	// ProbeModel adds completions of one token to what is asked; empty: none.
	ProbeModel string `json:"probe_model"`
}

// DrillPlan is whether a drill may begin and what it would do.
type DrillPlan struct {
	Kind      string  `json:"kind"`
	Site      string  `json:"site"`
	Rehearses string  `json:"rehearses"`
	OK        bool    `json:"ok"`
	Checks    []Check `json:"checks"`
}

// Drill is one rehearsal.
type Drill struct {
	ID        string    `json:"id"`
	Kind      string    `json:"kind"`
	Site      string    `json:"site"`
	By        string    `json:"by"`
	StartedAt time.Time `json:"started_at"`
	// Deadline is when an isolated site heals by itself, whatever happens.
	Deadline time.Time  `json:"deadline"`
	EndedAt  *time.Time `json:"ended_at"` // nil: it runs
	// Verdict is pass, fail, aborted or skipped; nil while it runs.
	Verdict *string `json:"verdict"`
	// Report is a drill's evidence as package failover/drill writes it, nil when
	// there is none: in lists, and while another node runs it.
	Report json.RawMessage `json:"report"`
}
