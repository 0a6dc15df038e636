package serving

import (
	"errors"
	"io"
	"net/http"
	"slices"
	"testing"
)

// batcher records what is sent to the client in one piece.
type batcher struct {
	recorder
	held    string
	pieces  []string
	flushed func() error
}

func (b *batcher) Data(event []byte) error {
	b.pieces = append(b.pieces, b.held+string(event))
	b.held = ""
	return b.recorder.Data(event)
}

func (b *batcher) Hold(event []byte) error {
	b.held += string(event)
	return b.recorder.Data(event)
}

func (b *batcher) Flush() error {
	b.pieces = append(b.pieces, b.held)
	b.held = ""
	return b.flushed()
}

// TestEventsOfOnePiece: events that come together go on together, and none is held while
// more is waited for.
func TestEventsOfOnePiece(t *testing.T) {
	first, rest := roleChunk+delta("Hel"), delta("lo")+delta(" you")
	last := finishChunk + doneChunk
	next := make(chan struct{})
	up := newServer(t, "up", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		for _, piece := range []string{first, rest, last} {
			_, _ = io.WriteString(w, piece)
			flush(w)
			if piece != last {
				<-next // the client has it
			}
		}
	})
	r := newRig(t, []*server{up})
	saw := &batcher{flushed: func() error { next <- struct{}{}; return nil }}
	if err := r.Serve(t.Context(), chat(true), saw); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(saw.pieces, []string{first, rest, last}) {
		t.Errorf("sent in pieces %q", saw.pieces)
	}
}

// TestFlushThatFails: an error of Flush means that the client has gone.
func TestFlushThatFails(t *testing.T) {
	up := newServer(t, "up", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		_, _ = io.WriteString(w, roleChunk+delta("Hel"))
		flush(w)
		stall(w, r)
	})
	r := newRig(t, []*server{up})
	gone := errors.New("gone")
	if err := r.Serve(t.Context(), chat(true), &batcher{flushed: func() error { return gone }}); !errors.Is(err, gone) {
		t.Errorf("error %v", err)
	}
	if r.results("up", "cancelled") != 1 {
		t.Error("not counted as cancelled")
	}
	eventually(t, "the upstream stops", func() bool { return up.active.Load() == 0 })
}
