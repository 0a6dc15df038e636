package admin

import (
	"context"
	"net/http"
)

// JobsChecker compares what a node keeps of jobs.
type JobsChecker interface {
	// CheckJobs is nil when the node's journals and its table of jobs agree.
	CheckJobs(ctx context.Context) error
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
