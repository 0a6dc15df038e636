package agreed

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// streamHistory applies ownership commands to a state of a few nodes.
type streamHistory struct {
	state *State
	index uint64
}

func newStreamHistory() *streamHistory {
	s := &State{ClusterID: "c", Generation: Generation{Number: 1}, Nodes: map[string]Node{}}
	for _, n := range []string{"a1", "a2", "b1"} {
		s.Nodes[n] = Node{Name: n, Site: n[:1]}
	}
	return &streamHistory{state: s, index: 10}
}

func (h *streamHistory) apply(t CommandType, term uint64, data any) error {
	c, err := NewCommand(t, time.Unix(int64(h.index), 0), data)
	if err != nil {
		return err
	}
	h.index++
	c.Index, c.Term = h.index, term
	next, err := Apply(h.state, c)
	h.state = next
	return err
}

func incarnation(n int) string { return fmt.Sprintf("%032x", n) }

func TestStreamLifeCycle(t *testing.T) {
	h := newStreamHistory()
	key := StreamKey("a1", incarnation(1))
	if err := h.apply(CmdStreamOpen, 1, StreamOpen{Origin: "a1", Incarnation: incarnation(1)}); err != nil {
		t.Fatal(err)
	}
	opened := h.state.Streams[key]
	if opened.Owner != "a1" || opened.Site != "a" || opened.Token != (FenceToken{1, 11}) || opened.Before != "" {
		t.Fatalf("opened as %+v", opened)
	}
	before := h.state
	if err := h.apply(CmdStreamOpen, 1, StreamOpen{Origin: "a1", Incarnation: incarnation(1)}); err != nil {
		t.Fatal(err)
	}
	if h.state.Ownership != before.Ownership || h.state.Streams[key] != opened {
		t.Fatal("opening the stream again changed its token")
	}
	if err := h.apply(CmdStreamOwn, 3, StreamOwn{Stream: key, Owner: "a2", Expect: opened.Token, Reason: "gone", Term: 3}); err != nil {
		t.Fatal(err)
	}
	given := h.state.Streams[key]
	if given.Owner != "a2" || given.Before != "a1" || given.Token.Compare(opened.Token) <= 0 || h.state.Ownership != h.index {
		t.Fatalf("given to a2: %+v, ownership %d", given, h.state.Ownership)
	}
	if before.Streams[key] != opened {
		t.Fatal("a published state was changed")
	}
	if err := h.apply(CmdStreamDrop, 3, StreamDrop{Owner: "a1", Streams: []string{key}}); err != nil || h.state.Streams[key].Owner != "a2" {
		t.Fatalf("a node that is not the owner dropped it: %v", err)
	}
	if err := h.apply(CmdStreamDrop, 3, StreamDrop{Owner: "a2", Streams: []string{key, "unknown"}}); err != nil || len(h.state.Streams) != 0 {
		t.Fatalf("the owner's drop: %v, streams %v", err, h.state.Streams)
	}
	if len(h.state.DoneStreams) != 1 || h.state.DoneStreams[0] != key {
		t.Fatalf("done streams: %v", h.state.DoneStreams)
	}
	if err := h.apply(CmdStreamOpen, 3, StreamOpen{Origin: "a1", Incarnation: incarnation(1)}); !errors.Is(err, ErrUnknownStream) {
		t.Fatalf("opening a dropped stream: %v, want ErrUnknownStream", err)
	}
	for n := range maxDoneStreams + 5 {
		key := StreamKey("a1", incarnation(n+2))
		if err := errors.Join(h.apply(CmdStreamOpen, 3, StreamOpen{Origin: "a1", Incarnation: incarnation(n + 2)}),
			h.apply(CmdStreamDrop, 3, StreamDrop{Owner: "a1", Streams: []string{key}})); err != nil {
			t.Fatal(err)
		}
	}
	if len(h.state.DoneStreams) != maxDoneStreams || h.state.DoneStreams[maxDoneStreams-1] != StreamKey("a1", incarnation(maxDoneStreams+6)) {
		t.Fatalf("%d done streams, want %d with the newest last", len(h.state.DoneStreams), maxDoneStreams)
	}
}

