package jobs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"testing"
	"time"

	"github.com/dsnode/dsnode/node/serving"
	"github.com/dsnode/dsnode/node/upstream"
	"github.com/dsnode/dsnode/storage/journal"
)

type peerFunc func(*http.Request) (*http.Response, error)

func (f peerFunc) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// A node that catches up relays a peer's answer for a job that it doesn't have yet. When
// the first records of the job have arrived, the job is not shown as running again: a
// client has seen its end.
func TestRelayedEndDoesNotGoBack(t *testing.T) {
	w := newWorld(t)
	hold := make(chan struct{})
	w.server = func(ctx context.Context, r serving.Request, s serving.Sink) error {
		<-hold
		return answering("{}")(ctx, r, s)
	}
	w.start()
	id := w.submit().ID
	w.await(id, journal.Running)
	path := "/v1/jobs/" + id.String()
	elsewhere := func(status journal.Status) error {
		w.o.Peers = func() []upstream.Peer {
			return []upstream.Peer{{Node: "b-1", Client: peerFunc(func(*http.Request) (*http.Response, error) {
				if status == "" {
					return nil, errors.New("unreachable")
				}
				body := fmt.Sprintf(`{"id":%q,"status":%q}`, id, status)
				return &http.Response{StatusCode: http.StatusOK, Body: io.NopCloser(bytes.NewReader([]byte(body)))}, nil
			})}}
		}
		_, err := w.Elsewhere(t.Context(), ann, http.MethodGet, path, id)
		return err
	}

	// A peer that says no more than this node changes nothing.
	if err := elsewhere(journal.Running); err != nil {
		t.Fatal(err)
	}
	if v, err := w.Get(t.Context(), ann, id); err != nil || v.Status != journal.Running {
		t.Fatalf("%+v, %v", v, err)
	}

	if err := elsewhere(journal.Succeeded); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Get(t.Context(), ann, id); !errors.Is(err, ErrNotFound) {
		t.Errorf("after its end was relayed: %v, want ErrNotFound, so that peers are asked again", err)
	}
	if _, err := w.Get(t.Context(), Caller{Operator: true}, id); err != nil {
		t.Errorf("an operator asks for this node's row: %v", err)
	}
	if err := elsewhere(""); !errors.Is(err, ErrPartial) {
		t.Errorf("when no peer answers any more: %v, want ErrPartial", err)
	}
	close(hold)
	w.until("this node has the end too", func() bool {
		v, err := w.Get(t.Context(), ann, id)
		if err == nil && v.Status != journal.Succeeded {
			t.Fatalf("it is shown as %s", v.Status)
		}
		return err == nil
	})
}

func TestRelayedEndsAreBounded(t *testing.T) {
	e := relayedEnds{ids: map[journal.JobID]bool{}}
	first := newID(time.Now())
	e.add(first)
	last := first
	for range 2 * maxEnds {
		last = newID(time.Now())
		e.add(last)
		e.add(last)
	}
	if len(e.ids) != maxEnds || len(e.order) != maxEnds || e.has(first) || !e.has(last) {
		t.Errorf("%d ids, %d in order; first %v, last %v", len(e.ids), len(e.order), e.has(first), e.has(last))
	}
}
