package jobs

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/node/openai"
	"github.com/dsnode/dsnode/node/serving"
	"github.com/dsnode/dsnode/node/shares"
	"github.com/dsnode/dsnode/storage/journal"
)

const (
	// durabilityWait bounds how long a submission waits for the disks of other nodes.
	durabilityWait = 2 * time.Second
	// writeWait bounds how long it waits for this node's disk.
	writeWait = 5 * time.Second
)

// Request is a submission whose syntax was checked.
type Request struct {
	Who      serving.Principal
	Endpoint string // one of Endpoints
	Model    string
	// Body is the body of the request. It is copied before Submit returns.
	Body []byte
	// Durability and MinDurability are empty when the client did not say.
	Durability, MinDurability journal.Durability
	Priority                  int           // 0–9
	ExpiresIn                 time.Duration // 0: as configured
	IdempotencyKey            string        // empty: none
	RetryOf                   string        // id of the job that Retry repeats
}

// Endpoints are the endpoints that jobs may have.
var Endpoints = func() (paths []string) {
	for _, e := range openai.Endpoints {
		if e.Job {
			paths = append(paths, e.Path)
		}
	}
	return paths
}()

// Submit accepts a job. If the error is nil, the job is as durable as the View says, and
// that is at least what the client asked. The errors are ErrImpossible, ErrKeyReused,
// ErrNotReady, ErrNoStream, ErrPartial, ErrBusy, ErrUnavailable, a *shares.Error, or a
// *DurabilityError: the job was written, but is not known to be as durable as asked.
func (j *Jobs) Submit(ctx context.Context, r *Request) (*View, error) {
	began := j.o.Host.Now()
	v, err := j.submit(ctx, r, began)
	if reason := refusal(err); reason != "" {
		j.metrics.refused.WithLabelValues(reason).Inc()
	}
	j.metrics.submit.Observe(j.o.Host.Now().Sub(began).Seconds())
	return v, err
}

func refusal(err error) string {
	var (
		short *DurabilityError
		spent *shares.Error
	)
	switch {
	case errors.As(err, &spent):
		return "tenant_share"
	case errors.As(err, &short):
		return "durability"
	case errors.Is(err, ErrBusy):
		return "full"
	case errors.Is(err, ErrUnavailable):
		return "journal"
	case errors.Is(err, ErrNotReady), errors.Is(err, ErrNoStream):
		return "not_ready"
	}
	return ""
}

func (j *Jobs) submit(ctx context.Context, r *Request, now time.Time) (*View, error) {
	stream, token, begun := j.streams.current()
	if !begun || j.closed.Load() || !j.o.Ring.Ready() {
		return nil, ErrNotReady
	}
	if err := j.streams.accepts(); err != nil {
		return nil, err
	}
	cfg := j.o.config()
	want, least, err := j.durability(r, journal.Durability(cfg.Durability))
	if err != nil {
		return nil, err
	}
	expires := r.ExpiresIn
	if expires == 0 {
		expires = cfg.ExpiresIn.D()
	}
	sub := journal.Submission{
		Tenant: r.Who.Tenant, KeyID: r.Who.KeyID, Models: r.Who.Models, Endpoint: r.Endpoint, Model: r.Model,
		Durability: want, MinDurability: least, Priority: r.Priority, Site: j.o.Site,
		CreatedAt: now.UTC(), ExpiresAt: now.Add(expires).UTC(), RetryOf: r.RetryOf, Body: r.Body,
	}
	id := newID(now)
	if r.IdempotencyKey != "" {
		if j.o.Table.Partial() { // the job of the key may be among the missing rows
			return nil, ErrPartial
		}
		if id, sub.KeyHash, err = j.ids.keyed(r.Who.Tenant, r.IdempotencyKey, r.Endpoint, r.Body); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrNotReady, err)
		}
		leave, err := j.keys.enter(ctx, sub.KeyHash)
		if err != nil {
			return nil, err
		}
		defer leave()
		if v, err := j.earlier(ctx, id, sub.KeyHash, want, least); v != nil || err != nil {
			return v, err
		}
	}
	for {
		v, err := j.write(ctx, journal.Record{Stream: stream, Token: token, Job: id}, &sub)
		before := stream
		if stream, token, _ = j.streams.current(); stream == before || !errors.Is(err, journal.ErrFrozen) {
			return v, err
		}
		// This node began a new stream meanwhile.
	}
}

// durability returns the level to wait for, and the level that is enough if that one is
// not reached. An explicit level that the configured nodes can't provide is an error.
func (j *Jobs) durability(r *Request, byDefault journal.Durability) (want, least journal.Durability, err error) {
	want, least = r.Durability, r.MinDurability
	if want == journal.DurableNode {
		return want, least, nil // always possible
	}
	if want != "" {
		if err := j.possible(want); err != nil {
			return "", "", fmt.Errorf("%w: %w", ErrImpossible, err)
		}
		return want, least, nil
	}
	want = byDefault
	if least == "" {
		least = journal.DurableNode
	} else if err := j.possible(least); err != nil {
		return "", "", fmt.Errorf("%w: %w", ErrImpossible, err)
	}
	if levelOf(want) < levelOf(least) {
		want = least
	}
	return want, least, nil
}

