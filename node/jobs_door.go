package node

import (
	"context"

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

// Submit is jobs.Jobs's, like all below.
func (d jobsDoor) Submit(ctx context.Context, r *jobs.Request) (*jobs.View, error) {
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
	return j.Get(ctx, who, id)
}

// List gives a page of jobs.
func (d jobsDoor) List(ctx context.Context, who jobs.Caller, q jobs.Query) (jobs.Page, error) {
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
	return j.Cancel(ctx, who, id)
}

// Retry submits a job that ended badly anew.
func (d jobsDoor) Retry(ctx context.Context, who jobs.Caller, id journal.JobID) (*jobs.View, error) {
	j, err := d.ready()
	if err != nil {
		return nil, err
	}
	return j.Retry(ctx, who, id)
}

// Delete hides a job that has ended.
func (d jobsDoor) Delete(ctx context.Context, who jobs.Caller, id journal.JobID) error {
	j, err := d.ready()
	if err != nil {
		return err
	}
	return j.Delete(ctx, who, id)
}

// Elsewhere asks other nodes.
func (d jobsDoor) Elsewhere(ctx context.Context, who jobs.Caller, method, path string, id journal.JobID) (*jobs.Relayed, error) {
	j, err := d.ready()
	if err != nil {
		return nil, err
	}
	return j.Elsewhere(ctx, who, method, path, id)
}
