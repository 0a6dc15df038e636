package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/dsnode/dsnode/node/admin"
)

func newJobCommand(env *environment) *cobra.Command {
	return newGroup("job", "Submit, show and change asynchronous jobs",
		newJobSubmitCommand(env),
		newJobGetCommand(env),
		newJobListCommand(env),
		newJobWaitCommand(env),
		newJobCancelCommand(env),
		newJobRetryCommand(env),
		newJobDeleteCommand(env),
	)
}

// maxRequest bounds the file of a request. Nodes have their own bound.
const maxRequest = 64 << 20

// jobSubmission is the body of POST /v1/jobs.
type jobSubmission struct {
	Endpoint      string          `json:"endpoint"`
	Body          json.RawMessage `json:"body"`
	Durability    string          `json:"durability,omitempty"`
	MinDurability string          `json:"min_durability,omitempty"`
	Priority      int             `json:"priority"`
	ExpiresIn     string          `json:"expires_in,omitempty"`
}

func newJobSubmitCommand(env *environment) *cobra.Command {
	var j jobSubmission
	var tenant, key string
	var wait bool
	cmd := &cobra.Command{
		Use:   "submit FILE",
		Short: "Submit a request as a job",
		Long: "Submit a request as a job. FILE has the body that you would send to the endpoint (- reads stdin). The job's ID\n" +
			"is written to stdout. With --idempotency-key a repeated request is the same job.",
		Example: "  echo '{\"model\":\"deepseek-chat\",\"messages\":[{\"role\":\"user\",\"content\":\"hello\"}]}' | dsnode job submit --wait -",
		Args:    takes("a FILE with the request (- for stdin)"),
	}
	f := cmd.Flags()
	f.StringVar(&j.Endpoint, "endpoint", "/v1/chat/completions", "`PATH` of the request")
	f.StringVar(&j.Durability, "durability", "", "`LEVEL`, where the job must be on disk before it is accepted: node, site, two-sites or two-cities (default as configured)")
	f.StringVar(&j.MinDurability, "min-durability", "", "`LEVEL` that is enough when --durability can't be reached in time")
	f.IntVar(&j.Priority, "priority", 0, "`N`, 0 to 9; 9 runs first")
	f.StringVar(&j.ExpiresIn, "expires-in", "", "`TIME` within which the job must start, such as 90s, 1h or 2d (default as configured)")
	f.StringVar(&key, "idempotency-key", "", "`KEY` that identifies this request when it is repeated")
	f.StringVar(&tenant, "tenant", "", "`TENANT` that the job belongs to")
	f.BoolVar(&wait, "wait", false, "wait until the job has ended, and show its result")
	return onCluster(env, cmd, func(ctx context.Context, s *session, args []string) error {
		text, err := readRequest(env, args[0])
		if err != nil {
			return err
		}
		j.Body = text
		body, err := json.Marshal(j)
		if err != nil {
			return failure("the file must contain one JSON object", "%s is not JSON: %w", shownName(args[0]), err)
		}
		job, err := s.SubmitJob(ctx, tenant, key, body)
		if err != nil {
			return err
		}
		if wait {
			say(env.stderr, "job", job.ID+" is accepted, durability "+job.Durability)
			return waitForJob(ctx, s, job.ID, 0)
		}
		return showAccepted(s, job)
	})
}

func showAccepted(s *session, job admin.Job) error {
	return s.show(job, func(w io.Writer) error {
		say(s.env.stderr, "done", "accepted, durability "+job.Durability)
		return emit(w, "%s\n", printable(job.ID))
	})
}

func readRequest(env *environment, file string) ([]byte, error) {
	from := env.stdin
	if file != "-" {
		f, err := os.Open(file) //nolint:gosec // the user named it
		if err != nil {
			return nil, failure("check the file's name", "read the request: %w", err)
		}
		defer func() { _ = f.Close() }() // only read from
		from = f
	}
	text, err := io.ReadAll(io.LimitReader(from, maxRequest+1))
	switch {
	case err != nil:
		return nil, failure("check the file or the pipe", "read the request: %w", err)
	case len(text) > maxRequest:
		return nil, failure("send a smaller request", "the request has more than %d bytes", maxRequest)
	}
	return text, nil
}

