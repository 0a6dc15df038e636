package admin

import (
	"time"

	"github.com/dsnode/dsnode/cluster"
)

// ConfigVersion is a cluster.yaml as it was written, with its version, hash,
// author and time.
type ConfigVersion = cluster.ConfigVersion

// UpstreamInfo is one model server as the answering node sees it.
type UpstreamInfo struct {
	Name   string        `json:"name"`
	Site   string        `json:"site"`
	Kind   string        `json:"kind"`
	URL    string        `json:"url"`    // without user information
	Models []string      `json:"models"` // names that clients ask for
	State  UpstreamState `json:"state"`
	// Reason says why the state is not healthy, empty otherwise.
	Reason string `json:"reason"`
	// Since is when State took its present value.
	Since          *time.Time `json:"since"`
	InFlight       *int       `json:"in_flight"` // from the answering node
	MaxConcurrency int        `json:"max_concurrency"`
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
