package agreed

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// streamWorld applies ownership commands to a state of a few nodes.
type streamWorld struct {
	state *State
	index uint64
}

func newStreamWorld() *streamWorld {
	s := &State{ClusterID: "c", Generation: Generation{Number: 1}, Nodes: map[string]Node{}}
	for _, n := range []string{"a1", "a2", "b1"} {
		s.Nodes[n] = Node{Name: n, Site: n[:1]}
	}
	return &streamWorld{state: s, index: 10}
}

func (w *streamWorld) apply(t CommandType, term uint64, data any) error {
	c, err := NewCommand(t, time.Unix(int64(w.index), 0), data)
	if err != nil {
		return err
	}
	w.index++
	c.Index, c.Term = w.index, term
	next, err := Apply(w.state, c)
	w.state = next
	return err
}

func incarnation(n int) string { return fmt.Sprintf("%032x", n) }

func TestStreamsAreOpenedGivenAndDropped(t *testing.T) {
	w := newStreamWorld()
	key := StreamKey("a1", incarnation(1))
	if err := w.apply(CmdStreamOpen, 1, StreamOpen{Origin: "a1", Incarnation: incarnation(1)}); err != nil {
		t.Fatal(err)
	}
	opened := w.state.Streams[key]
	if opened.Owner != "a1" || opened.Site != "a" || opened.Token != (FenceToken{1, 11}) || opened.Before != "" {
		t.Fatalf("opened as %+v", opened)
	}
	before := w.state
	if err := w.apply(CmdStreamOpen, 1, StreamOpen{Origin: "a1", Incarnation: incarnation(1)}); err != nil {
		t.Fatal(err)
	}
	if w.state.Ownership != before.Ownership || w.state.Streams[key] != opened {
		t.Fatal("opening it again changed its token")
	}
	if err := w.apply(CmdStreamOwn, 3, StreamOwn{Stream: key, Owner: "a2", Expect: opened.Token, Reason: "gone", Term: 3}); err != nil {
		t.Fatal(err)
	}
	given := w.state.Streams[key]
	if given.Owner != "a2" || given.Before != "a1" || given.Token.Compare(opened.Token) <= 0 || w.state.Ownership != w.index {
		t.Fatalf("given away as %+v, ownership %d", given, w.state.Ownership)
	}
	if before.Streams[key] != opened {
		t.Fatal("a published state was changed")
	}
	if err := w.apply(CmdStreamDrop, 3, StreamDrop{Owner: "a1", Streams: []string{key}}); err != nil || w.state.Streams[key].Owner != "a2" {
		t.Fatalf("one that is not the owner dropped it: %v", err)
	}
	if err := w.apply(CmdStreamDrop, 3, StreamDrop{Owner: "a2", Streams: []string{key, "unknown"}}); err != nil || len(w.state.Streams) != 0 {
		t.Fatalf("not dropped: %v", err)
	}
	if len(w.state.DoneStreams) != 1 || w.state.DoneStreams[0] != key {
		t.Fatalf("done streams: %v", w.state.DoneStreams)
	}
	if err := w.apply(CmdStreamOpen, 3, StreamOpen{Origin: "a1", Incarnation: incarnation(1)}); !errors.Is(err, ErrUnknownStream) {
		t.Fatalf("opened again after it was done with: %v", err)
	}
	for n := range maxDoneStreams + 5 {
		key := StreamKey("a1", incarnation(n+2))
		if err := errors.Join(w.apply(CmdStreamOpen, 3, StreamOpen{Origin: "a1", Incarnation: incarnation(n + 2)}),
			w.apply(CmdStreamDrop, 3, StreamDrop{Owner: "a1", Streams: []string{key}})); err != nil {
			t.Fatal(err)
		}
	}
	if len(w.state.DoneStreams) != maxDoneStreams || w.state.DoneStreams[maxDoneStreams-1] != StreamKey("a1", incarnation(maxDoneStreams+6)) {
		t.Fatalf("%d done streams are kept", len(w.state.DoneStreams))
	}
}

// The first who has jobs that a removed node never told of gets them; what was
// given before, or is done with, stays so.
func TestStreamsAreInherited(t *testing.T) {
	w := newStreamWorld()
	if err := w.apply(CmdNodeRemove, 1, NodeRemove{Name: "a1"}); err != nil {
		t.Fatal(err)
	}
	key := StreamKey("a1", incarnation(1))
	for _, owner := range []string{"b1", "a2"} {
		if err := w.apply(CmdStreamInherit, 1, StreamInherit{Origin: "a1", Incarnation: incarnation(1), Owner: owner}); err != nil {
			t.Fatal(err)
		}
	}
	if j := w.state.Streams[key]; j.Owner != "b1" || j.Before != "a1" || j.Site != "b" || j.Token != (FenceToken{1, 12}) || w.state.Ownership != 12 {
		t.Fatalf("inherited as %+v, ownership %d", j, w.state.Ownership)
	}
	if err := w.apply(CmdStreamDrop, 1, StreamDrop{Owner: "b1", Streams: []string{key}}); err != nil {
		t.Fatal(err)
	}
	if err := w.apply(CmdStreamInherit, 1, StreamInherit{Origin: "a1", Incarnation: incarnation(1), Owner: "a2"}); !errors.Is(err, ErrUnknownStream) {
		t.Fatalf("inherited after it was done with: %v", err)
	}
}

