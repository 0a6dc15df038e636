package jobs

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/dsnode/dsnode/cluster/clock"
	"github.com/dsnode/dsnode/node/serving"
	"github.com/dsnode/dsnode/storage/journal"
)

// cancelWait is how long Cancel waits until the job has ended. A job that waits at this
// node ends within that time.
const cancelWait = time.Second

// Cancel asks the owner of the job to cancel it, and returns the job's state then: a job of
// another node may still be running. A job that has ended is not changed.
func (j *Jobs) Cancel(ctx context.Context, who Caller, id journal.JobID) (*View, error) {
	row, v, _, err := j.find(who, id)
	if err != nil || v.Status.Final() || row.Status().Final() {
		return v, err
	}
	if _, asked := row.CancelAsked(); !asked {
		if err := j.note(ctx, id, journal.CancelAsked); err != nil {
			return nil, err
		}
	}
	until := time.Now().Add(cancelWait)
	for {
		_, v, _, err = j.find(who, id)
		if err != nil || v.Status.Final() || !time.Now().Before(until) {
			return v, err
		}
		if clock.Sleep(ctx, 10*time.Millisecond) != nil {
			return v, nil
		}
	}
}

// Delete deletes a job that has ended. The error is ErrNotFinal for another job, and
// ErrNotFound for one whose end only other nodes have yet: a client may have seen it there.
func (j *Jobs) Delete(ctx context.Context, who Caller, id journal.JobID) error {
	_, v, _, err := j.find(who, id)
	switch {
	case err != nil:
		return err
	case v.Status.Final():
		return j.note(ctx, id, journal.Deleted)
	case j.endedElsewhere(ctx, who, id):
		return ErrNotFound
	}
	return fmt.Errorf("%w: it is %s", ErrNotFinal, v.Status)
}

// Retry submits a job that failed, expired or was cancelled again, as a new job with the
// same request and options. The new job has the rights of the caller, or those of the
// original job's key if the caller is an operator. ErrNotFound is as for Delete.
func (j *Jobs) Retry(ctx context.Context, who Caller, id journal.JobID) (*View, error) {
	_, v, sub, err := j.find(who, id)
	switch {
	case err != nil:
		return nil, err
	case !v.Status.Final() && j.endedElsewhere(ctx, who, id):
		return nil, ErrNotFound
	case !v.Status.Final() || v.Status == journal.Succeeded:
		return nil, fmt.Errorf("%w: it is %s", ErrNotRetryable, v.Status)
	}
	as := who.Principal
	if who.Operator {
		as = serving.Principal{Tenant: sub.Tenant, KeyID: sub.KeyID, Models: sub.Models}
	}
	r := Request{
		Who: as, Endpoint: sub.Endpoint, Model: sub.Model, Body: sub.Body, Priority: sub.Priority,
		Durability: sub.Durability, MinDurability: sub.MinDurability, ExpiresIn: sub.ExpiresAt.Sub(sub.CreatedAt),
		RetryOf: id.String(),
	}
	return j.Submit(ctx, &r)
}

// note writes a record without payload about a job that any node may own.
func (j *Jobs) note(ctx context.Context, id journal.JobID, kind journal.Kind) error {
	s, token, begun := j.streams.current()
	if !begun || j.closed.Load() {
		return ErrNotReady
	}
	ctx, done := context.WithTimeout(ctx, writeWait)
	defer done()
	for {
		_, err := j.o.Journal.Append(ctx, s, []journal.Record{{Stream: s, Token: token, Kind: kind, Job: id}})
		if err == nil {
			return nil
		}
		before := s
		if s, token, _ = j.streams.current(); s == before || !errors.Is(err, journal.ErrFrozen) {
			return fmt.Errorf("%w: %w", ErrUnavailable, err)
		}
		// This node began a new stream meanwhile.
	}
}