// The first node that proposes a removed node's stream becomes its owner. A stream
// that has an owner keeps it, and a dropped one stays dropped.
func TestStreamsAreInherited(t *testing.T) {
	h := newStreamHistory()
	if err := h.apply(CmdNodeRemove, 1, NodeRemove{Name: "a1"}); err != nil {
		t.Fatal(err)
	}
	key := StreamKey("a1", incarnation(1))
	for _, owner := range []string{"b1", "a2"} {
		if err := h.apply(CmdStreamInherit, 1, StreamInherit{Origin: "a1", Incarnation: incarnation(1), Owner: owner}); err != nil {
			t.Fatal(err)
		}
	}
	if j := h.state.Streams[key]; j.Owner != "b1" || j.Before != "a1" || j.Site != "b" || j.Token != (FenceToken{1, 12}) || h.state.Ownership != 12 {
		t.Fatalf("inherited as %+v, ownership %d", j, h.state.Ownership)
	}
	if err := h.apply(CmdStreamDrop, 1, StreamDrop{Owner: "b1", Streams: []string{key}}); err != nil {
		t.Fatal(err)
	}
	if err := h.apply(CmdStreamInherit, 1, StreamInherit{Origin: "a1", Incarnation: incarnation(1), Owner: "a2"}); !errors.Is(err, ErrUnknownStream) {
		t.Fatalf("inheriting a dropped stream: %v, want ErrUnknownStream", err)
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
		{"opened for an unknown node", CmdStreamOpen, StreamOpen{Origin: "x", Incarnation: incarnation(2)}, ErrUnknownNode},
		{"an old token", CmdStreamOwn, StreamOwn{Stream: key, Owner: "a2", Expect: FenceToken{1, 10}, Term: 2}, ErrStaleToken},
		{"a token of another generation", CmdStreamOwn, StreamOwn{Stream: key, Owner: "a2", Expect: FenceToken{2, 11}, Term: 2}, ErrStaleToken},
		{"decided in another term", CmdStreamOwn, StreamOwn{Stream: key, Owner: "a2", Expect: token, Term: 1}, ErrStaleTerm},
		{"given to an unknown node", CmdStreamOwn, StreamOwn{Stream: key, Owner: "x", Expect: token, Term: 2}, ErrUnknownNode},
		{"inherited from a member", CmdStreamInherit, StreamInherit{Origin: "a2", Incarnation: incarnation(2), Owner: "a1"}, ErrStillMember},
		{"inherited by an unknown node", CmdStreamInherit, StreamInherit{Origin: "x", Incarnation: incarnation(2), Owner: "y"}, ErrUnknownNode},
		{"inherited from an invalid name", CmdStreamInherit, StreamInherit{Origin: "../x", Incarnation: incarnation(2), Owner: "a1"}, ErrUnknownNode},
		{"an unknown stream", CmdStreamOwn, StreamOwn{Stream: "x/1", Owner: "a2", Expect: token, Term: 2}, ErrUnknownStream},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			h := newStreamHistory()
			if err := h.apply(CmdStreamOpen, 2, StreamOpen{Origin: "a1", Incarnation: incarnation(1)}); err != nil {
				t.Fatal(err)
			}
			before := h.state
			if err := h.apply(tt.t, 2, tt.data); !errors.Is(err, tt.want) {
				t.Fatalf("got %v, want %v", err, tt.want)
			}
			if h.state != before {
				t.Fatal("a refusal changed the state")
			}
		})
	}
	for _, bad := range []string{"", "12", strings.Repeat("Z", 32), incarnation(1) + "0"} {
		if err := newStreamHistory().apply(CmdStreamOpen, 2, StreamOpen{Origin: "a1", Incarnation: bad}); err == nil {
			t.Errorf("incarnation %q was accepted", bad)
		}
	}
}

func TestStreamsOfANodeAreBounded(t *testing.T) {
	h := newStreamHistory()
	for n := range MaxStreamsPerNode {
		if err := h.apply(CmdStreamOpen, 1, StreamOpen{Origin: "a1", Incarnation: incarnation(n)}); err != nil {
			t.Fatal(err)
		}
	}
	if err := h.apply(CmdStreamOpen, 1, StreamOpen{Origin: "a1", Incarnation: incarnation(1000)}); !errors.Is(err, ErrStateFull) {
		t.Fatalf("one stream too many: %v, want ErrStateFull", err)
	}
	if err := h.apply(CmdStreamOpen, 1, StreamOpen{Origin: "a2", Incarnation: incarnation(1)}); err != nil {
		t.Fatalf("another node's stream: %v", err)
	}
}

// For any commands in any order: no token is given twice, a stream's token only
// rises, and Ownership rises with each change.
func TestTokensOnlyRise(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		h := newStreamHistory()
		newest := map[string]FenceToken{}
		given := map[FenceToken]string{}
		for range rapid.IntRange(1, 40).Draw(t, "steps") {
			origin := rapid.SampledFrom([]string{"a1", "a2", "b1"}).Draw(t, "origin")
			inc := incarnation(rapid.IntRange(0, 2).Draw(t, "incarnation"))
			key := StreamKey(origin, inc)
			before := h.state
			switch rapid.IntRange(0, 4).Draw(t, "what") {
			case 3:
				_ = h.apply(CmdNodeRemove, 1, NodeRemove{Name: origin})
			case 4:
				_ = h.apply(CmdStreamInherit, 1, StreamInherit{Origin: origin, Incarnation: inc, Owner: rapid.SampledFrom([]string{"a1", "a2", "b1"}).Draw(t, "heir")})
			case 0:
				_ = h.apply(CmdStreamOpen, 1, StreamOpen{Origin: origin, Incarnation: inc})
			case 1:
				expect := h.state.Streams[key].Token
				if rapid.Bool().Draw(t, "stale") {
					expect.Index--
				}
				_ = h.apply(CmdStreamOwn, 1, StreamOwn{Stream: key, Owner: rapid.SampledFrom([]string{"a1", "a2", "b1"}).Draw(t, "to"), Expect: expect, Term: 1})
			case 2:
				_ = h.apply(CmdStreamDrop, 1, StreamDrop{Owner: h.state.Streams[key].Owner, Streams: []string{key}})
			}
			changed := false
			for key, j := range h.state.Streams {
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
			changed = changed || len(h.state.Streams) != len(before.Streams)
			if changed != (h.state.Ownership == h.index) || h.state.Ownership < before.Ownership {
				t.Fatalf("ownership %d after %d at index %d, changed %t", h.state.Ownership, before.Ownership, h.index, changed)
			}
		}
	})
}
