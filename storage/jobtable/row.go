package jobtable

import (
	"slices"

	"github.com/dsnode/dsnode/storage/journal"
)

// Row holds everything known about one job: its records in canonical order, as
// Join returns them. It is shared: change neither the slice nor the payloads.
type Row struct{ Records []journal.Record }

// ID returns the job's id, zero for an empty row.
func (r Row) ID() journal.JobID {
	if len(r.Records) == 0 {
		return journal.JobID{}
	}
	return r.Records[0].Job
}

// first returns the first record of a category, which is the one that counts.
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

// Submitted returns the record with the job's content; false while that has not
// arrived, and after the job was deleted.
func (r Row) Submitted() (journal.Record, bool) { return r.value(submitted) }

// AcceptedBy returns the streams that accepted the job, the earliest first. The
// owners of these streams may execute it.
func (r Row) AcceptedBy() []journal.Stream {
	var homes []journal.Stream
	for i := range r.Records {
		if rec := &r.Records[i]; rec.Kind == journal.Submitted && !slices.Contains(homes, rec.Stream) {
			homes = append(homes, rec.Stream)
		}
	}
	return homes
}

// Current returns the result that counts or, without a result, the newest progress;
// false when nothing was started.
func (r Row) Current() (journal.Record, bool) {
	if rec, ok := r.first(finished); ok {
		return *rec, true
	}
	return r.value(progress)
}

// Late returns the results that don't count, the best first.
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

// CancelAsked returns the first request to cancel the job.
func (r Row) CancelAsked() (journal.Record, bool) { return r.value(asked) }

// Deleted reports whether the job was deleted by a client, or its retention is over.
// In the latter case only its id is kept, so that a late copy can't restore it.
// Nothing else is known of a deleted job.
func (r Row) Deleted() bool {
	_, ok := r.first(deleted)
	return ok
}

// Status returns the job's status; empty for a deleted job.
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

// Attempts returns how many executions were begun.
func (r Row) Attempts() uint32 {
	var n uint32
	for i := range r.Records {
		n = max(n, r.Records[i].Attempt)
	}
	return n
}

// visible reports whether the row is shown: its submission has arrived, or the job
// is deleted.
func (r Row) visible() bool {
	if len(r.Records) == 0 {
		return false
	}
	c := categoryOf(r.Records[0].Kind)
	return c == submitted || c == deleted
}
