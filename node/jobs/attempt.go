package jobs

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/http/httptrace"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/dsnode/dsnode/node/openai"
	"github.com/dsnode/dsnode/node/serving"
	"github.com/dsnode/dsnode/storage/jobtable"
	"github.com/dsnode/dsnode/storage/journal"
	"github.com/dsnode/dsnode/storage/keyring"
)

const (
	// MaxResult bounds the answer that is kept of a job.
	MaxResult = 16 << 20
	// maxError bounds an error object, so that records stay small.
	maxError = 16 << 10

	backoffFirst = 2 * time.Second
	backoffMost  = 5 * time.Minute
	// journalWait is how soon a record is tried again that the journal had no
	// room for, or a job whose permit was missing.
	journalWait = time.Second
	permitWait  = 250 * time.Millisecond
)

// attempt begins a job once more, and gives what comes after it. The record of
// the start is on disk before anybody is asked; so an attempt that a crash cut
// off counts, and a job that kills its node does so max_attempts times at most.
//
// ctx ends when the job is called off, work when the node is: what has to be
// written is written all the same.
func (x *executor) attempt(work, ctx context.Context, e *entry) step {
	row, sub, next, ok := x.read(e)
	if !ok {
		return next
	}
	attempt := max(row.Attempts(), e.attempts) + 1
	if int(attempt) > x.o.config().MaxAttempts {
		return x.exhausted(work, e, row)
	}
	p, err := x.streams.check(e.home)
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
		x.log.Warn("a job's start can't be written", "job", e.id, "err", err)
		return again(journalWait)
	}
	e.attempts = attempt
	if attempt == 1 {
		x.metrics.wait.Observe(max(0, time.Since(e.accepted)).Seconds())
	}
	out, delay, label := x.ask(ctx, e, sub, p)
	x.metrics.attempts.WithLabelValues(label).Inc()
	return x.conclude(work, e, p.token, attempt, out, delay)
}

// read gives what is to be done; ok is false when nothing is.
func (x *executor) read(e *entry) (row jobtable.Row, sub *journal.Submission, next step, ok bool) {
	row, known, err := x.o.Table.Get(e.id)
	if err != nil || !known {
		x.log.Error("a job is not in the table", "job", e.id, "err", err)
		return row, nil, again(journalWait), false
	}
	rec, submitted := row.Submitted()
	if !submitted || row.Status().Final() {
		return row, nil, finished, false
	}
	opened, err := x.o.Sealer.OpenSubmission(&rec)
	if err != nil {
		x.log.Error("a job can't be read", "job", e.id, "err", err)
		return row, nil, again(10 * journalWait), false
	}
	return row, &opened, step{}, true
}

// parse reads the request of a job as the gateway does.
func parse(sub *journal.Submission) (openai.Request, error) {
	endpoint := openai.EndpointAt(sub.Endpoint)
	if endpoint == nil {
		return openai.Request{}, fmt.Errorf("unknown endpoint %s", sub.Endpoint)
	}
	return openai.Parse(endpoint, sub.Body)
}

// record is one of this job's, in the stream that this node writes now.
func (x *executor) record(e *entry, token journal.Token, attempt uint32) journal.Record {
	s, _, _ := x.streams.current() // there is one before anything runs
	return journal.Record{Stream: s, Token: token, Job: e.id, Attempt: attempt}
}

