package journal

import "time"

// Durability says where a record is on disk before it counts.
type Durability string

// The durabilities, weakest first.
const (
	DurableNode      Durability = "node"       // the node that wrote it
	DurableSite      Durability = "site"       // two nodes of the site
	DurableTwoSites  Durability = "two-sites"  // nodes of two sites
	DurableTwoCities Durability = "two-cities" // nodes of sites in two cities
)

// Submission is the payload of Submitted: all that an executor in any site
// needs. Content never changes: the same job id means the same submission.
type Submission struct {
	Tenant     string     `json:"tenant,omitempty"`
	KeyID      string     `json:"key_id,omitempty"`
	Models     []string   `json:"models,omitempty"` // what the key may ask for; empty: all
	Endpoint   string     `json:"endpoint"`         // "/v1/chat/completions"
	Model      string     `json:"model"`
	Durability Durability `json:"durability"` // asked for; the result is shown when it is as durable
	// MinDurability is enough for who asked when Durability can't be had; empty:
	// nothing less is.
	MinDurability Durability `json:"min_durability,omitempty"`
	Priority      int        `json:"priority"` // 0–9, 9 first
	Site          string     `json:"site"`     // that accepted it
	CreatedAt     time.Time  `json:"created_at"`
	ExpiresAt     time.Time  `json:"expires_at"` // not started by then: expired; never zero
	RetryOf       string     `json:"retry_of,omitempty"`
	// KeyHash is an HMAC of tenant and Idempotency-Key, empty without one: two
	// jobs with one KeyHash were given one key with two bodies.
	KeyHash string `json:"key_hash,omitempty"`
	Body    []byte `json:"-"` // the request, encoded apart
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

// Status is where a job is.
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

// Final reports whether nothing comes after it.
func (s Status) Final() bool {
	return s == Succeeded || s == Failed || s == Cancelled || s == Expired
}

const maxRank = 4

// Rank is how a Finished record carries its status in clear: the higher one
// counts when one attempt ended twice. 0 for what is not final.
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

// StatusOfRank is the status that Rank came from, Queued for 0.
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
	Site   string `json:"site,omitempty"`  // whose node executed it
	Epoch  uint64 `json:"epoch,omitempty"`
	// Adopted: the body is a late result of an earlier owner, taken over as it was.
	Adopted bool   `json:"adopted,omitempty"`
	Body    []byte `json:"-"` // the upstream's answer, encoded apart
}
