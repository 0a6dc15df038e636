package jobs

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/http/httptrace"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/dsnode/dsnode/cluster/clock"
	"github.com/dsnode/dsnode/node/openai"
	"github.com/dsnode/dsnode/node/serving"
	"github.com/dsnode/dsnode/storage/jobtable"
	"github.com/dsnode/dsnode/storage/journal"
	"github.com/dsnode/dsnode/storage/keyring"
)

const (
	// MaxResult bounds the result of a job.
	MaxResult = 16 << 20
	// maxError bounds an error object, so that records stay small.
	maxError = 16 << 10

	backoffFirst = 2 * time.Second
	backoffMost  = 5 * time.Minute
	// journalWait is the pause before a record is written again that the journal refused,
	// permitWait the pause before a job without a permit is tried again.
	journalWait = time.Second
	permitWait  = 250 * time.Millisecond
)

// attempt runs a job once, and returns what happens to it next. The record of the start is
// on disk before an upstream gets the request. So an attempt that a crash interrupts counts,
// and a job that kills its node does so at most max_attempts times.
//
// ctx ends when the job is cancelled, work when the node stops: records are still written
// after ctx has ended. started is called when the record of the start is on disk.
func (x *executor) attempt(work, ctx context.Context, e *entry, started func()) step {
	row, sub, next, ok := x.read(e)
	if !ok {
		return next
	}
	attempt := max(row.Attempts(), e.attempts) + 1
	if int(attempt) > x.o.config().MaxAttempts {
		return x.exhausted(work, e, row)
	}
	p, err := x.streams.check(e.stream)
	if err != nil {
		x.block(e.lane, permitWait)
		return again(permitWait)
	}
	x.mu.Lock()
	e.running.token = p.token
	x.mu.Unlock()
	rec := x.record(e, p.token, attempt)
	rec.Kind = journal.Started
	if _, err := x.o.Journal.Append(work, rec.Stream, []journal.Record{rec}); err != nil {
		x.log.Warn("can't write the start of a job", "job", e.id, "err", err)
		return again(journalWait)
	}
	started()
	e.attempts = attempt
	if attempt == 1 {
		x.metrics.wait.Observe(max(0, x.o.Host.Now().Sub(e.accepted)).Seconds())
	}
	out, delay, label := x.ask(ctx, e, sub, p)
	x.metrics.attempts.WithLabelValues(label).Inc()
	return x.conclude(work, e, p.token, attempt, out, delay)
}

// read reads a job. If ok is false there is nothing to do now, and next is the next step.
func (x *executor) read(e *entry) (row jobtable.Row, sub *journal.Submission, next step, ok bool) {
	row, known, err := x.o.Table.Get(e.id)
	if err != nil || !known {
		x.log.Error("can't read the row of a job", "job", e.id, "err", err)
		return row, nil, again(journalWait), false
	}
	rec, submitted := row.Submitted()
	if !submitted || row.Status().Final() {
		return row, nil, finished, false
	}
	if x.o.Table.Partial() && (x.o.Table.Rebuilding() || !x.mayStart(row)) {
		return row, nil, again(journalWait), false // the record of its end may be missing
	}
	opened, err := x.o.Sealer.OpenSubmission(&rec)
	if err != nil {
		x.log.Error("can't decrypt a job", "job", e.id, "err", err)
		return row, nil, again(10 * journalWait), false
	}
	return row, &opened, step{}, true
}

// mayStart reports whether a partial table has the end of a job if it has ended: one that was
// accepted in the stream that this node writes now, and nobody else owned.
func (x *executor) mayStart(row jobtable.Row) bool {
	return !slices.ContainsFunc(row.AcceptedBy(), func(s journal.Stream) bool { return !x.streams.ours(s) })
}

// parse reads the request of a job as the gateway does.
func parse(sub *journal.Submission) (openai.Request, error) {
	endpoint := openai.EndpointAt(sub.Endpoint)
	if endpoint == nil {
		return openai.Request{}, fmt.Errorf("unknown endpoint %s", sub.Endpoint)
	}
	return openai.Parse(endpoint, sub.Body)
}

