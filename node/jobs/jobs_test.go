package jobs

import (
	"context"
	"testing"

	"github.com/dsnode/dsnode/node/serving"
	"github.com/dsnode/dsnode/storage/journal"
)

// TestJobRuns: from the submission to the result.
func TestJobRuns(t *testing.T) {
	w := newWorld(t)
	var asked serving.Request
	w.server = func(ctx context.Context, r serving.Request, s serving.Sink) error {
		asked = r
		return answering(`{"choices":[1]}`)(ctx, r, s)
	}
	w.start()
	// A start in the moment in which the stream is proposed is called off.
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
	w.until("the executor forgets the job", func() bool {
		w.exec.mu.Lock()
		defer w.exec.mu.Unlock()
		return len(w.exec.q.byID) == 0 && w.exec.running == 0 && w.exec.q.bytes == 0 && w.exec.pendingBytes == 0
	})
	if c := w.Counts(); c.Succeeded != 1 || c.Queued+c.Running+c.Failed != 0 {
		t.Errorf("counts are %+v", c)
	}
}