// ask runs the request and judges what came. out is nil for an attempt that is
// to be repeated after delay, or that says nothing.
func (x *executor) ask(ctx context.Context, e *entry, sub *journal.Submission, p permit) (out *journal.Outcome, delay *journal.Delay, label string) {
	parsed, err := parse(sub)
	if err != nil { // it was parsed when it was accepted, by an older or newer version perhaps
		return x.failed(0, errorObject(openai.InvalidRequest, "invalid_body", err.Error())), nil, "invalid"
	}
	req := serving.Request{
		Request: parsed, ID: fmt.Sprintf("%s-%d", e.id, e.attempts), Header: http.Header{"Accept": {"application/json"}},
		Principal: serving.Principal{KeyID: sub.KeyID, Tenant: sub.Tenant, Models: sub.Models},
	}

	asking, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var late atomic.Bool
	permitted := func() bool { return x.streams.still(asking, e.home, p) }
	if !permitted() { // writing the start took too long
		return nil, &journal.Delay{Error: lostPermit}, "no_permit"
	}
	// A connection is there: what follows is the request itself. Each upstream
	// that is asked counts as a start.
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
		x.log.Warn("a start was not permitted any more; its result does not count", "job", e.id, "attempt", e.attempts)
		return nil, &journal.Delay{Error: lostPermit}, "late"
	case errors.Is(cause, errLateResult), errors.Is(cause, errSuperseded):
		return nil, nil, "superseded"
	case err == nil:
		return &journal.Outcome{Status: journal.Succeeded, Code: sink.head.Status, Body: sink.body}, nil, "succeeded"
	case errors.Is(cause, errCancelAsked):
		return &journal.Outcome{Status: journal.Cancelled}, nil, "cancelled"
	case cause != nil:
		return nil, nil, "cut_off" // the next start of this node goes on
	}
	v := judge(err)
	if !v.again {
		return x.failed(v.code, v.words), nil, "failed"
	}
	return nil, &journal.Delay{Error: v.words, NotBefore: time.Now().Add(max(v.after, backoff(e.attempts)))}, "retryable"
}

var lostPermit = errorObject(openai.ServerError, "late_start", "The node lost its permit to run the job.")

func (x *executor) failed(code int, words string) *journal.Outcome {
	return &journal.Outcome{Status: journal.Failed, Code: code, Error: words}
}

