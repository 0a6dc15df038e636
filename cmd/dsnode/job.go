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
	return newGroup("job", "Asynchronous jobs",
		newJobSubmitCommand(env),
		newJobGetCommand(env),
		newJobListCommand(env),
		newJobWaitCommand(env),
		newJobCancelCommand(env),
		newJobRetryCommand(env),
		newJobDeleteCommand(env),
	)
}

// maxRequest bounds a request's file; nodes have a bound of their own.
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
		Long: "Submit a request as a job: FILE holds what you would send to the endpoint (- reads stdin). The job's id goes\n" +
			"to stdout. With --idempotency-key the same request is the same job, however often it is sent.",
		Example: "  echo '{\"model\":\"deepseek-chat\",\"messages\":[{\"role\":\"user\",\"content\":\"hello\"}]}' | dsnode job submit --wait -",
		Args:    takes("a FILE with the request (- for stdin)"),
	}
	f := cmd.Flags()
	f.StringVar(&j.Endpoint, "endpoint", "/v1/chat/completions", "`PATH` of the request")
	f.StringVar(&j.Durability, "durability", "", "where it must be on disk before it is accepted: node, site, two-sites or two-cities (default as configured)")
	f.StringVar(&j.MinDurability, "min-durability", "", "what is enough when that can't be had in time")
	f.IntVar(&j.Priority, "priority", 0, "0 to 9, 9 comes first")
	f.StringVar(&j.ExpiresIn, "expires-in", "", "`TIME` in which it must have started, such as 90s, 1h or 2d (default as configured)")
	f.StringVar(&key, "idempotency-key", "", "a `KEY` of your own for this request")
	f.StringVar(&tenant, "tenant", "", "`TENANT` whose job it is")
	f.BoolVar(&wait, "wait", false, "wait for its end, and show the result")
	return onCluster(env, cmd, func(ctx context.Context, s *session, args []string) error {
		text, err := readRequest(env, args[0])
		if err != nil {
			return err
		}
		j.Body = text
		body, err := json.Marshal(j)
		if err != nil {
			return failure("put one JSON object there", "%s is not JSON: %w", shownName(args[0]), err)
		}
		job, err := s.SubmitJob(ctx, tenant, key, body)
		if err != nil {
			return err
		}
		if wait {
			say(env.stderr, "job", job.ID+" is accepted, durability "+job.Durability)
			return waitForJob(ctx, s, job.ID, 0)
		}
		return show(env.stdout, s.output, job, func(w io.Writer) error {
			say(env.stderr, "done", "accepted, durability "+job.Durability)
			return emit(w, "%s\n", printable(job.ID))
		})
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
		return nil, failure("", "read the request: %w", err)
	case len(text) > maxRequest:
		return nil, failure("", "the request has more than %d bytes", maxRequest)
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
	return show(s.env.stdout, s.output, job, func(w io.Writer) error { return jobText(w, s.env.palette(), job) })
}

func jobText(w io.Writer, p palette, j admin.Job) error {
	v := jobMood(j.Status)
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
		line("idempotency", "its key came with another request too")
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

func jobMood(status string) cell {
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
		Use: "list", Short: "List jobs, the newest first", Args: takes(),
		Example: "  dsnode job list --status failed,expired --tenant search",
	}
	f := cmd.Flags()
	f.StringSliceVar(&q.Status, "status", nil, "only these `STATUS`es: queued, running, succeeded, failed, cancelled, expired")
	f.StringVar(&q.Tenant, "tenant", "", "only the jobs of this `TENANT`")
	f.StringVar(&q.After, "after", "", "what is older than the job with this `ID`")
	f.StringVar(&q.Before, "before", "", "what is newer than the job with this `ID`")
	f.IntVar(&q.Limit, "limit", 20, "at most so many, 1 to 100")
	return onCluster(env, cmd, func(ctx context.Context, s *session, _ []string) error {
		page, err := s.Jobs(ctx, q)
		if err != nil {
			return err
		}
		return show(env.stdout, s.output, page, func(w io.Writer) error {
			g := &grid{heads: []string{"JOB", "STATUS", "TENANT", "MODEL", "SITE", "PRIO", "TRIES", "CREATED"}}
			for _, j := range page.Data {
				g.add(plain(j.ID), jobMood(j.Status), plain(j.Tenant), plain(j.Model), plain(j.Site),
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
		Use: "wait ID", Short: "Wait for a job's end, and show its result",
		Long: "Wait for a job's end, and show its result. Exit code 0: it succeeded. 1: it did not, or not in time.",
		Args: takes("the job's ID"),
	}
	cmd.Flags().Var(&atMost, "for", "how long to wait: 30s, 2h (default until it ends)")
	return onCluster(env, cmd, func(ctx context.Context, s *session, args []string) error {
		return waitForJob(ctx, s, args[0], time.Duration(atMost))
	})
}

const (
	askJobFirst = 50 * time.Millisecond
	askJobEvery = time.Second
	// jobLost is how long a job that is being waited for may be unknown, or nobody
	// there to say.
	jobLost = time.Minute
)

// waitForJob asks until the job has ended, soon at first, then each second.
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
			return failure("dsnode job wait "+id+" goes on waiting, dsnode job cancel "+id+" ends it", "the job %s goes on", id)
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
			return failure("dsnode job get "+id+" shows it", "the job %s is %s after %s", id, status, atMost)
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

// tooEarly is what a node says that begins or ends.
func tooEarly(e *admin.Error) bool {
	return e != nil && (e.Code == "jobs_not_ready" || e.Code == "overloaded" || e.Code == "busy" || e.Code == "stopping")
}

func newJobCancelCommand(env *environment) *cobra.Command {
	cmd := &cobra.Command{
		Use: "cancel ID", Short: "End a job that is not done",
		Long: "End a job that is not done. The node that owns it does it, which may take a moment when that is another one.",
		Args: takes("the job's ID"),
	}
	return onCluster(env, cmd, func(ctx context.Context, s *session, args []string) error {
		job, err := s.CancelJob(ctx, args[0])
		if err != nil {
			return err
		}
		return show(env.stdout, s.output, job, func(io.Writer) error {
			word := "is " + job.Status
			if !job.Final() {
				word += "; its owner is asked to end it"
			}
			say(env.stderr, "done", args[0]+" "+word)
			return nil
		})
	})
}

func newJobRetryCommand(env *environment) *cobra.Command {
	cmd := &cobra.Command{
		Use: "retry ID", Short: "Submit a job again that failed, expired or was cancelled",
		Long: "Submit a job again that failed, expired or was cancelled, as a new job. The new job's id goes to stdout.",
		Args: takes("the job's ID"),
	}
	return onCluster(env, cmd, func(ctx context.Context, s *session, args []string) error {
		job, err := s.RetryJob(ctx, args[0])
		if err != nil {
			return err
		}
		return show(env.stdout, s.output, job, func(w io.Writer) error {
			say(env.stderr, "done", "accepted, durability "+job.Durability)
			return emit(w, "%s\n", printable(job.ID))
		})
	})
}

func newJobDeleteCommand(env *environment) *cobra.Command {
	cmd := &cobra.Command{Use: "delete ID", Short: "Take a job away that is done", Args: takes("the job's ID")}
	return onCluster(env, cmd, func(ctx context.Context, s *session, args []string) error {
		if err := s.DeleteJob(ctx, args[0]); err != nil {
			return err
		}
		say(env.stderr, "done", strings.TrimSpace(args[0])+" is deleted")
		return nil
	})
}
