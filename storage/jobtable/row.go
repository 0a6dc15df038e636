package jobtable

import (
	"slices"

	"github.com/dsnode/dsnode/storage/journal"
)

// Row is what is known of one job: its records in canonical order, as Join
// gives them. It is shared: change neither the slice nor the payloads.
type Row struct{ Records []journal.Record }

// ID is the job's; zero for an empty row.
func (r Row) ID() journal.JobID {
	if len(r.Records) == 0 {
		return journal.JobID{}
	}
	return r.Records[0].Job
}

// first gives the first record of a category: the one that counts.
func (r Row) first(c category) (*journal.Record, bool) {
	for i := range r.Records {
		if categoryOf(r.Records[i].Kind) == c {
			return &r.Records[i], true
		}
	}
	return nil, false
}

func (r Row) value(c category) (journal.Record, bool) {
	if rec, ok := r.first(c); ok {
		return *rec, true
	}
	return journal.Record{}, false
}

// Submitted is the record that gives the job's content; false while it is still
// on its way, and once the job is deleted.
func (r Row) Submitted() (journal.Record, bool) { return r.value(submitted) }

// Homes are the streams that accepted the job, the first one first: its owners
// may execute it.
func (r Row) Homes() []journal.Stream {
	var homes []journal.Stream
	for i := range r.Records {
		if rec := &r.Records[i]; rec.Kind == journal.Submitted && !slices.Contains(homes, rec.Stream) {
			homes = append(homes, rec.Stream)
		}
	}
	return homes
}

// Current is the result that counts or else how far the execution has come;
// false when nothing was started.
func (r Row) Current() (journal.Record, bool) {
	if rec, ok := r.first(finished); ok {
		return *rec, true
	}
	return r.value(progress)
}

// Late are results that don't count beside the current one, the best first.
func (r Row) Late() []journal.Record {
	from := slices.IndexFunc(r.Records, func(rec journal.Record) bool { return rec.Kind == journal.Finished })
	if from < 0 {
		return nil
	}
	to := from + 1
	for to < len(r.Records) && r.Records[to].Kind == journal.Finished {
		to++
	}
	return r.Records[from+1 : to : to]
}

// CancelAsked is the first wish to cancel the job.
func (r Row) CancelAsked() (journal.Record, bool) { return r.value(asked) }

// Deleted reports whether the job is gone: a client deleted it, or its
// retention is over and only its id is still known, so that a late copy can't
// bring it back. Then nothing else is known of it.
func (r Row) Deleted() bool {
	_, ok := r.first(deleted)
	return ok
}

// Status is where the job is; empty for a deleted one.
func (r Row) Status() journal.Status {
	if r.Deleted() {
		return ""
	}
	current, ok := r.Current()
	switch {
	case ok && current.Kind == journal.Finished:
		return journal.StatusOfRank(current.Rank)
	case ok && current.Kind == journal.Started:
		return journal.Running
	}
	return journal.Queued
}

// Attempts is how many executions were begun.
func (r Row) Attempts() uint32 {
	var n uint32
	for i := range r.Records {
		n = max(n, r.Records[i].Attempt)
	}
	return n
}

// visible reports whether the row is shown: its submission is here, or it is gone.
func (r Row) visible() bool {
	if len(r.Records) == 0 {
		return false
	}
	c := categoryOf(r.Records[0].Kind)
	return c == submitted || c == deleted
}
