package agreed

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// removalHistory applies commands to the state of a cluster that a-1 has founded, and keeps
// all states.
type removalHistory struct {
	t      interface{ Fatal(...any) }
	states []*State // by raft index
}

func newRemovalHistory(t testing.TB, level int) *removalHistory {
	h := &removalHistory{t: t, states: []*State{founded(t)}}
	if level > 1 {
		h.must(CmdFeatureRaise, FeatureRaise{Level: level})
	}
	return h
}

func (h *removalHistory) now() *State { return h.states[len(h.states)-1] }

// apply returns the command's raft index.
func (h *removalHistory) apply(typ CommandType, data any) (uint64, error) {
	c, err := NewCommand(typ, applyTime.Add(time.Duration(len(h.states))*time.Second), data)
	if err != nil {
		h.t.Fatal(err)
	}
	c.Index = uint64(len(h.states))
	next, err := Apply(h.now(), c)
	h.states = append(h.states, next)
	return c.Index, err
}

func (h *removalHistory) must(typ CommandType, data any) uint64 {
	index, err := h.apply(typ, data)
	if err != nil {
		h.t.Fatal(err)
	}
	return index
}

func TestRemovalAndReturn(t *testing.T) {
	h := newRemovalHistory(t, 2)
	first := h.must(CmdNodePut, NodePut{Node: Node{Name: "b-1", Site: "b", Feature: 2}, Admit: true})
	again := h.must(CmdNodePut, NodePut{Node: Node{Name: "b-1", Site: "b", Feature: 2, Instance: "restarted", Admitted: first}})
	if n := h.now().Nodes["b-1"]; n.Admitted != first || n.Instance != "restarted" {
		t.Fatalf("after a restart: %+v, want the admission by entry %d, not %d", n, first, again)
	}
	if err := errors.Join(ignoreIndex(h.apply(CmdStreamOpen, StreamOpen{Origin: "b-1", Incarnation: incarnation(1)})),
		ignoreIndex(h.apply(CmdStreamOpen, StreamOpen{Origin: "a-1", Incarnation: incarnation(1)}))); err != nil {
		t.Fatal(err)
	}
	if _, err := h.apply(CmdNodeAdmit, NodeAdmit{Name: "b-1"}); !errors.Is(err, ErrNotRemoved) {
		t.Fatalf("admitting a member: %v, want ErrNotRemoved", err)
	}
	removed := h.must(CmdNodeRemove, NodeRemove{Name: "b-1", By: "ops"})
	s := h.now()
	r, known := s.Removal("b-1")
	if !known || r.Index != removed || r.Site != "b" || r.By != "ops" || !r.At.Equal(applyTime.Add(time.Duration(removed)*time.Second)) {
		t.Fatalf("removed as %+v", r)
	}
	if !s.WasRemoved("b-1", first) || s.WasRemoved("a-1", 0) || s.WasRemoved("c-1", removed+1) {
		t.Fatal("who was removed is wrong")
	}
	for _, late := range []NodePut{{Node: Node{Name: "b-1", Site: "b", Admitted: first}}, {Node: Node{Name: "c-1", Site: "c"}}} {
		if _, err := h.apply(CmdNodePut, late); !errors.Is(err, ErrUnknownNode) {
			t.Fatalf("an announcement of %s that comes after its removal: %v, want ErrUnknownNode", late.Name, err)
		}
	}
	h.must(CmdStreamDrop, StreamDrop{Owner: "b-1", Streams: []string{StreamKey("b-1", incarnation(1))}})
	h.must(CmdStreamDrop, StreamDrop{Owner: "a-1", Streams: []string{StreamKey("a-1", incarnation(1))}})
	h.must(CmdNodeAdmit, NodeAdmit{Name: "b-1", By: "ops"})
	if !h.now().WasRemoved("b-1", first) {
		t.Fatal("the old admission counts although the node has not joined yet")
	}
	back := h.must(CmdNodePut, NodePut{Node: Node{Name: "b-1", Site: "b", Feature: 2}, Admit: true})
	if _, err := h.apply(CmdNodePut, NodePut{Node: Node{Name: "b-1", Site: "b", Admitted: first}}); !errors.Is(err, ErrUnknownNode) {
		t.Fatalf("an announcement of the disk from before: %v, want ErrUnknownNode", err)
	}
	s = h.now()
	if s.Nodes["b-1"].Admitted != back || len(s.Removed) != 0 || !s.WasRemoved("b-1", first) || s.WasRemoved("b-1", back) {
		t.Fatalf("after the return: %+v, removed %+v", s.Nodes["b-1"], s.Removed)
	}
	if want := []string{StreamKey("a-1", incarnation(1))}; !slices.Equal(s.DoneStreams, want) {
		t.Errorf("done streams %v, want %v: those of the returned node are needed again", s.DoneStreams, want)
	}
}