// possibility is a result of Replication.Possible.
type possibility struct {
	state *agreed.State // for which it was computed
	level journal.Durability
	err   error
}

// possible caches the result for each agreed state: looking at every node costs more than
// encrypting a job.
func (j *Jobs) possible(level journal.Durability) error {
	state := j.o.State()
	if p := j.lastPossible.Load(); p != nil && p.state == state && p.level == level {
		return p.err
	}
	p := &possibility{state, level, j.o.Replication.Possible(level)}
	j.lastPossible.Store(p)
	return p.err
}

// earlier looks for an earlier use of the key: for the same job, or for another one. It reads
// the row last, because a copy of the job may arrive at any time, and is not another job.
func (j *Jobs) earlier(ctx context.Context, id journal.JobID, keyHash string, want, least journal.Durability) (*View, error) {
	used, err := j.o.Table.FindKey(keyHash)
	if err != nil {
		return nil, fmt.Errorf("look for the key's jobs: %w", err)
	}
	row, known, err := j.o.Table.Get(id)
	if err != nil {
		return nil, fmt.Errorf("look for the key's job: %w", err)
	}
	if known && row.Deleted() { // a record with the id of a deleted job is never executed
		return nil, fmt.Errorf("%w: %s, which was deleted", ErrKeyReused, id)
	}
	if known {
		v, _, err := j.view(row, true)
		if err != nil {
			return nil, err
		}
		// A client repeats a submission after durability_timeout. It must get the same
		// error again if the job is still not durable enough, not a 202.
		rec, _ := row.Submitted()
		if v.Durability, err = j.await(ctx, id, rec.Stream, rec.Seq, want, least); err != nil {
			return nil, err
		}
		return v, nil
	}
	for _, other := range used {
		if other != id {
			return nil, fmt.Errorf("%w: %s", ErrKeyReused, other)
		}
	}
	return nil, nil
}

func (j *Jobs) write(ctx context.Context, rec journal.Record, sub *journal.Submission) (*View, error) {
	if err := j.o.Sealer.SealSubmission(&rec, sub); err != nil {
		if errors.Is(err, journal.ErrTooLarge) {
			return nil, err
		}
		return nil, fmt.Errorf("%w: %w", ErrNotReady, err)
	}
	cfg := j.o.config()
	e := newEntry(rec.Job, sub)
	e.stream = rec.Stream
	if err := j.exec.reserve(e, cfg.MaxQueued, cfg.MaxQueuedBytes, j.o.share(sub)); err != nil {
		return nil, err
	}
	// If the client disconnects now, the record may still be written, and then it must be
	// queued: the write has its own timeout.
	writing, done := context.WithTimeout(context.WithoutCancel(ctx), writeWait)
	seq, err := j.o.Journal.Append(writing, rec.Stream, []journal.Record{rec})
	done()
	if err != nil {
		if !errors.Is(err, journal.ErrUncertain) { // else the table may still get the record
			j.exec.release(e)
		}
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	j.exec.release(e) // observe has queued it, unless the job was deleted meanwhile
	has, err := j.await(ctx, rec.Job, rec.Stream, seq, sub.Durability, sub.MinDurability)
	if err != nil {
		return nil, err
	}
	return &View{
		ID: rec.Job, Status: journal.Queued, Site: sub.Site, Durability: has, CreatedAt: sub.CreatedAt,
	}, nil
}

// await waits until a record is as durable as wanted, and returns how durable it is then.
// least is enough after durabilityWait, or at once if the nodes that are heard can't provide
// more. If least is empty, nothing less than want is enough.
func (j *Jobs) await(ctx context.Context, id journal.JobID, s journal.Stream, seq uint64, want, least journal.Durability) (journal.Durability, error) {
	has := j.reached(s, seq)
	if levelOf(has) >= levelOf(want) {
		return has, nil
	}
	began := time.Now()
	wait := want
	if least != "" && !j.o.Replication.Reachable(want) {
		if wait = least; levelOf(has) >= levelOf(least) {
			return has, nil
		}
	}
	waiting, done := context.WithTimeout(ctx, durabilityWait)
	err := j.o.Replication.Await(waiting, s, seq, wait)
	done()
	j.metrics.durable.WithLabelValues(string(wait)).Observe(time.Since(began).Seconds())
	has = j.reached(s, seq)
	switch {
	case levelOf(has) >= levelOf(want):
	case err == nil && levelOf(has) < levelOf(wait):
		has = wait // Await has seen that it was reached
	case err != nil && (least == "" || levelOf(has) < levelOf(least)):
		j.metrics.unsettled.WithLabelValues(string(want)).Inc()
		return has, &DurabilityError{ID: id, Wanted: want, Has: has, After: time.Since(began)}
	}
	return has, nil
}

// ParseExpiry parses "90s", "1h" or "7d".
func ParseExpiry(text string) (time.Duration, bool) {
	if days, found := strings.CutSuffix(text, "d"); found && len(days) == 1 && days[0] >= '0' && days[0] <= '9' {
		return time.Duration(days[0]-'0') * 24 * time.Hour, true
	}
	d, err := time.ParseDuration(text)
	return d, err == nil
}
