package gateway

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"time"

	"github.com/dsnode/dsnode/node/jobs"
	"github.com/dsnode/dsnode/node/openai"
	"github.com/dsnode/dsnode/node/shares"
	"github.com/dsnode/dsnode/storage/journal"
)

func unknownJob(id string) *failure {
	return invalid(http.StatusNotFound, "job_not_found", fmt.Sprintf("No job `%s` is known here. It may still be on its way from another site.", printable(id)))
}

func badParameter(name, what string) *failure {
	f := invalid(http.StatusBadRequest, "invalid_parameter", strings.TrimSpace("The parameter "+printable(name)+" "+what+"."))
	f.param = printable(name)
	return f
}

func unknownParameter(name string) *failure {
	return badParameter(name, "is not known")
}

func laterOn(code, message string, after time.Duration) *failure {
	return &failure{status: http.StatusServiceUnavailable, kind: openai.Overloaded, code: code, message: message, retryAfter: after}
}

// sentence makes an error's text a sentence.
func sentence(err error) string {
	text := printable(err.Error())
	return strings.ToUpper(text[:1]) + text[1:] + "."
}

// explainJob turns an error of package jobs into what the caller is told; nil for nil.
func (x *exchange) explainJob(err error, who jobs.Caller) *failure {
	var (
		short *jobs.DurabilityError
		spent *shares.Error
	)
	switch {
	case err == nil:
		return nil
	case errors.As(err, &spent):
		f := tenantShare(spent)
		f.retryAfter = 5 * time.Second
		return f
	case errors.As(err, &short):
		f := laterOn("durability_timeout", fmt.Sprintf(
			"The job %s was written, but is not known to be as durable as %s after %s (it is: %s). It may exist and run: send it again with the same Idempotency-Key to find out.",
			short.ID, short.Wanted, short.After.Round(time.Millisecond), short.Has), time.Second)
		f.kind, f.param = openai.TimeoutError, "durability"
		return f
	case errors.Is(err, jobs.ErrImpossible):
		f := invalid(http.StatusBadRequest, "durability_impossible", sentence(err))
		f.param = "durability"
		return f
	case errors.Is(err, jobs.ErrKeyReused):
		return invalid(http.StatusUnprocessableEntity, "idempotency_key_reused", "The Idempotency-Key was used for a job with another body, or for one that is not kept any more. Use a new key.")
	case errors.Is(err, jobs.ErrNotFinal):
		return invalid(http.StatusConflict, "job_not_finished", sentence(err)+" Cancel it first.")
	case errors.Is(err, jobs.ErrNotRetryable):
		return invalid(http.StatusConflict, "job_not_retryable", sentence(err))
	case errors.Is(err, jobs.ErrBadCursor):
		return invalid(http.StatusBadRequest, "invalid_cursor", "This node does not know the job in after or before.")
	case errors.Is(err, journal.ErrTooLarge):
		return tooLarge(journal.MaxPayload)
	case errors.Is(err, jobs.ErrBusy):
		return laterOn("too_many_jobs", "As many jobs wait at this node as it may hold. Please try again later.", 5*time.Second)
	case errors.Is(err, jobs.ErrNotReady):
		return laterOn("jobs_not_ready", "This node can't take jobs yet. Please try again later.", time.Second)
	case errors.Is(err, jobs.ErrNoStream):
		return laterOn("jobs_not_ready", sentence(jobs.ErrNoStream)+" A job could not start here. Please ask another node, or try again later.", 5*time.Second)
	case errors.Is(err, jobs.ErrPartial):
		return laterOn("jobs_unavailable", sentence(jobs.ErrPartial)+" Please ask another node, or try again later.", 5*time.Second)
	case errors.Is(err, jobs.ErrUnavailable):
		x.g.log.LogAttrs(context.WithoutCancel(x.r.Context()), slog.LevelWarn, "could not write a job",
			slog.String("request", x.id), slog.Any("err", err))
		return laterOn("jobs_unavailable", "This node can't write jobs now. Please try again later, or at another site.", 5*time.Second)
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return shed("The request took too long.")
	}
	x.g.log.LogAttrs(context.WithoutCancel(x.r.Context()), slog.LevelError, "job request failed",
		slog.String("request", x.id), slog.Bool("operator", who.Operator), slog.Any("err", err))
	return explain(err, "")
}
