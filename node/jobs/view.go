package jobs

import (
	"encoding/json"
	"strconv"
	"time"
	"unicode/utf8"

	"github.com/dsnode/dsnode/storage/jobtable"
	"github.com/dsnode/dsnode/storage/journal"
)

// View is a job as clients see it.
type View struct {
	ID         journal.JobID
	Status     journal.Status
	Site       string // the site that accepted it
	Durability journal.Durability
	CreatedAt  time.Time
	ExpiresAt  time.Time
	StartedAt  time.Time // of the last attempt; zero: not yet
	FinishedAt time.Time // zero: not yet
	Endpoint   string
	Model      string
	Priority   int
	Attempts   uint32
	ExecutedBy string // site that runs or ran it
	Epoch      uint64 // in which it ended
	RetryOf    string
	Tenant     string // shown only to operators
	CancelWish bool   // a client asked to cancel it
	Conflict   bool   // its Idempotency-Key was also used with another body
	Error      string // OpenAI's error object, JSON
	Result     []byte // the upstream's body

	ShowTenant bool // for an operator
}

// AppendJSON appends the job as a JSON object.
func (v *View) AppendJSON(b []byte) []byte {
	b = append(b, `{"id":"`...)
	b = v.ID.Append(b)
	b = append(b, `","object":"job","status":"`...)
	b = append(b, v.Status...)
	b = append(b, `","site":`...)
	b = appendString(b, v.Site)
	b = append(b, `,"durability":"`...)
	b = append(b, v.Durability...)
	b = append(b, `","created_at":`...)
	b = strconv.AppendInt(b, v.CreatedAt.Unix(), 10)
	if v.Endpoint != "" {
		b = append(b, `,"endpoint":`...)
		b = appendString(b, v.Endpoint)
		b = append(b, `,"model":`...)
		b = appendString(b, v.Model)
		b = append(b, `,"priority":`...)
		b = strconv.AppendInt(b, int64(v.Priority), 10)
		b = append(b, `,"attempts":`...)
		b = strconv.AppendUint(b, uint64(v.Attempts), 10)
	}
	b = appendTime(b, `,"expires_at":`, v.ExpiresAt)
	b = appendTime(b, `,"started_at":`, v.StartedAt)
	b = appendTime(b, `,"finished_at":`, v.FinishedAt)
	if v.ExecutedBy != "" {
		b = append(b, `,"executed_by":`...)
		b = appendString(b, v.ExecutedBy)
	}
	if v.Epoch > 0 {
		b = append(b, `,"epoch":`...)
		b = strconv.AppendUint(b, v.Epoch, 10)
	}
	if v.RetryOf != "" {
		b = append(b, `,"retry_of":`...)
		b = appendString(b, v.RetryOf)
	}
	if v.ShowTenant && v.Tenant != "" {
		b = append(b, `,"tenant":`...)
		b = appendString(b, v.Tenant)
	}
	if v.CancelWish {
		b = append(b, `,"cancel_requested":true`...)
	}
	if v.Conflict {
		b = append(b, `,"idempotency_conflict":true`...)
	}
	if v.Error != "" {
		b = append(b, `,"error":`...)
		b = append(b, v.Error...)
	}
	if len(v.Result) > 0 {
		b = append(b, `,"result":`...)
		if json.Valid(v.Result) {
			b = append(b, v.Result...)
		} else {
			b = appendString(b, string(v.Result))
		}
	}
	return append(b, '}')
}

func appendTime(b []byte, name string, t time.Time) []byte {
	if t.IsZero() {
		return b
	}
	return strconv.AppendInt(append(b, name...), t.Unix(), 10)
}

// appendString appends s as a JSON string. Most strings here need no escapes.
func appendString(b []byte, s string) []byte {
	for i := range len(s) {
		if c := s[i]; c < ' ' || c == '"' || c == '\\' || c >= utf8.RuneSelf {
			q, err := json.Marshal(s)
			if err != nil { // strings always marshal
				panic(err)
			}
			return append(b, q...)
		}
	}
	b = append(b, '"')
	b = append(b, s...)
	return append(b, '"')
}

// view reads a row. With full it also reads the result and looks for other jobs with the
// same Idempotency-Key. The error is ErrNotFound for a deleted job.
func (j *Jobs) view(row jobtable.Row, full bool) (*View, *journal.Submission, error) {
	rec, ok := row.Submitted()
	if !ok || row.Deleted() {
		return nil, nil, ErrNotFound
	}
	sub, err := j.o.Sealer.OpenSubmission(&rec)
	if err != nil {
		return nil, nil, err
	}
	v := &View{
		ID: rec.Job, Site: sub.Site, CreatedAt: sub.CreatedAt, ExpiresAt: sub.ExpiresAt, Endpoint: sub.Endpoint,
		Model: sub.Model, Priority: sub.Priority, Attempts: row.Attempts(), RetryOf: sub.RetryOf, Tenant: sub.Tenant,
		Durability: j.reached(rec.Stream, rec.Seq),
	}
	_, v.CancelWish = row.CancelAsked()
	if err := j.fillProgress(v, row, &sub, full); err != nil {
		return nil, nil, err
	}
	if full && sub.KeyHash != "" {
		same, err := j.o.Table.FindKey(sub.KeyHash)
		if err != nil {
			return nil, nil, err
		}
		v.Conflict = len(same) > 1
	}
	return v, &sub, nil
}

// reached is how durable a record is known to be: at least node, because it is in the
// table.
func (j *Jobs) reached(s journal.Stream, seq uint64) journal.Durability {
	if d := j.o.Replication.DurabilityOf(s, seq); levelOf(d) > 0 {
		return d
	}
	return journal.DurableNode
}

func (j *Jobs) fillProgress(v *View, row jobtable.Row, sub *journal.Submission, full bool) error {
	v.Status = journal.Queued
	if p, ok := progress(row); ok {
		if p.Kind == journal.Started {
			v.Status, v.ExecutedBy = journal.Running, j.siteOf(p.Stream.Origin)
			v.StartedAt = p.Clock.Time()
		} else if delay, err := j.o.Sealer.OpenDelay(&p); err == nil {
			v.Error = delay.Error
		}
	}
	current, ok := j.shownEnd(row, sub)
	if !ok {
		return nil
	}
	out, err := j.o.Sealer.OpenOutcome(&current)
	if err != nil {
		return err
	}
	v.Status, v.FinishedAt, v.Error = out.Status, current.Clock.Time(), out.Error
	v.ExecutedBy, v.Epoch = out.Site, out.Epoch
	if v.StartedAt.IsZero() {
		v.ExecutedBy = "" // it ended without being executed
	}
	if full {
		v.Result = out.Body
	}
	return nil
}

// progress is the newest record of a start or of a failed attempt.
func progress(row jobtable.Row) (journal.Record, bool) {
	for _, r := range row.Records {
		if r.Kind == journal.Started || r.Kind == journal.Retrying {
			return r, true
		}
	}
	return journal.Record{}, false
}

func (j *Jobs) siteOf(node string) string {
	if node == j.o.Node {
		return j.o.Site
	}
	return j.o.State().Nodes[node].Site
}
