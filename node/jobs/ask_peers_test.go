package jobs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
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

// A client that saw a job's end at one node deletes or retries it at another one, where the
// end has not arrived. The change is passed on to a node that has the end. A job that has
// ended nowhere can't be deleted.
func TestChangeOfAJobThatEndedElsewhere(t *testing.T) {
	w := newWorld(t)
	w.spare.Store(0)
	w.start()
	id := w.submit().ID
	path := "/v1/jobs/" + id.String()
	asked := make(chan string, 100)
	peer := func(name string, status journal.Status) upstream.Peer {
		return upstream.Peer{Node: name, Client: peerFunc(func(r *http.Request) (*http.Response, error) {
			if r.Method != http.MethodGet {
				asked <- name
			}
			body := fmt.Sprintf(`{"id":%q,"status":%q}`, id, status)
			return &http.Response{StatusCode: http.StatusOK, Body: io.NopCloser(strings.NewReader(body))}, nil
		})}
	}
	change := map[string]func(Caller) error{
		"delete": func(who Caller) error { return w.Delete(t.Context(), who, id) },
		"retry":  func(who Caller) error { return second(w.Retry(t.Context(), who, id)) },
	}
	w.o.Peers = func() []upstream.Peer { return []upstream.Peer{peer("b-1", journal.Running)} }
	for name, err := range map[string]error{"delete": ErrNotFinal, "retry": ErrNotRetryable} {
		if got := change[name](ann); !errors.Is(got, err) {
			t.Errorf("%s while it runs everywhere: %v, want %v", name, got, err)
		}
	}
	w.o.Peers = func() []upstream.Peer {
		return []upstream.Peer{peer("b-1", journal.Running), peer("c-1", journal.Failed)}
	}
	passed := ann
	passed.Peer = true
	for name, do := range change {
		if err := do(passed); errors.Is(err, ErrNotFound) || err == nil {
			t.Errorf("%s, passed on by a node: %v, want that it has not ended here", name, err)
		}
	}
	for name, do := range change {
		if err := do(ann); !errors.Is(err, ErrNotFound) {
			t.Errorf("%s: %v, want ErrNotFound, so that other nodes are asked", name, err)
		}
	}
	for range 20 {
		if _, err := w.Elsewhere(t.Context(), ann, http.MethodDelete, path, id); err != nil {
			t.Fatal(err)
		}
		if node := <-asked; node != "c-1" {
			t.Fatalf("%s was asked to delete it, and has not its end", node)
		}
	}
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

// A client that asks for a job whose end is here, and is not known to be as durable as the
// job asked, gets the end from a node that knows it. A node that asks for a client, an
// operator, and a client of an end that waits for long get this node's view.
func TestAnEndThatAnotherNodeShows(t *testing.T) {
	inBubble(t, func(t *testing.T, w *world) {
		var asked atomic.Int64
		shows := journal.Running
		w.start()
		w.copies.say(journal.DurableTwoCities, journal.DurableTwoCities, journal.DurableTwoSites)
		id := w.submit(func(r *Request) { r.Durability = journal.DurableTwoSites }).ID
		w.copies.say(journal.DurableTwoCities, journal.DurableTwoCities, journal.DurableNode)
		w.until("its end is here", func() bool { return w.counts().Succeeded == 1 })
		w.o.Peers = func() []upstream.Peer {
			return []upstream.Peer{{Node: "b-1", Client: peerFunc(func(*http.Request) (*http.Response, error) {
				asked.Add(1)
				body := fmt.Sprintf(`{"id":%q,"status":%q}`, id, shows)
				return &http.Response{StatusCode: http.StatusOK, Body: io.NopCloser(strings.NewReader(body))}, nil
			})}}
		}
		if v := w.get(id); v.Status != journal.Running || asked.Load() != 1 {
			t.Errorf("while no node shows its end: %s, %d peers asked", v.Status, asked.Load())
		}
		shows = journal.Succeeded
		for _, who := range []Caller{{Operator: true}, {Principal: ann.Principal, Peer: true}} {
			if v, err := w.Get(t.Context(), who, id); err != nil || v.Status != journal.Running || asked.Load() != 1 {
				t.Errorf("%+v got %+v, %v, %d peers asked", who, v, err, asked.Load())
			}
		}
		time.Sleep(askForEnds)
		if v := w.get(id); v.Status != journal.Running || asked.Load() != 1 {
			t.Errorf("long after its end: %s, %d peers asked", v.Status, asked.Load())
		}
		w.copies.say(journal.DurableTwoCities, journal.DurableTwoCities, journal.DurableTwoSites)
		id = w.submit(func(r *Request) { r.Durability = journal.DurableTwoSites }).ID
		w.copies.say(journal.DurableTwoCities, journal.DurableTwoCities, journal.DurableNode)
		w.until("the end of another one is here", func() bool { return w.counts().Succeeded == 2 })
		if _, err := w.Get(t.Context(), ann, id); !errors.Is(err, ErrNotFound) {
			t.Errorf("while another node shows its end: %v, want ErrNotFound, so that it is relayed", err)
		}
		there, err := w.Elsewhere(t.Context(), ann, http.MethodGet, "/v1/jobs/"+id.String(), id)
		if err != nil || !there.ended() {
			t.Errorf("%+v, %v", there, err)
		}
	})
}