// record makes a record of this job, in the stream that this node writes now.
func (x *executor) record(e *entry, token journal.Token, attempt uint32) journal.Record {
	s, _, _ := x.streams.current() // a stream exists before jobs run
	return journal.Record{Stream: s, Token: token, Job: e.id, Attempt: attempt}
}

// ask sends the request and classifies the answer. out is the job's end, delay says when to
// try again. Both are nil if another owner or the next start of this node continues.
func (x *executor) ask(ctx context.Context, e *entry, sub *journal.Submission, p permit) (out *journal.Outcome, delay *journal.Delay, label string) {
	parsed, err := parse(sub)
	if err != nil { // another version of dsnode may have accepted it
		return x.failed(0, errorObject(openai.InvalidRequest, "invalid_body", err.Error())), nil, "invalid"
	}
	req := serving.Request{
		Request: parsed, ID: fmt.Sprintf("%s-%d", e.id, e.attempts), Header: http.Header{"Accept": {"application/json"}},
		Principal: serving.Principal{KeyID: sub.KeyID, Tenant: sub.Tenant, Models: sub.Models},
	}

	asking, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var late atomic.Bool
	permitted := func() bool { return x.streams.still(asking, e.stream, p) }
	if !permitted() { // writing the start took too long
		return nil, &journal.Delay{Error: lostPermit}, "no_permit"
	}
	// After GotConn the request is sent. Each upstream that gets it counts as a start.
	asking = httptrace.WithClientTrace(asking, &httptrace.ClientTrace{GotConn: func(httptrace.GotConnInfo) {
		if !permitted() {
			late.Store(true)
			cancel(errLateStart)
		}
	}})
	sink := &collector{}
	err = x.o.Server.Serve(asking, req, sink)
	cause := context.Cause(ctx)
	switch {
	case late.Load():
		x.metrics.late.Inc()
		x.log.Warn("a start was no longer permitted, its result is not used", "job", e.id, "attempt", e.attempts)
		return nil, &journal.Delay{Error: lostPermit}, "late"
	case errors.Is(cause, errLateResult), errors.Is(cause, errSuperseded):
		return nil, nil, "superseded"
	case err == nil:
		return &journal.Outcome{Status: journal.Succeeded, Code: sink.head.Status, Body: sink.body}, nil, "succeeded"
	case errors.Is(cause, errCancelAsked):
		return &journal.Outcome{Status: journal.Cancelled}, nil, "cancelled"
	case cause != nil:
		return nil, nil, "cut_off" // this node continues after its next start
	}
	v := classify(err)
	if !v.again {
		return x.failed(v.code, v.object), nil, "failed"
	}
	return nil, &journal.Delay{Error: v.object, NotBefore: x.o.Host.Now().Add(max(v.after, backoff(e.attempts)))}, "retryable"
}

var lostPermit = errorObject(openai.ServerError, "late_start", "The node lost its permit to run the job.")

func (x *executor) failed(code int, object string) *journal.Outcome {
	return &journal.Outcome{Status: journal.Failed, Code: code, Error: object}
}

// conclude writes the end of an attempt.
func (x *executor) conclude(work context.Context, e *entry, token journal.Token, attempt uint32, out *journal.Outcome, delay *journal.Delay) step {
	x.mu.Lock()
	late := e.running.late
	e.running.writing = late == nil && (out != nil || delay != nil)
	x.mu.Unlock()
	if late != nil {
		adopted, err := x.o.Sealer.OpenOutcome(late)
		if err != nil {
			x.log.Error("can't decrypt the result of an earlier owner, it is not written again", "job", e.id, "err", err)
			return finished
		}
		adopted.Adopted = true
		x.log.Info("kept the result of an earlier owner", "job", e.id)
		return x.finish(work, e, token, attempt, &adopted)
	}
	if delay != nil {
		if int(attempt) >= x.o.config().MaxAttempts {
			out, delay = x.failed(0, delay.Error), nil
		} else if delay.NotBefore.IsZero() {
			delay.NotBefore = x.o.Host.Now().Add(backoff(attempt))
		}
	}
	switch {
	case out != nil:
		return x.finish(work, e, token, attempt, out)
	case delay != nil:
		rec := x.record(e, token, attempt)
		if err := x.write(work, &rec, func() error { return x.o.Sealer.SealDelay(&rec, delay) }); err != nil {
			return leftAlone
		}
		return step{notBefore: delay.NotBefore}
	}
	return leftAlone
}