func ignoreIndex(_ uint64, err error) error { return err }

// A level-1 build must get the same state, and it knows none of this.
func TestNoRemovalIsNotedBelowItsFeatureLevel(t *testing.T) {
	h := newRemovalHistory(t, 1)
	first := h.must(CmdNodePut, NodePut{Node: Node{Name: "b-1", Site: "b", Feature: 2}, Admit: true})
	h.must(CmdNodeRemove, NodeRemove{Name: "b-1"})
	if s := h.now(); s.RemovedBefore != 0 || s.Removed != nil || s.Format != 1 || s.WasRemoved("b-1", first) {
		t.Fatalf("at level 1: removed %+v before %d, format %d", s.Removed, s.RemovedBefore, s.Format)
	}
	h.must(CmdFeatureRaise, FeatureRaise{Level: 2})
	if s := h.now(); !s.WasRemoved("b-1", first) || s.WasRemoved("a-1", 0) {
		t.Fatal("a node that was removed at level 1 counts as a member at level 2, or the founder as removed")
	}
}

func TestRemovalsAreBounded(t *testing.T) {
	h := newRemovalHistory(t, 2)
	first := h.must(CmdNodePut, NodePut{Node: Node{Name: "n-0", Site: "b"}, Admit: true})
	h.must(CmdNodeRemove, NodeRemove{Name: "n-0"})
	for i := range maxRemovals {
		name := fmt.Sprintf("n-%d", i+1)
		h.must(CmdNodePut, NodePut{Node: Node{Name: name, Site: "b"}, Admit: true})
		h.must(CmdNodeRemove, NodeRemove{Name: name})
	}
	s := h.now()
	if _, known := s.Removal("n-0"); known || len(s.Removed) != maxRemovals {
		t.Fatalf("%d removals are kept, want the newest %d", len(s.Removed), maxRemovals)
	}
	if !s.WasRemoved("n-0", first) {
		t.Error("a removed node that is no longer listed counts as a member")
	}
	if _, err := h.apply(CmdNodeAdmit, NodeAdmit{Name: "n-0"}); !errors.Is(err, ErrNotRemoved) {
		t.Errorf("admitting it: %v, want ErrNotRemoved", err)
	}
}

// For any history, and as any state of it sees it: a disk whose node is a member or joins
// later is never taken for a removed one, and from its removal on a removed one always is.
func TestEveryStateKnowsWhoWasRemoved(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		h := newRemovalHistory(t, 1)
		type disk struct {
			name              string
			admitted, removed uint64 // removed: 0 while it is a member
		}
		disks := []disk{{name: "a-1"}}
		current := map[string]int{"a-1": 0} // by name, into disks
		for range rapid.IntRange(1, 30).Draw(rt, "commands") {
			name := rapid.SampledFrom([]string{"a-1", "b-1", "c-1"}).Draw(rt, "name")
			i, member := current[name]
			switch typ := rapid.SampledFrom([]CommandType{CmdNodePut, CmdNodeRemove, CmdNodeAdmit, CmdFeatureRaise}).Draw(rt, "type"); typ {
			case CmdNodePut:
				index := h.must(typ, NodePut{Node: Node{Name: name, Site: name[:1]}, Admit: true})
				if !member {
					current[name], disks = len(disks), append(disks, disk{name: name, admitted: index})
				}
			case CmdNodeRemove:
				if index, err := h.apply(typ, NodeRemove{Name: name}); err == nil {
					disks[i].removed = index
					delete(current, name)
				}
			case CmdNodeAdmit:
				_, _ = h.apply(typ, NodeAdmit{Name: name}) // refused unless it is removed
			case CmdFeatureRaise:
				h.must(typ, FeatureRaise{Level: 2})
			}
		}
		for at, s := range h.states {
			for _, d := range disks {
				gone := d.removed != 0 && uint64(at) >= d.removed
				got := s.WasRemoved(d.name, d.admitted)
				if got && !gone {
					rt.Fatalf("entry %d says that %+v was removed", at, d)
				}
				if gone && !got && s.FeatureLevel >= 2 && h.states[d.removed].FeatureLevel >= 2 {
					rt.Fatalf("entry %d does not know that %+v was removed", at, d)
				}
			}
		}
	})
}
