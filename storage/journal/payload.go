package journal

import "time"

// Durability is the set of nodes that must have a record on disk.
type Durability string

// The durabilities, weakest first.
const (
	DurableNode      Durability = "node"       // the node that wrote it
	DurableSite      Durability = "site"       // two nodes of the site
	DurableTwoSites  Durability = "two-sites"  // nodes of two sites
	DurableTwoCities Durability = "two-cities" // nodes of sites in two cities
)

// Submission is the payload of Submitted: everything that an executor in any site
// needs. It never changes: one job id always has the same submission.
type Submission struct {
	Tenant     string     `json:"tenant,omitempty"`
	KeyID      string     `json:"key_id,omitempty"`
	Models     []string   `json:"models,omitempty"` // models that the API key may use; empty: all
	Endpoint   string     `json:"endpoint"`         // "/v1/chat/completions"
	Model      string     `json:"model"`
	Durability Durability `json:"durability"` // requested; the result is shown once it is this durable
	// MinDurability is accepted by the client when Durability can't be reached; empty:
	// nothing less than Durability is.
	MinDurability Durability `json:"min_durability,omitempty"`
	Priority      int        `json:"priority"` // 0–9, 9 first
	Site          string     `json:"site"`     // the site that accepted it
	CreatedAt     time.Time  `json:"created_at"`
	ExpiresAt     time.Time  `json:"expires_at"` // when the job expires if not started; never zero
	RetryOf       string     `json:"retry_of,omitempty"`
	// KeyHash is an HMAC of tenant and Idempotency-Key, empty without a key. Two jobs with
	// the same KeyHash used the same key with different bodies.
	KeyHash string `json:"key_hash,omitempty"`
	Body    []byte `json:"-"` // the request, encoded separately
}

// Head is the part of a Submission that a table needs for its indexes.
type Head struct {
	Tenant    string    `json:"tenant"`
	KeyHash   string    `json:"key_hash"`
	ExpiresAt time.Time `json:"expires_at"`
}

// Delay is the payload of Retrying.
type Delay struct {
	NotBefore time.Time `json:"not_before"`
	Error     string    `json:"error,omitempty"` // OpenAI's error object, JSON
}

// Status is the state of a job.
type Status string

// The statuses of a job; the last four are final.
const (
	Queued    Status = "queued"
	Running   Status = "running"
	Succeeded Status = "succeeded"
	Failed    Status = "failed"
	Cancelled Status = "cancelled"
	Expired   Status = "expired"
)

// Final reports whether the status is final.
func (s Status) Final() bool {
	return s == Succeeded || s == Failed || s == Cancelled || s == Expired
}

const maxRank = 4

// Rank is the status of a Finished record in a form that needs no key. If one attempt
// ended twice, the higher rank counts. It is 0 for a status that is not final.
func (s Status) Rank() uint8 {
	switch s {
	case Succeeded:
		return maxRank
	case Failed:
		return 3
	case Cancelled:
		return 2
	case Expired:
		return 1
	}
	return 0
}

// StatusOfRank is the inverse of Rank; it returns Queued for 0.
func StatusOfRank(rank uint8) Status {
	for _, s := range []Status{Succeeded, Failed, Cancelled, Expired} {
		if s.Rank() == rank {
			return s
		}
	}
	return Queued
}

// Outcome is the payload of Finished.
type Outcome struct {
	Status Status `json:"status"` // a final one
	Code   int    `json:"code,omitempty"`
	Error  string `json:"error,omitempty"` // OpenAI's error object, JSON
	Site   string `json:"site,omitempty"`  // site of the node that executed it
	Epoch  uint64 `json:"epoch,omitempty"`
	// Adopted: the body is a late result of an earlier owner, copied unchanged.
	Adopted bool   `json:"adopted,omitempty"`
	Body    []byte `json:"-"` // the upstream's answer, encoded separately
}
