package admin

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/dsnode/dsnode/cluster/agreed"
)

// jobs serves the job routes of the client API to operators, for all tenants.
func (s *Server) jobs(routes http.Handler) http.Handler {
	routes = http.StripPrefix("/admin", routes)
	return s.authorized(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		routes.ServeHTTP(w, r)
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			s.log.LogAttrs(r.Context(), slog.LevelInfo, "operator's request about a job",
				slog.String("method", r.Method), slog.String("path", r.URL.Path), slog.String("remote", r.RemoteAddr))
		}
	}))
}

// Job is an asynchronous job as the job routes show it. Times are Unix seconds; 0: not
// yet.
type Job struct {
	ID              string          `json:"id"`
	Object          string          `json:"object"`
	Status          string          `json:"status"` // queued, running, succeeded, failed, cancelled, expired
	Site            string          `json:"site"`
	Durability      string          `json:"durability"`
	CreatedAt       int64           `json:"created_at"`
	Endpoint        string          `json:"endpoint,omitempty"`
	Model           string          `json:"model,omitempty"`
	Priority        int             `json:"priority"`
	Attempts        int             `json:"attempts"`
	ExpiresAt       int64           `json:"expires_at,omitempty"`
	StartedAt       int64           `json:"started_at,omitempty"`
	FinishedAt      int64           `json:"finished_at,omitempty"`
	ExecutedBy      string          `json:"executed_by,omitempty"`
	Epoch           uint64          `json:"epoch,omitempty"`
	RetryOf         string          `json:"retry_of,omitempty"`
	Tenant          string          `json:"tenant,omitempty"`
	CancelRequested bool            `json:"cancel_requested,omitempty"`
	Conflict        bool            `json:"idempotency_conflict,omitempty"`
	Error           json.RawMessage `json:"error,omitempty"`
	Result          json.RawMessage `json:"result,omitempty"`
}

// Final reports whether the job has ended.
func (j *Job) Final() bool { return j.Status != "queued" && j.Status != "running" }

// JobPage is a page of the list of jobs, newest first, without results.
type JobPage struct {
	Object  string  `json:"object"`
	Data    []Job   `json:"data"`
	FirstID *string `json:"first_id"`
	LastID  *string `json:"last_id"`
	HasMore bool    `json:"has_more"`
}

// JobQuery selects the jobs that Jobs returns. A zero value does not restrict them.
type JobQuery struct {
	Status        []string
	Tenant        string
	After, Before string
	Limit         int
}

const jobsPath = "/admin/v1/jobs"

// SubmitJob submits a job for a tenant; body is the body of POST /v1/jobs. With an
// idempotency key it may be repeated.
func (c *Client) SubmitJob(ctx context.Context, tenant, idempotencyKey string, body []byte) (Job, error) {
	return jobErr(ask[Job](ctx, c, http.MethodPost, jobsPath, given("tenant", tenant, "idempotency_key", idempotencyKey), body))
}

// Job returns a job with its result.
func (c *Client) Job(ctx context.Context, id string) (Job, error) {
	return jobErr(ask[Job](ctx, c, http.MethodGet, jobPath(id), nil, nil))
}

// Jobs returns a page of the jobs.
func (c *Client) Jobs(ctx context.Context, q JobQuery) (JobPage, error) {
	limit := ""
	if q.Limit > 0 {
		limit = strconv.Itoa(q.Limit)
	}
	return jobErr(ask[JobPage](ctx, c, http.MethodGet, jobsPath,
		given("status", strings.Join(q.Status, ","), "tenant", q.Tenant, "after", q.After, "before", q.Before, "limit", limit), nil))
}

// CancelJob asks to cancel a job, and returns its state then.
func (c *Client) CancelJob(ctx context.Context, id string) (Job, error) {
	return jobErr(ask[Job](ctx, c, http.MethodPost, jobPath(id)+"/cancel", nil, nil))
}

// RetryJob submits a job again that failed, expired or was cancelled, and returns the
// new job.
func (c *Client) RetryJob(ctx context.Context, id string) (Job, error) {
	return jobErr(ask[Job](ctx, c, http.MethodPost, jobPath(id)+"/retry", nil, nil))
}

// DeleteJob deletes a job that has ended.
func (c *Client) DeleteJob(ctx context.Context, id string) error {
	_, err := jobErr(ask[struct{}](ctx, c, http.MethodDelete, jobPath(id), nil, nil))
	return err
}

func jobPath(id string) string { return jobsPath + "/" + url.PathEscape(id) }

func given(pairs ...string) url.Values {
	q := url.Values{}
	for i := 0; i+1 < len(pairs); i += 2 {
		if pairs[i+1] != "" {
			q.Set(pairs[i], pairs[i+1])
		}
	}
	return q
}

// jobHints are the hints for refusals of the job routes, which have none.
var jobHints = map[string]string{
	"job_not_found":          "it may have been deleted after its retention; dsnode job list shows the jobs",
	"job_not_finished":       "cancel it first with dsnode job cancel ID",
	"job_not_retryable":      "dsnode job submit submits a new job",
	"durability_timeout":     "dsnode status shows which sites can be reached; submit it again with the same --idempotency-key, or with --min-durability",
	"durability_impossible":  "dsnode node list shows the nodes and their sites",
	"idempotency_key_reused": "use another --idempotency-key",
	"too_many_jobs":          "try again later, or at another site",
	"jobs_not_ready":         "try again in a few seconds",
	"jobs_unavailable":       "the node's log says more; try another node with --admin",
	"model_not_found":        "dsnode config get shows the models",
}

func jobErr[T any](value T, err error) (T, error) {
	var refused *Error
	if errors.As(err, &refused) && refused.Hint == "" {
		refused.Hint = jobHints[refused.Code]
	}
	return value, err
}

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
