package jobs

import (
	"context"
	"errors"
	"fmt"

	"github.com/dsnode/dsnode/node/serving"
	"github.com/dsnode/dsnode/storage/jobtable"
	"github.com/dsnode/dsnode/storage/journal"
)

// Caller is the client or operator who makes a call. An operator sees the jobs of all
// tenants, and their tenants.
type Caller struct {
	serving.Principal
	Operator bool
	Peer     bool // another node passes a client's request on
}

// Get returns a job of the caller's tenant, with its result. The error is ErrNotReady,
// ErrNotFound (also for a job of another tenant), ErrPartial, or the table's. ErrNotFound is
// also for a job whose end is here and is not known to be durable enough yet, if another node
// shows it: Elsewhere relays it.
func (j *Jobs) Get(ctx context.Context, who Caller, id journal.JobID) (*View, error) {
	row, v, _, err := j.find(who, id)
	if err == nil && !v.Status.Final() && j.endedLately(row) && j.endedElsewhere(ctx, who, id) {
		return nil, ErrNotFound
	}
	return v, err
}

// lacking reports whether a job that is not found here may exist: rows are missing, or this
// node has just started and is catching up.
func (j *Jobs) lacking() bool { return j.o.Table.Partial() || !j.o.Replication.CaughtUp() }

// find reads a job that the caller may see. While jobs may be missing, ErrNotFound
// becomes ErrPartial for operators; a client's request goes to other nodes first
// (Elsewhere), also for a job whose end this node has relayed and does not have itself.
func (j *Jobs) find(who Caller, id journal.JobID) (row jobtable.Row, v *View, sub *journal.Submission, err error) {
	if !j.ready.Load() {
		return row, nil, nil, ErrNotReady
	}
	row, v, sub, err = j.lookUp(who, id)
	if err == nil && !who.Operator && !v.Status.Final() && j.relayed.has(id) {
		return row, nil, nil, ErrNotFound // a client has seen its end here, as a peer has it
	}
	if errors.Is(err, ErrNotFound) && who.Operator && j.lacking() {
		err = ErrPartial
	}
	return row, v, sub, err
}

func (j *Jobs) lookUp(who Caller, id journal.JobID) (row jobtable.Row, v *View, sub *journal.Submission, err error) {
	row, known, err := j.o.Table.Get(id)
	switch {
	case err != nil:
		return row, nil, nil, fmt.Errorf("read job %s: %w", id, err)
	case !known:
		return row, nil, nil, ErrNotFound
	}
	if v, sub, err = j.view(row, true); err != nil {
		return row, nil, nil, fmt.Errorf("read job %s: %w", id, err)
	}
	if !who.Operator && sub.Tenant != who.Tenant {
		return row, nil, nil, ErrNotFound
	}
	v.ShowTenant = who.Operator
	return row, v, sub, nil
}

// Query selects the jobs of List.
type Query struct {
	// Status has the wanted statuses, as clients see them; empty: all.
	Status []journal.Status
	// After selects jobs older than this one, Before newer ones. At most one is set.
	After, Before journal.JobID
	Limit         int // 1 to MaxPage
	// Tenant selects a tenant's jobs, for an operator; empty: all.
	Tenant string
}

// MaxPage bounds a page of List.
const MaxPage = jobtable.MaxLimit

// Page is a page of the list, newest first, without results.
type Page struct {
	Jobs []*View
	More bool
}

// List returns a page of the caller's jobs. The error is ErrNotReady, ErrPartial,
// ErrBadCursor, or the table's.
func (j *Jobs) List(_ context.Context, who Caller, q Query) (Page, error) {
	if err := j.complete(); err != nil {
		return Page{}, err
	}
	for _, cursor := range []journal.JobID{q.After, q.Before} {
		if cursor == (journal.JobID{}) {
			continue
		}
		if err := j.mayGoOnAt(who, cursor); err != nil {
			return Page{}, err
		}
	}
	f := jobtable.Filter{Tenant: who.Tenant, Status: q.Status, After: q.After, Before: q.Before, Limit: q.Limit}
	if who.Operator {
		f.Tenant, f.AllTenants = q.Tenant, q.Tenant == ""
	}
	rows, more, err := j.o.Table.List(f)
	if errors.Is(err, jobtable.ErrUnknownCursor) {
		return Page{}, ErrBadCursor
	}
	if err != nil {
		return Page{}, fmt.Errorf("list jobs: %w", err)
	}
	p := Page{More: more, Jobs: make([]*View, 0, len(rows))}
	for _, row := range rows {
		v, _, err := j.view(row, false)
		if errors.Is(err, ErrNotFound) {
			continue // it was deleted meanwhile
		}
		if err != nil {
			return Page{}, fmt.Errorf("list jobs: %w", err)
		}
		v.ShowTenant = who.Operator
		p.Jobs = append(p.Jobs, v)
	}
	return p, nil
}

// mayGoOnAt is nil when a list may go on at a job: at one that the caller may see, or at one
// that was deleted meanwhile, of which the table knows only the place.
func (j *Jobs) mayGoOnAt(who Caller, cursor journal.JobID) error {
	if _, _, _, err := j.lookUp(who, cursor); !errors.Is(err, ErrNotFound) {
		return err
	}
	row, known, err := j.o.Table.Get(cursor)
	if err != nil {
		return fmt.Errorf("read job %s: %w", cursor, err)
	}
	if !known || !row.Deleted() {
		return ErrBadCursor
	}
	return nil
}