// finish writes the end of a job, with the token of its start.
func (x *executor) finish(work context.Context, e *entry, token journal.Token, attempt uint32, out *journal.Outcome) step {
	if !out.Adopted {
		out.Site = x.o.Site
		out.Epoch = x.o.State().Primary.Epoch
	}
	rec := x.record(e, token, attempt)
	err := x.write(work, &rec, func() error { return x.o.Sealer.SealOutcome(&rec, out) })
	if errors.Is(err, journal.ErrTooLarge) {
		out = x.failed(out.Code, errorObject(openai.ServerError, "result_too_large", "The result is too large to be stored."))
		err = x.write(work, &rec, func() error { return x.o.Sealer.SealOutcome(&rec, out) })
	}
	if err != nil {
		x.log.Error("can't write the end of a job, it will run again", "job", e.id, "err", err)
		return leftAlone
	}
	x.log.Debug("job ended", "job", e.id, "status", out.Status, "attempt", attempt)
	return finished
}

// end writes the end of a job that does not run, because it was cancelled or has expired.
func (x *executor) end(work context.Context, e *entry) step {
	row, _, next, ok := x.read(e)
	if !ok {
		return next
	}
	p, err := x.streams.check(e.stream)
	if err != nil || !p.inTime() {
		x.block(e.lane, permitWait)
		return again(permitWait)
	}
	x.mu.Lock()
	e.running.token, e.running.writing = p.token, true
	cancelled := e.cancel
	x.mu.Unlock()
	out := &journal.Outcome{Status: journal.Cancelled}
	if !cancelled {
		out.Status, out.Error = journal.Expired, x.lastError(row)
	}
	return x.finish(work, e, p.token, row.Attempts(), out)
}

// exhausted ends a job whose last allowed attempt was interrupted by the end of its node.
func (x *executor) exhausted(work context.Context, e *entry, row jobtable.Row) step {
	p, err := x.streams.check(e.stream)
	if err != nil || !p.inTime() {
		x.block(e.lane, permitWait)
		return again(permitWait)
	}
	object := x.lastError(row)
	if object == "" {
		object = errorObject(openai.ServerError, "attempts_exhausted", "The job was started as often as max_attempts allows and never ended.")
	}
	x.mu.Lock()
	e.running.token, e.running.writing = p.token, true
	x.mu.Unlock()
	return x.finish(work, e, p.token, row.Attempts(), x.failed(0, object))
}

// lastError is the error of the previous attempt; empty: there is none.
func (x *executor) lastError(row jobtable.Row) string {
	current, ok := row.Current()
	if !ok || current.Kind != journal.Retrying {
		return ""
	}
	delay, err := x.o.Sealer.OpenDelay(&current)
	if err != nil {
		return ""
	}
	return delay.Error
}

// write encrypts and appends a record. It tries again as long as the journal is full or the
// node has no data key, because a lost result costs more than a waiting goroutine. It gives
// up when the node stops or the journal has failed.
func (x *executor) write(work context.Context, r *journal.Record, seal func() error) error {
	for {
		err := seal()
		if err == nil {
			_, err = x.o.Journal.Append(work, r.Stream, []journal.Record{*r})
		}
		now, _, _ := x.streams.current()
		switch {
		case err == nil:
			return nil
		case errors.Is(err, journal.ErrFrozen) && now != r.Stream: // this node began a new stream meanwhile
			r.Stream = now
			continue
		case journal.Refused(err), errors.Is(err, keyring.ErrNoDataKey):
			x.log.Warn("can't write a record of a job yet", "job", r.Job, "err", err)
		default:
			return err
		}
		if clock.Sleep(work, journalWait) != nil {
			return err
		}
	}
}