func TestOwnershipRefusals(t *testing.T) {
	key := StreamKey("a1", incarnation(1))
	token := FenceToken{1, 11}
	tests := []struct {
		name string
		t    CommandType
		data any
		want error
	}{
		{"opened for a stranger", CmdStreamOpen, StreamOpen{Origin: "x", Incarnation: incarnation(2)}, ErrUnknownNode},
		{"an old token", CmdStreamOwn, StreamOwn{Stream: key, Owner: "a2", Expect: FenceToken{1, 10}, Term: 2}, ErrStaleToken},
		{"a token of another generation", CmdStreamOwn, StreamOwn{Stream: key, Owner: "a2", Expect: FenceToken{2, 11}, Term: 2}, ErrStaleToken},
		{"decided in another term", CmdStreamOwn, StreamOwn{Stream: key, Owner: "a2", Expect: token, Term: 1}, ErrStaleTerm},
		{"given to a stranger", CmdStreamOwn, StreamOwn{Stream: key, Owner: "x", Expect: token, Term: 2}, ErrUnknownNode},
		{"inherited from a member", CmdStreamInherit, StreamInherit{Origin: "a2", Incarnation: incarnation(2), Owner: "a1"}, ErrStillMember},
		{"inherited by a stranger", CmdStreamInherit, StreamInherit{Origin: "x", Incarnation: incarnation(2), Owner: "y"}, ErrUnknownNode},
		{"inherited from no node", CmdStreamInherit, StreamInherit{Origin: "../x", Incarnation: incarnation(2), Owner: "a1"}, ErrUnknownNode},
		{"an unknown stream", CmdStreamOwn, StreamOwn{Stream: "x/1", Owner: "a2", Expect: token, Term: 2}, ErrUnknownStream},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			w := newStreamWorld()
			if err := w.apply(CmdStreamOpen, 2, StreamOpen{Origin: "a1", Incarnation: incarnation(1)}); err != nil {
				t.Fatal(err)
			}
			before := w.state
			if err := w.apply(tt.t, 2, tt.data); !errors.Is(err, tt.want) {
				t.Fatalf("got %v, want %v", err, tt.want)
			}
			if w.state != before {
				t.Fatal("a refusal changed the state")
			}
		})
	}
	for _, bad := range []string{"", "12", strings.Repeat("Z", 32), incarnation(1) + "0"} {
		if err := newStreamWorld().apply(CmdStreamOpen, 2, StreamOpen{Origin: "a1", Incarnation: bad}); err == nil {
			t.Errorf("incarnation %q was taken", bad)
		}
	}
}

func TestStreamsOfANodeAreBounded(t *testing.T) {
	w := newStreamWorld()
	for n := range maxStreamsPerNode {
		if err := w.apply(CmdStreamOpen, 1, StreamOpen{Origin: "a1", Incarnation: incarnation(n)}); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.apply(CmdStreamOpen, 1, StreamOpen{Origin: "a1", Incarnation: incarnation(1000)}); !errors.Is(err, ErrStateFull) {
		t.Fatalf("one too many: %v", err)
	}
	if err := w.apply(CmdStreamOpen, 1, StreamOpen{Origin: "a2", Incarnation: incarnation(1)}); err != nil {
		t.Fatalf("another node's: %v", err)
	}
}

// Whatever is proposed in whatever order: no token is given twice, a stream's
// token only rises, and Ownership rises with each change.
func TestTokensOnlyRise(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := newStreamWorld()
		newest := map[string]FenceToken{}
		given := map[FenceToken]string{}
		for range rapid.IntRange(1, 40).Draw(t, "steps") {
			origin := rapid.SampledFrom([]string{"a1", "a2", "b1"}).Draw(t, "origin")
			inc := incarnation(rapid.IntRange(0, 2).Draw(t, "incarnation"))
			key := StreamKey(origin, inc)
			before := w.state
			switch rapid.IntRange(0, 4).Draw(t, "what") {
			case 3:
				_ = w.apply(CmdNodeRemove, 1, NodeRemove{Name: origin})
			case 4:
				_ = w.apply(CmdStreamInherit, 1, StreamInherit{Origin: origin, Incarnation: inc, Owner: rapid.SampledFrom([]string{"a1", "a2", "b1"}).Draw(t, "heir")})
			case 0:
				_ = w.apply(CmdStreamOpen, 1, StreamOpen{Origin: origin, Incarnation: inc})
			case 1:
				expect := w.state.Streams[key].Token
				if rapid.Bool().Draw(t, "stale") {
					expect.Index--
				}
				_ = w.apply(CmdStreamOwn, 1, StreamOwn{Stream: key, Owner: rapid.SampledFrom([]string{"a1", "a2", "b1"}).Draw(t, "to"), Expect: expect, Term: 1})
			case 2:
				_ = w.apply(CmdStreamDrop, 1, StreamDrop{Owner: w.state.Streams[key].Owner, Streams: []string{key}})
			}
			changed := false
			for key, j := range w.state.Streams {
				if j == before.Streams[key] {
					continue
				}
				changed = true
				if j.Token.Compare(newest[key]) <= 0 {
					t.Fatalf("%s: token %v after %v", key, j.Token, newest[key])
				}
				if other, taken := given[j.Token]; taken {
					t.Fatalf("token %v was given to %s and to %s", j.Token, other, key)
				}
				newest[key], given[j.Token] = j.Token, key
			}
			changed = changed || len(w.state.Streams) != len(before.Streams)
			if changed != (w.state.Ownership == w.index) || w.state.Ownership < before.Ownership {
				t.Fatalf("ownership %d after %d at index %d, changed %t", w.state.Ownership, before.Ownership, w.index, changed)
			}
		}
	})
}
