package admin

import (
	"context"
	"net/http"

	"github.com/dsnode/dsnode/cluster"
)

// JobsChecker shows what a node keeps of jobs besides the jobs themselves.
type JobsChecker interface {
	// CheckJobs is nil when the node's journals and its table of jobs agree.
	CheckJobs(ctx context.Context) error
	// JobStreams says who executes what, by the node's copy of the agreed state.
	JobStreams(ctx context.Context) (JobStreams, error)
}

// JobStreams are the streams in which jobs were taken and that somebody has to
// execute, by origin and incarnation. Ownership is the raft index of the newest
// change of them that the node has heard of; it only rises.
type JobStreams struct {
	Ownership uint64              `json:"ownership"`
	Data      []cluster.JobStream `json:"data"`
}

func (s *Server) getJobStreams(ctx context.Context, _ call) (any, error) {
	return s.cluster.JobStreams(ctx)
}

// JobStreams implements Cluster.
func (c *Client) JobStreams(ctx context.Context) (JobStreams, error) {
	return ask[JobStreams](ctx, c, http.MethodGet, "/admin/v1/jobs/streams", nil, nil)
}

// JobsCheck is the answer when they do.
type JobsCheck struct {
	Agree bool `json:"agree"`
}

func (s *Server) postJobsCheck(ctx context.Context, _ call) (any, error) {
	if err := s.cluster.CheckJobs(ctx); err != nil {
		return nil, err
	}
	return JobsCheck{Agree: true}, nil
}

// CheckJobs implements Cluster.
func (c *Client) CheckJobs(ctx context.Context) error {
	_, err := ask[JobsCheck](ctx, c, http.MethodPost, "/admin/v1/jobs/check", nil, nil)
	return err
}