func newJobGetCommand(env *environment) *cobra.Command {
	cmd := &cobra.Command{Use: "get ID", Short: "Show a job and its result", Args: takes("the job's ID")}
	return onCluster(env, cmd, func(ctx context.Context, s *session, args []string) error {
		job, err := s.Job(ctx, args[0])
		if err != nil {
			return err
		}
		return showJob(s, job)
	})
}

func showJob(s *session, job admin.Job) error {
	return s.show(job, func(w io.Writer) error { return jobText(w, s.env.palette(), job) })
}

func jobText(w io.Writer, p palette, j admin.Job) error {
	v := jobStatus(j.Status)
	if err := emit(w, "%s: %s\n", printable(j.ID), p.paint(v.colour, printable(v.text))); err != nil {
		return err
	}
	g := &grid{heads: []string{"WHAT", ""}}
	line := func(what, text string) {
		if text != "" {
			g.add(plain(what), plain(text))
		}
	}
	line("endpoint", j.Endpoint)
	line("model", j.Model)
	line("tenant", j.Tenant)
	line("accepted by", j.Site)
	line("durability", j.Durability)
	line("priority", fmt.Sprint(j.Priority))
	line("attempts", fmt.Sprint(j.Attempts))
	line("executed by", j.ExecutedBy)
	line("created", unixTime(j.CreatedAt))
	line("started", unixTime(j.StartedAt))
	line("finished", unixTime(j.FinishedAt))
	line("expires", unixTime(j.ExpiresAt))
	line("retry of", j.RetryOf)
	if j.CancelRequested {
		line("cancel", "requested")
	}
	if j.Conflict {
		line("idempotency", "its key was also used for another request")
	}
	line("error", string(j.Error))
	if err := g.write(w, p); err != nil || len(j.Result) == 0 {
		return err
	}
	return emit(w, "\n%s\n", printable(string(j.Result)))
}

func unixTime(t int64) string {
	if t == 0 {
		return ""
	}
	return time.Unix(t, 0).UTC().Format(time.RFC3339)
}

func jobStatus(status string) cell {
	switch status {
	case "succeeded":
		return cell{status, green}
	case "failed", "expired", "cancelled":
		return cell{status, red}
	}
	return cell{status, yellow}
}

func newJobListCommand(env *environment) *cobra.Command {
	var q admin.JobQuery
	cmd := &cobra.Command{
		Use: "list", Short: "List jobs, newest first", Args: takes(),
		Example: "  dsnode job list --status failed,expired --tenant search",
	}
	f := cmd.Flags()
	f.StringSliceVar(&q.Status, "status", nil, "only jobs with these `STATUS,…`: queued, running, succeeded, failed, cancelled, expired")
	f.StringVar(&q.Tenant, "tenant", "", "only jobs of this `TENANT`")
	f.StringVar(&q.After, "after", "", "only jobs older than the one with this `ID`")
	f.StringVar(&q.Before, "before", "", "only jobs newer than the one with this `ID`")
	f.IntVar(&q.Limit, "limit", 20, "at most `N` jobs, 1 to 100")
	return onCluster(env, cmd, func(ctx context.Context, s *session, _ []string) error {
		page, err := s.Jobs(ctx, q)
		if err != nil {
			return err
		}
		return s.show(page, func(w io.Writer) error {
			g := &grid{heads: []string{"JOB", "STATUS", "TENANT", "MODEL", "SITE", "PRIO", "TRIES", "CREATED"}}
			for _, j := range page.Data {
				g.add(plain(j.ID), jobStatus(j.Status), plain(j.Tenant), plain(j.Model), plain(j.Site),
					plain(fmt.Sprint(j.Priority)), plain(fmt.Sprint(j.Attempts)), plain(unixTime(j.CreatedAt)))
			}
			if err := g.write(w, env.palette()); err != nil || !page.HasMore || page.LastID == nil {
				return err
			}
			say(env.stderr, "more", "dsnode job list --after "+*page.LastID)
			return nil
		})
	})
}

