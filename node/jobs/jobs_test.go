package jobs

import (
	"context"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/dsnode/dsnode/node/serving"
	"github.com/dsnode/dsnode/storage/jobtable"
	"github.com/dsnode/dsnode/storage/journal"
)

// TestJobRuns: a job from its submission to its result.
func TestJobRuns(t *testing.T) {
	w := newWorld(t)
	var asked serving.Request
	w.server = func(ctx context.Context, r serving.Request, s serving.Sink) error {
		asked = r
		return answering(`{"choices":[1]}`)(ctx, r, s)
	}
	w.start()
	// A start while the stream is being proposed may be cancelled.
	w.until("the stream is agreed on", func() bool {
		now, _, _ := w.streams.current()
		return w.streams.agreed(now)
	})
	v := w.submit()
	if v.Status != journal.Queued || v.Durability != journal.DurableNode || v.Site != "here" {
		t.Errorf("the answer to a submission is %+v", v)
	}
	got := w.await(v.ID, journal.Succeeded)
	if string(got.Result) != `{"choices":[1]}` || got.Attempts != 1 || got.ExecutedBy != "here" || got.Epoch != 7 || got.FinishedAt.IsZero() || got.StartedAt.IsZero() {
		t.Errorf("the job is %+v", got)
	}
	if asked.Principal.Tenant != "ann" || asked.Endpoint.Path != Endpoints[0] || string(asked.Body) != string(request().Body) {
		t.Errorf("the pipeline was asked %+v", asked)
	}
	w.until("the executor has dropped the job", func() bool {
		w.exec.mu.Lock()
		defer w.exec.mu.Unlock()
		return len(w.exec.q.byID) == 0 && w.exec.running == 0 && w.exec.q.bytes == 0 && w.exec.pendingBytes == 0
	})
	if c := w.counts(); c.Succeeded != 1 || c.Queued+c.Running+c.Failed != 0 {
		t.Errorf("counts are %+v", c)
	}
}

// answers makes every call of clients and operators, for a job that doesn't exist.
func (w *world) answers() map[string]error {
	ctx, operator, id := w.t.Context(), Caller{Operator: true}, newID(time.Now())
	_, get := w.Get(ctx, ann, id)
	_, operatorGet := w.Get(ctx, operator, id)
	_, cancel := w.Cancel(ctx, operator, id)
	_, retry := w.Retry(ctx, operator, id)
	_, elsewhere := w.Elsewhere(ctx, ann, http.MethodGet, "/v1/jobs/"+id.String(), id)
	_, list := w.List(ctx, ann, Query{Limit: 1})
	_, counts := w.Counts()
	_, submit := w.Submit(ctx, request())
	_, keyed := w.Submit(ctx, request(func(r *Request) { r.IdempotencyKey = "k" }))
	return map[string]error{
		"get": get, "get of an operator": operatorGet, "cancel of an operator": cancel, "retry of an operator": retry,
		"delete of an operator": w.Delete(ctx, operator, id), "elsewhere": elsewhere, "list": list, "counts": counts,
		"submit": submit, "submit with a key": keyed,
	}
}

func (w *world) wantAnswers(want map[string]error) {
	w.t.Helper()
	for call, err := range w.answers() {
		if !errors.Is(err, want[call]) {
			w.t.Errorf("%s: %v, want %v", call, err, want[call])
		}
	}
}

func TestNotReadyBeforeRun(t *testing.T) {
	w := newWorld(t)
	w.open()
	for call, err := range w.answers() {
		if !errors.Is(err, ErrNotReady) {
			t.Errorf("%s: %v, want %v", call, err, ErrNotReady)
		}
	}
	if n, err := testutil.GatherAndCount(w.reg, "dsnode_jobs"); err != nil || n != 0 {
		t.Errorf("dsnode_jobs has %d series before the counts are known, error %v", n, err)
	}
	w.launch()
	if n, err := testutil.GatherAndCount(w.reg, "dsnode_jobs"); err != nil || n != len(statuses) {
		t.Errorf("dsnode_jobs has %d series, error %v", n, err)
	}
}

// TestMissingRowsAreNotMissingJobs: a table that may lack rows can't tell that a
// job doesn't exist.
func TestMissingRowsAreNotMissingJobs(t *testing.T) {
	w := newWorld(t)
	table := filepath.Join(w.dir, "table")
	if err := os.MkdirAll(table, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := jobtable.Discard(table); err != nil {
		t.Fatal(err)
	}
	w.start()
	w.wantAnswers(map[string]error{
		"get":                ErrNotFound, // then other nodes are asked
		"get of an operator": ErrPartial, "cancel of an operator": ErrPartial, "retry of an operator": ErrPartial,
		"delete of an operator": ErrPartial, "elsewhere": ErrPartial, "list": ErrPartial, "counts": ErrPartial,
		"submit": nil, "submit with a key": ErrPartial,
	})
	if err := w.table.SetWhole(); err != nil {
		t.Fatal(err)
	}
	w.wantAnswers(map[string]error{
		"get": ErrNotFound, "get of an operator": ErrNotFound, "cancel of an operator": ErrNotFound, "retry of an operator": ErrNotFound,
		"delete of an operator": ErrNotFound, "elsewhere": ErrNotFound,
	})
}

// TestJobIsNotMissingBeforeCatchingUp: a node that has just started has not received the
// jobs that other nodes accepted meanwhile.
func TestJobIsNotMissingBeforeCatchingUp(t *testing.T) {
	w := newWorld(t)
	w.copies.behind.Store(true)
	w.start()
	w.wantAnswers(map[string]error{
		"get":                ErrNotFound, // then other nodes are asked
		"get of an operator": ErrPartial, "cancel of an operator": ErrPartial, "retry of an operator": ErrPartial,
		"delete of an operator": ErrPartial, "elsewhere": ErrPartial,
	})
	w.copies.behind.Store(false)
	w.wantAnswers(map[string]error{
		"get": ErrNotFound, "get of an operator": ErrNotFound, "cancel of an operator": ErrNotFound, "retry of an operator": ErrNotFound,
		"delete of an operator": ErrNotFound, "elsewhere": ErrNotFound,
	})
}
