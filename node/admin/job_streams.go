package admin

import (
	"context"
	"net/http"

	"github.com/dsnode/dsnode/cluster/agreed"
)

// JobsChecker shows a node's internal state of jobs.
type JobsChecker interface {
	// CheckJobs returns nil if the node's job table agrees with its journals.
	CheckJobs(ctx context.Context) error
	// JobStreams says which node executes which stream, by the node's copy of the agreed
	// state.
	JobStreams(ctx context.Context) (JobStreams, error)
}

// JobStreams are the agreed job streams that have an owner, ordered by origin and
// incarnation. Ownership is the Raft index of the newest change of an owner that the
// node has applied; it only rises.
type JobStreams struct {
	Ownership uint64             `json:"ownership"`
	Data      []agreed.JobStream `json:"data"`
}

func (c *Client) JobStreams(ctx context.Context) (JobStreams, error) {
	return ask[JobStreams](ctx, c, http.MethodGet, "/admin/v1/jobs/streams", nil, nil)
}

// JobsCheck is the answer of a successful check.
type JobsCheck struct {
	Agree bool `json:"agree"`
}

func (s *Server) postJobsCheck(ctx context.Context, _ call) (any, error) {
	if err := s.cluster.CheckJobs(ctx); err != nil {
		return nil, err
	}
	return JobsCheck{Agree: true}, nil
}

func (c *Client) CheckJobs(ctx context.Context) error {
	_, err := ask[JobsCheck](ctx, c, http.MethodPost, "/admin/v1/jobs/check", nil, nil)
	return err
}
