package node

import (
	"context"
	"errors"

	"github.com/dsnode/dsnode/node/gateway"
	"github.com/dsnode/dsnode/node/jobs"
	"github.com/dsnode/dsnode/storage/journal"
)

// jobsDoor is the node's jobs for its doors, which open before a node takes any.
type jobsDoor struct{ w *work }

var _ gateway.Jobs = jobsDoor{}

func (d jobsDoor) ready() (*jobs.Jobs, error) {
	if j := d.w.jobs.Load(); j != nil {
		return j, nil
	}
	return nil, jobs.ErrNotReady
}

// known keeps a table that may lack rows from saying that a job doesn't exist.
// Clients' questions go to other nodes first; see Elsewhere.
func (d jobsDoor) known(operator bool, err error) error {
	if operator && errors.Is(err, jobs.ErrNotFound) && d.w.table.Partial() {
		return jobs.ErrPartial
	}
	return err
}

// Submit is jobs.Jobs's, like all below. While the table may lack rows, a key's
// job can't be told from a new one.
func (d jobsDoor) Submit(ctx context.Context, r *jobs.Request) (*jobs.View, error) {
	if r.IdempotencyKey != "" && d.w.table.Partial() {
		return nil, jobs.ErrPartial
	}
	j, err := d.ready()
	if err != nil {
		return nil, err
	}
	return j.Submit(ctx, r)
}

// Get gives one job.
func (d jobsDoor) Get(ctx context.Context, who jobs.Caller, id journal.JobID) (*jobs.View, error) {
	j, err := d.ready()
	if err != nil {
		return nil, err
	}
	v, err := j.Get(ctx, who, id)
	return v, d.known(who.Operator, err)
}

// List gives a page of jobs.
func (d jobsDoor) List(ctx context.Context, who jobs.Caller, q jobs.Query) (jobs.Page, error) {
	if d.w.table.Partial() {
		return jobs.Page{}, jobs.ErrPartial
	}
	j, err := d.ready()
	if err != nil {
		return jobs.Page{}, err
	}
	return j.List(ctx, who, q)
}

// Cancel notes the wish to end a job.
func (d jobsDoor) Cancel(ctx context.Context, who jobs.Caller, id journal.JobID) (*jobs.View, error) {
	j, err := d.ready()
	if err != nil {
		return nil, err
	}
	v, err := j.Cancel(ctx, who, id)
	return v, d.known(who.Operator, err)
}

// Retry submits a job that ended badly anew.
func (d jobsDoor) Retry(ctx context.Context, who jobs.Caller, id journal.JobID) (*jobs.View, error) {
	j, err := d.ready()
	if err != nil {
		return nil, err
	}
	v, err := j.Retry(ctx, who, id)
	return v, d.known(who.Operator, err)
}

// Delete hides a job that has ended.
func (d jobsDoor) Delete(ctx context.Context, who jobs.Caller, id journal.JobID) error {
	j, err := d.ready()
	if err != nil {
		return err
	}
	return d.known(who.Operator, j.Delete(ctx, who, id))
}

// Elsewhere asks other nodes.
func (d jobsDoor) Elsewhere(ctx context.Context, who jobs.Caller, method, path string, id journal.JobID) (*jobs.Relayed, error) {
	j, err := d.ready()
	if err != nil {
		return nil, err
	}
	there, err := j.Elsewhere(ctx, who, method, path, id)
	return there, d.known(true, err) // nobody else can say either
}