// conclude writes how an attempt ended.
func (x *executor) conclude(work context.Context, e *entry, token journal.Token, attempt uint32, out *journal.Outcome, delay *journal.Delay) step {
	x.mu.Lock()
	late := e.running.late
	e.running.writing = late == nil && (out != nil || delay != nil)
	x.mu.Unlock()
	if late != nil {
		adopted, err := x.o.Sealer.OpenOutcome(late)
		if err != nil {
			x.log.Error("a late result can't be read; it counts as it is", "job", e.id, "err", err)
			return finished
		}
		adopted.Adopted = true
		x.log.Info("took over the result of an earlier owner", "job", e.id)
		return x.finish(work, e, token, attempt, &adopted)
	}
	if delay != nil {
		if int(attempt) >= x.o.config().MaxAttempts {
			out, delay = x.failed(0, delay.Error), nil
		} else if delay.NotBefore.IsZero() {
			delay.NotBefore = time.Now().Add(backoff(attempt))
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

// finish writes a job's end, under the token that it was begun with.
func (x *executor) finish(work context.Context, e *entry, token journal.Token, attempt uint32, out *journal.Outcome) step {
	if !out.Adopted {
		out.Site = x.o.Site
		if s := x.o.State(); s != nil {
			out.Epoch = s.Primary.Epoch
		}
	}
	rec := x.record(e, token, attempt)
	err := x.write(work, &rec, func() error { return x.o.Sealer.SealOutcome(&rec, out) })
	if errors.Is(err, journal.ErrTooLarge) {
		out = x.failed(out.Code, errorObject(openai.ServerError, "result_too_large", "The result is too large to be kept."))
		err = x.write(work, &rec, func() error { return x.o.Sealer.SealOutcome(&rec, out) })
	}
	if err != nil {
		x.log.Error("a job's end can't be written; it will be run again", "job", e.id, "err", err)
		return leftAlone
	}
	x.log.Debug("job ended", "job", e.id, "status", out.Status, "attempt", attempt)
	return finished
}

// end ends a job that does not run: it is cancelled or its time is over.
func (x *executor) end(work context.Context, e *entry) step {
	row, _, next, ok := x.read(e)
	if !ok {
		return next
	}
	p, err := x.streams.check(e.home)
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

// exhausted ends a job whose last attempt was cut off by the end of its node.
func (x *executor) exhausted(work context.Context, e *entry, row jobtable.Row) step {
	p, err := x.streams.check(e.home)
	if err != nil || !p.inTime() {
		x.block(e.lane, permitWait)
		return again(permitWait)
	}
	words := x.lastError(row)
	if words == "" {
		words = errorObject(openai.ServerError, "attempts_exhausted", "The job was begun as often as is allowed, and never came to an end.")
	}
	x.mu.Lock()
	e.running.token, e.running.writing = p.token, true
	x.mu.Unlock()
	return x.finish(work, e, p.token, row.Attempts(), x.failed(0, words))
}

// lastError is that of the attempt before, empty when there was none.
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

// write seals and appends a record, for as long as it takes: a result is worth
// more than the room of a goroutine. It gives up when the node ends, or the
// journal has failed for good.
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
		case errors.Is(err, journal.ErrFrozen) && now != r.Stream: // a new one was begun meanwhile
			r.Stream = now
			continue
		case errors.Is(err, journal.ErrFull), errors.Is(err, keyring.ErrNoDataKey):
			x.log.Warn("a job's record has to wait", "job", r.Job, "err", err)
		default:
			return err
		}
		if sleep(work, journalWait) != nil {
			return err
		}
	}
}

// backoff is exponential, with half of it random.
func backoff(attempt uint32) time.Duration {
	d := backoffMost
	if n := attempt - 1; n < 10 {
		d = min(d, backoffFirst<<n)
	}
	return d/2 + rand.N(d/2+1) //nolint:gosec // it spreads load, nothing more
}

// verdict is what an error of the pipeline means for a job.
type verdict struct {
	again bool
	after time.Duration // at least
	code  int
	words string // OpenAI's error object, JSON
}

func judge(err error) verdict {
	var (
		status *serving.StatusError
		busy   *serving.BusyError
	)
	switch {
	case errors.Is(err, errTooLarge):
		return verdict{code: http.StatusOK, words: errorObject(openai.ServerError, "result_too_large", "The result is larger than the 16 MiB that are kept.")}
	case errors.As(err, &status):
		v := verdict{code: status.Status, words: upstreamError(status)}
		switch s := status.Status; {
		case s == http.StatusTooManyRequests, s == http.StatusRequestTimeout, s == http.StatusConflict, s == http.StatusTooEarly, s >= http.StatusInternalServerError:
			v.again, v.after = true, retryAfter(status.Header)
		}
		return v
	case errors.As(err, &busy):
		return verdict{again: true, after: busy.RetryAfter, words: errorObject(openai.Overloaded, "no_upstream", "No model server could answer.")}
	case errors.Is(err, serving.ErrUnknownModel):
		return verdict{code: http.StatusNotFound, words: errorObject(openai.InvalidRequest, "model_not_found", "The model does not exist any more, or the key may not use it.")}
	case errors.Is(err, serving.ErrTimeout):
		return verdict{again: true, words: errorObject(openai.TimeoutError, "upstream_timeout", "The model server did not answer in time.")}
	}
	return verdict{again: true, words: errorObject(openai.ServerError, "upstream_failed", "The model server failed to answer: "+err.Error())}
}

func retryAfter(h map[string][]string) time.Duration {
	n, err := strconv.Atoi(http.Header(h).Get("Retry-After"))
	if err != nil || n < 0 {
		return 0
	}
	return min(time.Duration(n)*time.Second, time.Hour)
}

// upstreamError is the error object of an upstream's refusal, or one made of its
// text.
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

// errorObject is an error in OpenAI's shape.
func errorObject(kind, code, message string) string {
	if len(message) > maxError/8 { // escaped it may be six times as long
		message = message[:maxError/8]
	}
	e := openai.Error{Message: strings.ToValidUTF8(message, "�"), Type: kind, Code: code}
	return string(e.Object())
}

var errTooLarge = errors.New("the result is too large")

// collector is a sink that keeps the answer.
type collector struct {
	head serving.Head
	body []byte
}

// Head implements serving.Sink.
func (c *collector) Head(h serving.Head) error {
	c.head = h
	switch {
	case h.Stream:
		return errors.New("a stream came for a job")
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