// backoff is exponential, and half of it is random.
func backoff(attempt uint32) time.Duration {
	d := backoffMost
	if n := attempt - 1; n < 10 {
		d = min(d, backoffFirst<<n)
	}
	return d/2 + rand.N(d/2+1) //nolint:gosec // not a secret
}

// verdict says what an error of the pipeline means for a job.
type verdict struct {
	again  bool          // the job may be tried again
	after  time.Duration // not before
	code   int
	object string // OpenAI's error object, JSON
}

func classify(err error) verdict {
	var (
		status *serving.StatusError
		busy   *serving.BusyError
	)
	switch {
	case errors.Is(err, errTooLarge):
		return verdict{code: http.StatusOK, object: errorObject(openai.ServerError, "result_too_large", "The result is larger than the limit of 16 MiB.")}
	case errors.As(err, &status):
		v := verdict{code: status.Status, object: upstreamError(status)}
		switch s := status.Status; {
		case s == http.StatusTooManyRequests, s == http.StatusRequestTimeout, s == http.StatusConflict, s == http.StatusTooEarly, s >= http.StatusInternalServerError:
			v.again, v.after = true, retryAfter(status.Header)
		}
		return v
	case errors.As(err, &busy):
		return verdict{again: true, after: busy.RetryAfter, object: errorObject(openai.Overloaded, "no_upstream", "No model server could answer.")}
	case errors.Is(err, serving.ErrUnknownModel):
		return verdict{code: http.StatusNotFound, object: errorObject(openai.InvalidRequest, "model_not_found", "The model does not exist any more, or the key may not use it.")}
	case errors.Is(err, serving.ErrTimeout):
		return verdict{again: true, object: errorObject(openai.TimeoutError, "upstream_timeout", "The model server did not answer in time.")}
	}
	return verdict{again: true, object: errorObject(openai.ServerError, "upstream_failed", "The model server failed to answer: "+err.Error())}
}

func retryAfter(h map[string][]string) time.Duration {
	n, err := strconv.Atoi(http.Header(h).Get("Retry-After"))
	if err != nil || n < 0 {
		return 0
	}
	return min(time.Duration(n)*time.Second, time.Hour)
}

// upstreamError is the error object in an upstream's answer, or one made from its text.
func upstreamError(e *serving.StatusError) string {
	if object, ok := openai.ErrorObject(e.Body); ok && len(object) <= maxError {
		return string(object)
	}
	text := string(e.Body)
	if text == "" {
		text = e.Error()
	}
	return errorObject(openai.ServerError, "upstream_refused", text)
}

// errorObject is an error object in OpenAI's format.
func errorObject(kind, code, message string) string {
	if len(message) > maxError/8 { // JSON escapes can make it six times as long
		message = message[:maxError/8]
	}
	e := openai.Error{Message: strings.ToValidUTF8(message, "�"), Type: kind, Code: code}
	return string(e.Object())
}

var errTooLarge = errors.New("the result is too large")

// collector is a sink that collects the answer.
type collector struct {
	head serving.Head
	body []byte
}

// Head implements serving.Sink.
func (c *collector) Head(h serving.Head) error {
	c.head = h
	switch {
	case h.Stream:
		return errors.New("the answer to a job is a stream")
	case h.Length > MaxResult:
		return errTooLarge
	case h.Length > 0:
		c.body = make([]byte, 0, h.Length)
	}
	return nil
}

// Data implements serving.Sink.
func (c *collector) Data(b []byte) error {
	if len(c.body)+len(b) > MaxResult {
		return errTooLarge
	}
	c.body = append(c.body, b...)
	return nil
}
