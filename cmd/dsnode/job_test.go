package main

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/dsnode/dsnode/node/jobs"
	"github.com/dsnode/dsnode/storage/journal"
)

// fakeJobs are the jobs behind a real gateway. A job ends at the second request for it. It
// fails if its body contains "bad".
type fakeJobs struct {
	mu    sync.Mutex // guards all below
	order []*fakeJob
	made  byte
}

type fakeJob struct {
	jobs.View
	request jobs.Request
	looks   int
}

func (f *fakeJobs) Submit(_ context.Context, r *jobs.Request) (*jobs.View, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if r.Durability == journal.DurableTwoCities {
		return nil, fmt.Errorf("%w: it needs a node in a second city", jobs.ErrImpossible)
	}
	j := &fakeJob{request: *r, View: jobs.View{
		Status: journal.Queued, Site: "shanghai-a", Durability: journal.DurableNode, Endpoint: r.Endpoint, Model: r.Model,
		Priority: r.Priority, Tenant: r.Who.Tenant, RetryOf: r.RetryOf, CreatedAt: time.Unix(1_800_000_000, 0),
	}}
	for _, old := range f.order {
		if r.IdempotencyKey != "" && old.request.IdempotencyKey == r.IdempotencyKey {
			v := old.View
			return &v, nil
		}
	}
	f.made++
	j.ID[15] = f.made
	f.order = append(f.order, j)
	v := j.View
	return &v, nil
}

func (f *fakeJobs) find(id journal.JobID) (*fakeJob, error) {
	for _, j := range f.order {
		if j.ID == id {
			return j, nil
		}
	}
	return nil, jobs.ErrNotFound
}

func (f *fakeJobs) Get(_ context.Context, _ jobs.Caller, id journal.JobID) (*jobs.View, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	j, err := f.find(id)
	if err != nil {
		return nil, err
	}
	if j.looks++; j.looks >= 2 && !j.Status.Final() {
		j.Status, j.Attempts, j.Result = journal.Succeeded, 1, []byte(`{"answer":42}`)
		if string(j.request.Body) == `{"model":"deepseek-chat","bad":true}` {
			j.Status, j.Result, j.Error = journal.Failed, nil, `{"message":"no","type":"server_error","param":null,"code":"x"}`
		}
	}
	v := j.View
	return &v, nil
}

func (f *fakeJobs) List(_ context.Context, _ jobs.Caller, q jobs.Query) (jobs.Page, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var p jobs.Page
	for _, j := range slices.Backward(f.order) {
		if len(q.Status) > 0 && !slices.Contains(q.Status, j.Status) || q.Tenant != "" && q.Tenant != j.Tenant {
			continue
		}
		if len(p.Jobs) == q.Limit {
			p.More = true
			break
		}
		v := j.View
		v.ShowTenant = true
		p.Jobs = append(p.Jobs, &v)
	}
	return p, nil
}

func (f *fakeJobs) Cancel(_ context.Context, _ jobs.Caller, id journal.JobID) (*jobs.View, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	j, err := f.find(id)
	if err != nil {
		return nil, err
	}
	if !j.Status.Final() {
		j.Status = journal.Cancelled
	}
	v := j.View
	return &v, nil
}

func (f *fakeJobs) Retry(ctx context.Context, _ jobs.Caller, id journal.JobID) (*jobs.View, error) {
	f.mu.Lock()
	j, err := f.find(id)
	f.mu.Unlock()
	switch {
	case err != nil:
		return nil, err
	case j.Status == journal.Succeeded || !j.Status.Final():
		return nil, jobs.ErrNotRetryable
	}
	r := j.request
	r.RetryOf, r.IdempotencyKey = id.String(), ""
	return f.Submit(ctx, &r)
}

func (f *fakeJobs) Delete(_ context.Context, _ jobs.Caller, id journal.JobID) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	j, err := f.find(id)
	switch {
	case err != nil:
		return err
	case !j.Status.Final():
		return jobs.ErrNotFinal
	}
	f.order = slices.DeleteFunc(f.order, func(o *fakeJob) bool { return o == j })
	return nil
}

func (f *fakeJobs) Elsewhere(context.Context, jobs.Caller, string, string, journal.JobID) (*jobs.Relayed, error) {
	return nil, jobs.ErrNotFound
}