func newJobWaitCommand(env *environment) *cobra.Command {
	var atMost span
	cmd := &cobra.Command{
		Use: "wait ID", Short: "Wait until a job has ended, and show its result",
		Long: "Wait until a job has ended, and show its result.\n\n" +
			"Exit code 0: the job succeeded. 1: it did not succeed, or did not end in time.",
		Args: takes("the job's ID"),
	}
	cmd.Flags().Var(&atMost, "for", "`TIME` to wait at most, such as 30s or 2h (default no limit)")
	return onCluster(env, cmd, func(ctx context.Context, s *session, args []string) error {
		return waitForJob(ctx, s, args[0], time.Duration(atMost))
	})
}

const (
	askJobFirst = 50 * time.Millisecond
	askJobEvery = time.Second
	// jobLost is how long the wait goes on while no node answers or knows the job.
	jobLost = time.Minute
)

// waitForJob polls until the job has ended, with pauses that grow to one second.
func waitForJob(ctx context.Context, s *session, id string, atMost time.Duration) error {
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	began := time.Now()
	good := began
	for pause := askJobFirst; ; pause = min(pause*2, askJobEvery) {
		job, err := s.Job(ctx, id)
		now := time.Now()
		var refused *admin.Error
		unknown := errors.As(err, &refused) && refused.Code == "job_not_found"
		switch {
		case ctx.Err() != nil:
			return failure("dsnode job wait "+id+" waits again, dsnode job cancel "+id+" cancels it", "the job %s has not ended", id)
		case err == nil && job.Final():
			if err := showJob(s, job); err != nil {
				return err
			}
			if job.Status != "succeeded" {
				return quietly(exitFailed)
			}
			return nil
		case err == nil:
			good = now
		case now.Sub(good) > jobLost, unknown && good.Equal(began), !unknown && !errors.Is(err, admin.ErrUnreachable) && !tooEarly(refused):
			return err
		}
		if atMost > 0 && now.Sub(began) >= atMost {
			status := "not known"
			if err == nil {
				status = job.Status
			}
			return failure("dsnode job get "+id+" shows it, dsnode job wait "+id+" waits again", "the job %s is %s after %s", id, status, atMost)
		}
		if atMost > 0 {
			pause = max(min(pause, atMost-now.Sub(began)), time.Millisecond)
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
	}
}

// tooEarly reports whether a node refused because it is starting, stopping or busy.
func tooEarly(e *admin.Error) bool {
	return e != nil && (e.Code == "jobs_not_ready" || e.Code == "overloaded" || e.Code == "busy" || e.Code == "stopping")
}

func newJobCancelCommand(env *environment) *cobra.Command {
	cmd := &cobra.Command{
		Use: "cancel ID", Short: "Cancel a job that has not ended",
		Long: "Cancel a job that has not ended. The node that owns the job cancels it, so it may take a moment.",
		Args: takes("the job's ID"),
	}
	return onCluster(env, cmd, func(ctx context.Context, s *session, args []string) error {
		job, err := s.CancelJob(ctx, args[0])
		if err != nil {
			return err
		}
		return s.show(job, func(io.Writer) error {
			text := "is " + job.Status
			if !job.Final() {
				text += "; the node that owns it is asked to cancel it"
			}
			say(env.stderr, "done", args[0]+" "+text)
			return nil
		})
	})
}

func newJobRetryCommand(env *environment) *cobra.Command {
	cmd := &cobra.Command{
		Use: "retry ID", Short: "Submit a failed, expired or cancelled job again",
		Long: "Submit a failed, expired or cancelled job again, as a new job. The new job's ID is written to stdout.",
		Args: takes("the job's ID"),
	}
	return onCluster(env, cmd, func(ctx context.Context, s *session, args []string) error {
		job, err := s.RetryJob(ctx, args[0])
		if err != nil {
			return err
		}
		return showAccepted(s, job)
	})
}

func newJobDeleteCommand(env *environment) *cobra.Command {
	cmd := &cobra.Command{Use: "delete ID", Short: "Delete a job that has ended", Args: takes("the job's ID")}
	return onCluster(env, cmd, func(ctx context.Context, s *session, args []string) error {
		return s.done(s.DeleteJob(ctx, args[0]), "%s is deleted", strings.TrimSpace(args[0]))
	})
}
